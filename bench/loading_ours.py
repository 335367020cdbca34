"""Our side of bench.loading: the worker's own code on one core, the floor under it, the quality of its crops, and the stream end to end."""

import argparse
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
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
from streamlearn.stream import crop, distort, views
from streamlearn.stream.crew import Crew, Work
from streamlearn.stream.crop import Pile
from streamlearn.stream.decode import header
from streamlearn.stream.keys import draws, key
from streamlearn.stream.loader import Stream
from streamlearn.stream.worker import BatchSpec, Out, Place, keep_memory, make

CONFIG = StreamConfig(workers=2, prefetch=4, fresh_fraction=1.0)
MOST = 64  # images in one go
WAYS = ("deferred", "cropped", "workers")  # what is left to the device: crops and distortions, distortions, nothing


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


class Bench:
    """Memory as the crew's trays have it, for up to MOST images at once."""

    def __init__(self, spots: list[Place]):
        self.spots, self.sides_V = spots, views.sides(CONFIG.crops)
        self.table = np.zeros((len(self.sides_V), MOST, crop.COLUMNS), np.int64)
        self.memory = np.zeros(MOST * crop.per_image(self.sides_V, CONFIG.decoded_bytes), np.uint8)
        self.crops = tuple(np.zeros((one.count, MOST, one.size, one.size, 3), np.uint8) for one in CONFIG.crops)

    def made(self, which: str, first: int, end: int) -> BatchSpec:
        spec = BatchSpec(tuple(self.spots[first:end]), draws(key(first), end - first))
        out: Out = self.pile(end - first) if which == "deferred" else tuple(o[:, : end - first] for o in self.crops)
        assert make(CONFIG, spec, out, paint=which == "workers").all()
        return spec

    def pile(self, count: int) -> Pile:
        return Pile(self.table[:, :count], self.memory, self.sides_V)


def ours(spots: list[Place], which: str) -> None:
    bench = Bench(spots)
    answer(lambda first, end: bench.made(which, first, end))


def device(spots: list[Place]) -> None:
    """What is left to the device, done here: it is no GPU, so what is told of one is how many bytes it moves."""
    bench, count = Bench(spots), min(MOST, len(spots))
    spec = bench.made("deferred", 0, count)
    pile = bench.pile(count)
    moved = torch.from_numpy(pile.needed())
    finished = [torch.from_numpy(c[:, :count]).flatten(0, 1) for c in bench.crops]

    def crops(how: Callable[..., torch.Tensor]) -> None:
        first = 0
        for one in CONFIG.crops:
            how(moved, pile.table_VB6[first : first + one.count].reshape(-1, crop.COLUMNS), one.size)
            first += one.count

    def distortions() -> None:
        first = 0
        for rows, one in zip(finished, CONFIG.crops, strict=True):
            distort.distorted(rows, distort.draw(spec.keys_B, range(first, first + one.count), CONFIG), CONFIG)
            first += one.count

    def ms(work: Callable[[], None]) -> float:
        began = time.process_time()
        work()
        return 1000 * (time.process_time() - began) / count

    bench.made("cropped", 0, count)
    print(json.dumps({
        "batched_ms": ms(lambda: crops(crop.all_at_once)), "single_ms": ms(lambda: crops(crop.one_by_one)), "distort_ms": ms(distortions),
        "copied": len(moved) / count, "crops": sum(rows.numel() for rows in finished) / count, "gathered": gathered(pile) / count,
    }), flush=True)  # fmt: skip


def gathered(pile: Pile) -> float:
    """Bytes that crop.all_at_once reads and writes in the device's memory: each tap of each pass gathers (6 a px), and multiplies and adds (27)."""
    boxes_VB2 = pile.table_VB6[..., [crop.RIGHT, crop.BOTTOM]] - pile.table_VB6[..., [crop.LEFT, crop.TOP]]
    side_V1 = pile.sides_V[:, None]
    taps_VB2 = np.ceil(2 * np.maximum(1, boxes_VB2 / side_V1[..., None]))
    rows, columns = (boxes_VB2[..., 1] * side_V1 * taps_VB2[..., 0]).sum(), (side_V1**2 * taps_VB2[..., 1]).sum()
    return float(33 * (rows + columns))


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


def quality(images: list[bytes], spots: list[Place]) -> None:
    """PSNR of our crops (the device's, which are the workers') against full decode and Pillow's antialiased resize (the official crop) of the
    same boxes.
    """
    bench, found, scales = Bench(spots), list[float](), list[int]()
    for i, data in enumerate(images):
        boxes_V14, scale_1 = planned([data], i)
        scales.append(int(scale_1[0]))
        bench.made("deferred", i, i + 1)
        pile = bench.pile(1)
        whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")  # upright, as ours
        for view, (box, side) in enumerate(zip(boxes_V14[:, 0], views.sides(CONFIG.crops).tolist(), strict=True)):
            # cut before it is resized, as torchvision has it: resize(box=...) looks beyond the box
            reference = np.asarray(whole.crop(box.tolist()).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
            view_1SSC = crop.all_at_once(torch.from_numpy(pile.memory), pile.table_VB6[view], side)
            error = float(np.square(reference - view_1SSC[0].numpy()).mean())
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
    """Copies the bytes to other memory, as they would be to a GPU, which does the rest; there is none here.  That memory is kept, as a GPU's is."""

    copies: list[torch.Tensor] | None = None

    def crops(self, work: Work) -> tuple[torch.Tensor, ...]:
        parts = self._bytes(work)
        if self.copies is None:
            room = self._trays.arrays(work.tray)
            self.copies = [torch.empty(array.size, dtype=torch.uint8) for array in (room if len(parts) == len(room) else room[1:])]
        return tuple(copy[: part.numel()].copy_(part.flatten()) for copy, part in zip(self.copies, parts, strict=True))


ENDS: dict[str, tuple[type[Crew], dict[str, object]]] = {
    "deferred": (Bytes, {"augment": "device"}),  # crops, flip, colour, blur and normalisation left to the device
    "cropped": (Bytes, {"augment": "device", "decoded_bytes": 0}),  # all but the crops
    "workers": (Bytes, {"augment": "workers"}),  # normalisation left to the device
    "floats": (Crew, {"augment": "workers"}),  # nothing left: a learner on the CPU
}


def end_to_end(which: str, folder: Path, workers: int, batches: int) -> None:
    catalog, store = DeltaCatalog(str(folder / "store" / "catalog"), log_id="bench"), FolderStore(folder / "store")
    crew, how = ENDS[which]
    config = CONFIG.model_copy(update={"workers": workers, **how})
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
    parser.add_argument("which", choices=[*WAYS, "device", "floor", "quality", "world", *(f"end-{end}" for end in ENDS)])
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
        quality(loaded, places(args.folder / "quality.bin", loaded))
    elif args.which == "world":
        world(args.folder, loaded, 256)
    else:
        keep_memory()  # as start_worker does
        if args.which == "floor":
            floor(loaded)
        else:
            spots = places(args.folder / f"{args.which}.bin", loaded)
            device(spots) if args.which == "device" else ours(spots, args.which)
