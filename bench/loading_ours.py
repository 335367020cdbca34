"""Our side of bench.loading: the worker's own code on one core, the floor under it, the quality of its crops, and the stream end to end."""

import argparse
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps

from bench.loading_peers import BATCH, answer, photographs, timed
from streamlearn.contract.catalog import Advance, DeltaCatalog, ShardRow
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import STORED, Outcome, ShardSample, ShardWriter, shard_key, sidecar_key, write_sidecar
from streamlearn.stream import views
from streamlearn.stream.crew import Crew, Work
from streamlearn.stream.decode import Buffer, header, pixels
from streamlearn.stream.keys import draws, key
from streamlearn.stream.loader import Stream
from streamlearn.stream.worker import BatchSpec, Place, keep_memory, make

CONFIG = StreamConfig(workers=2, prefetch=4, fresh_fraction=1.0)
MOST = 64  # images in one go


def places(path: Path, images: list[bytes]) -> list[Place]:
    """The images one after another in a file, as the worker reads them."""
    path.write_bytes(b"".join(images))
    starts = np.cumsum([0] + [len(data) for data in images]).tolist()
    return [Place(str(path), ShardSample(i, i, "jpg", starts[i], len(data))) for i, data in enumerate(images)]


def planned(images: list[bytes], first: int) -> tuple[Any, Any]:
    """Boxes and scales as the worker draws them for these images."""
    known = [header(data) for data in images]
    sizes = np.array([(one.width, one.height) for one in known])
    return views.plan(draws(key(first), len(images)), sizes, CONFIG.crops)


def ours(spots: list[Place], *, paint: bool) -> None:
    out = tuple(np.zeros((crop.count, MOST, crop.size, crop.size, 3), np.uint8) for crop in CONFIG.crops)

    def work(first: int, end: int) -> None:
        spec = BatchSpec(tuple(spots[first:end]), draws(key(first), end - first))
        sound = make(CONFIG, spec, tuple(o[:, : end - first] for o in out), paint=paint)
        assert sound.all()

    answer(work)


def floor(images: list[bytes]) -> None:
    """libjpeg-turbo alone, into memory that is there already, at the scale that the crops need."""
    buffer, jobs = np.empty(64 * 2**20, np.uint8), dict[int, list[tuple[bytes, int, int, int]]]()

    def prepare(first: int, end: int) -> list[tuple[bytes, int, int, int]]:
        some, found = images[first:end], []
        for data, scale in zip(some, planned(some, first)[1].tolist(), strict=True):
            one = header(data)
            found.append((data, scale, -(-one.height // scale), -(-one.width // scale)))
        return found

    for first in range(0, len(images), MOST):
        jobs[first] = prepare(first, min(len(images), first + MOST))

    def work(first: int, end: int) -> None:
        for data, scale, height, width in jobs[first]:
            if scale == 1:
                simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
            else:
                simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, min_factor=scale, buffer=buffer)

    answer(work)


def quality(images: list[bytes]) -> None:
    """PSNR of our crops against full decode and Pillow's antialiased resize (the official crop) of the same boxes."""
    buffer, found, scales = Buffer(), list[float](), list[int]()
    for i, data in enumerate(images):
        boxes_V14, scale_1 = planned([data], i)
        known, scale = header(data), int(scale_1[0])
        scales.append(scale)
        whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")  # upright, as ours
        image = pixels(data, known, scale=scale, buffer=buffer)
        for box, side in zip(boxes_V14[:, 0], views.sides(CONFIG.crops).tolist(), strict=True):
            reference = np.asarray(whole.resize((side, side), Image.Resampling.BILINEAR, box=tuple(box.tolist())), dtype=np.float32)
            crop = np.empty((side, side, 3), np.uint8)
            views.cut(image, box // scale, crop)
            error = float(np.square(reference - crop).mean())
            found.append(10 * np.log10(255**2 / max(error, 1e-6)))
    used = {str(s): scales.count(s) for s in sorted(set(scales))}
    print(json.dumps({"mean": float(np.mean(found)), "p5": float(np.quantile(found, 0.05)), "scales": used}), flush=True)


# -- end to end ------------------------------------------------------------------------------------------------------------


def world(home: Path, images: list[bytes], per_shard: int) -> None:
    """Shards of these images in a catalog."""
    store, catalog = FolderStore(home / "store"), DeltaCatalog(str(home / "store" / "catalog"), log_id="bench")
    for first in range(0, len(images), per_shard):
        writer, outcomes = ShardWriter(home / "staged.tar"), []
        for offset, data in enumerate(images[first : first + per_shard], first):
            start = writer.add(offset, data, "jpg", {"n": offset})
            outcomes.append(Outcome(offset=offset, outcome=STORED, sha256=hashlib.sha256(data).hexdigest(), ext="jpg",
                                    member_offset=start, member_size=len(data), bytes=len(data)))  # fmt: skip
        sha256, size = writer.close()
        end = first + len(outcomes)
        name = shard_key("2026-11-21", "candidates", 0, first, end, sha256)
        store.put_file(name, home / "staged.tar")
        write_sidecar(home / "staged.parquet", outcomes)
        store.put_file(sidecar_key(name), home / "staged.parquet")
        row = ShardRow(
            key=name, sha256=sha256, bytes=size, num_samples=len(outcomes), topic="candidates", partition=0, first_offset=first, end_offset=end,
            first_fetched_at="2026-11-21T00:00:00Z", last_fetched_at=f"2026-11-21T00:{first // per_shard:02d}:00Z", day="2026-11-21",
        )  # fmt: skip
        catalog.commit([row], [Advance("candidates", 0, first, end)])


class Bytes(Crew):
    """Hands over bytes as they would be copied to a GPU, which does the rest; there is none here."""

    def crops(self, work: Work) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(pixels_VBSSC).clone() for pixels_VBSSC in self._trays.arrays(work.tray))


ENDS: dict[str, tuple[type[Crew], str]] = {
    "deferred": (Bytes, "device"),  # flip, colour, blur and normalisation left to the device
    "workers": (Bytes, "workers"),  # normalisation left to the device
    "floats": (Crew, "workers"),  # nothing left: a learner on the CPU
}


def end_to_end(which: str, folder: Path, workers: int, batches: int) -> None:
    catalog, store = DeltaCatalog(str(folder / "store" / "catalog"), log_id="bench"), FolderStore(folder / "store")
    crew, augment = ENDS[which]
    config = CONFIG.model_copy(update={"workers": workers, "augment": augment})
    stream = Stream(config, catalog, store, folder / "cache", batch=BATCH, state=None, stop=threading.Event())
    stream.crew.close()
    stream.crew = crew(config, batch=BATCH, device=torch.device("cpu"))

    def taken() -> Iterator[object]:
        for batch in stream.batches():
            assert batch is not None, "too few images"
            yield batch

    try:
        print(json.dumps(timed(taken(), batches, warm=config.prefetch + 1)), flush=True)
    finally:
        stream.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["deferred", "workers", "floor", "quality", "world", *(f"end-{end}" for end in ENDS)])
    parser.add_argument("--images", type=Path, help="a tar of JPEGs")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--count", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = photographs(args.images)[: args.count] if args.images else []
    if args.which.startswith("end-"):
        end_to_end(args.which.removeprefix("end-"), args.folder, args.workers, args.batches)
    elif args.which == "quality":
        quality(loaded)
    elif args.which == "world":
        world(args.folder, loaded, 256)
    else:
        keep_memory()  # as start_worker does
        if args.which == "floor":
            floor(loaded)
        else:
            ours(places(args.folder / f"{args.which}.bin", loaded), paint=args.which == "workers")
