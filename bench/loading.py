"""From photographs to the six views of SwAV (2 x 224 + 4 x 96): ours against the official pipeline and other loaders, in one run.

    python -m bench.loading --peers <python with torchvision, webdataset, mosaicml-streaming, litdata>

Three parts: `core`, one core from the bytes of a JPEG to its views, the variants taking turns at the same images; `large`, the same on
3-megapixel mosaics of them; `end`, from shards to batches with worker processes.  Variants run in processes of their own, so memory is theirs.
`deferred` leaves crops, flip, colour, blur and normalisation to the learner's GPU; `cropped` leaves it all but the crops, `workers` nothing but
the normalisation.  What is left is timed on this CPU, and the bytes are told that it makes a GPU move.
The floor is libjpeg-turbo alone, decoding at the scale that the crops need.  A peer that is not installed is named as absent.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from bench.loading_ours import MOST, WAYS
from bench.loading_peers import BATCH, photographs

DATA = Path(os.environ.get("STREAMLEARN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
OUR_BATCHES = 30  # end to end
OURS, PEERS = "bench.loading_ours", "bench.loading_peers"


@dataclass
class Variant:
    """A process that does images on demand."""

    name: str
    process: "subprocess.Popen[str]"
    best: dict[int, tuple[float, float]] = field(default_factory=dict)  # first image of a part -> least (cpu, wall) seconds
    mib: float = 0.0

    def answer(self) -> dict[str, float] | None:
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line.strip() else None

    def do(self, first: int, end: int) -> None:
        assert self.process.stdin
        print(first, end, file=self.process.stdin, flush=True)
        took = self.answer()
        assert took is not None, f"{self.name} ended"
        self.mib = took["mib"]
        now = (took["cpu"], took["wall"])
        self.best[first] = min(now, self.best.get(first, now))


def start(python: str, module: str, which: str, **options: object) -> "subprocess.Popen[str]":
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return subprocess.Popen(
        [python, "-m", module, which, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip


def absent(name: str, process: "subprocess.Popen[str]") -> None:
    said = process.communicate()[1].strip().splitlines() or ["no reason given"]
    print(f"  {name:34s} absent: {said[-1][:110]}")


def core(title: str, images: Path, count: int, args: argparse.Namespace, home: Path) -> None:
    """One core, in turns; the least CPU time of each part over the passes counts, since others use the machine too."""
    print(f"\n{title}: {count} images, one core, least of {args.passes} passes")
    variants = []
    for name, python, module in (
        ("official", args.peers, PEERS), *((way, sys.executable, OURS) for way in WAYS), ("floor", sys.executable, OURS),
    ):  # fmt: skip
        more = {} if module == PEERS else {"folder": home, "count": count}
        variant = Variant(name, start(python, module, name, images=images, **more))
        if variant.answer() is None:
            absent(name, variant.process)
        else:
            variants.append(variant)
    for _ in range(args.passes):
        for first in range(0, count, MOST):
            for variant in variants:
                variant.do(first, min(count, first + MOST))
    cpu = {variant.name: sum(c for c, _ in variant.best.values()) / count for variant in variants}
    for variant in variants:
        wall = sum(w for _, w in variant.best.values()) / count
        ratio = f"{cpu['official'] / cpu[variant.name]:6.2f} x official" if "official" in cpu else ""
        share = f"{100 * cpu['floor'] / cpu[variant.name]:5.0f} % of the floor's rate"
        print(
            f"  {variant.name:10s} {1 / cpu[variant.name]:8.1f} images/s a core  {1000 * cpu[variant.name]:7.2f} ms CPU  {1000 * wall:7.2f} ms wall"
            f"  {variant.mib:6.0f} MiB  {ratio}  {share}"
        )
        variant.process.communicate()
    psnr = asked("quality", images=images, folder=home, count=min(count, args.quality))
    print(
        f"  our crops against the official ones: PSNR mean {psnr['mean']:.1f} dB, p5 {psnr['p5']:.1f} dB; decoded at 1/n: {psnr['scales']}"
    )
    left = asked("device", images=images, folder=home, count=min(count, MOST))
    print(
        f"  what deferred leaves to the device, on this CPU: crops {left['single_ms']:.2f} ms an image as a learner on a CPU cuts them, "
        f"{left['batched_ms']:.1f} ms as a GPU does, distortions {left['distort_ms']:.1f} ms\n"
        f"  on a GPU it is bandwidth: {left['copied'] / 1e6:.2f} MB an image copied to it ({left['crops'] / 1e6:.2f} of finished crops), about "
        f"{left['gathered'] / 1e6:.0f} MB read and written there"
    )


def asked(which: str, **options: object) -> dict[str, Any]:
    process = start(sys.executable, OURS, which, **options)
    said, trouble = process.communicate()
    if process.returncode:
        raise SystemExit(trouble)
    answer: dict[str, Any] = json.loads(said)
    return answer


def mosaics(photos: list[bytes], count: int, path: Path) -> None:
    """Large photographs are not at hand: 4 x 4 of these on 2000 x 1500 px, 4:2:0, quality 88, as reference/loading.md has them."""
    from PIL import Image

    rng = random.Random(1)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            canvas = Image.new("RGB", (2000, 1500))
            for at in range(16):
                tile = Image.open(io.BytesIO(rng.choice(photos))).convert("RGB").resize((500, 375), Image.Resampling.BOX)
                canvas.paste(tile, (500 * (at % 4), 375 * (at // 4)))
            data = simplejpeg.encode_jpeg(np.array(canvas), quality=88, colorsubsampling="420")
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def lay_out(photos: list[bytes], folder: Path) -> None:
    """The photographs over and over, in each loader's form: a pass of it must outlast the measurement of the fastest."""
    (folder / "raw").mkdir()
    (folder / "tars").mkdir()
    for copy in range(-(-(OUR_BATCHES + 8) * BATCH // len(photos))):
        for first in range(0, len(photos), 100):
            with tarfile.open(folder / "tars" / f"{copy:03d}-{first:06d}.tar", "w") as tar:
                for i, data in enumerate(photos[first : first + 100], first):
                    member = tarfile.TarInfo(f"{copy:03d}{i:06d}.jpg")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                    (folder / "raw" / f"{copy:03d}{i:06d}.jpg").write_bytes(data)
    with tarfile.open(folder / "all.tar", "w") as tar:
        for raw in sorted((folder / "raw").iterdir()):
            tar.add(raw, raw.name)
    said = start(sys.executable, OURS, "world", images=folder / "all.tar", folder=folder).communicate()[1]
    assert (folder / "store" / "catalog").exists(), said


def end(photos: list[bytes], args: argparse.Namespace, folder: Path) -> None:
    print(
        f"\nend to end: shards to batches of {BATCH}, {args.workers} workers on {len(os.sched_getaffinity(0))} cores, best of {args.rounds}"
    )
    lay_out(photos, folder)
    names = {"webdataset": "webdataset + official views", "streaming": "MosaicML streaming + official", "litdata": "litdata + official",
             "end-deferred": "ours, deferred", "end-cropped": "ours, cropped by the workers",
             "end-workers": "ours, painted by the workers",
             "end-floats": "the same, and normalised"}  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, said in names.items():
            python, module = (sys.executable, OURS) if name.startswith("end-") else (args.peers, PEERS)
            batches = OUR_BATCHES if name.startswith("end-") else args.batches
            process = start(python, module, name, folder=folder, workers=args.workers, batches=batches)
            out, errors = process.communicate()
            if process.returncode:
                print(f"  {said:34s} absent: {(errors.strip().splitlines() or ['?'])[-1][:110]}")
            else:
                found[name].append(json.loads(out.splitlines()[-1]))
    rate: Callable[[str, str], float] = lambda name, what: max(r["images"] / r[what] for r in found[name])  # noqa: E731
    peer = max((rate(n, "cpu") for n in list(names)[:3] if found[n]), default=0.0)
    for name, said in names.items():
        if found[name]:
            ratio = f"{rate(name, 'cpu') / peer:6.2f} x the best peer a core" if peer else ""
            memory = max(r["mib"] for r in found[name])
            print(f"  {said:34s} {rate(name, 'wall'):8.1f} images/s  {rate(name, 'cpu'):8.1f} images/s a core  {memory:6.0f} MiB  {ratio}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="core,large,end")
    parser.add_argument("--peers", default=sys.executable, help="the python of an environment that has the peers")
    parser.add_argument("--images", type=Path, default=DATA / "imagenet-sample-1000.tar")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--large", type=int, default=64, help="mosaics")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--quality", type=int, default=1000, help="images whose crops are compared")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=6, help=f"of each peer, end to end; ours takes {OUR_BATCHES}")
    parser.add_argument("--rounds", type=int, default=2, help="end to end")
    arguments = parser.parse_args()
    photos = photographs(arguments.images)[: arguments.count]
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as scratch:
        home = Path(scratch)
        if "core" in arguments.parts:
            core("photographs", arguments.images, len(photos), arguments, home)
        if "large" in arguments.parts:
            mosaics(photos, arguments.large, home / "large.tar")
            core("3-megapixel mosaics", home / "large.tar", arguments.large, arguments, home)
        if "end" in arguments.parts:
            end(photos, arguments, home)
