"""The other loaders of bench.loading, and how each variant is measured.  Imports nothing of ours: it runs in the environment of the peers.

    <python of the peers> -m bench.loading_peers official --images photographs.tar

The official pipeline is that of SwAV's code: Pillow decodes, torchvision crops, flips, colours, blurs and normalises one view after another.
"""

import argparse
import importlib
import io
import json
import random
import resource
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

CROPS = [(224, 0.14, 1.0)] * 2 + [(96, 0.05, 0.14)] * 4
BATCH = 64
MEAN, STD = [0.485, 0.456, 0.406], [0.228, 0.224, 0.225]  # as their code has it


def photographs(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [f.read() for member in tar if member.isfile() and (f := tar.extractfile(member))]


def usage() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def answer(work: Callable[[int, int], object]) -> None:
    """Do `first end` as each line of the input asks; say what it took.  The parent lets variants take turns this way."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        first, end = map(int, line.split())
        cpu, wall = time.process_time(), time.perf_counter()
        work(first, end)
        taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(taken | {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


class Blur:
    def __call__(self, image: Any) -> Any:
        if np.random.rand() > 0.5:
            return image
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


class Views:
    """Bytes of a JPEG -> six float tensors."""

    def __init__(self) -> None:
        t = torchvision_transforms()
        jitter = t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8)
        tail = [t.RandomHorizontalFlip(p=0.5), t.Compose([jitter, t.RandomGrayscale(p=0.2), Blur()]), t.ToTensor(), t.Normalize(MEAN, STD)]
        self.views = [t.Compose([t.RandomResizedCrop(size, scale=(low, high)), *tail]) for size, low, high in CROPS]

    def __reduce__(self) -> Any:
        return Views, ()  # made anew in a worker that is spawned, where torchvision has to be made to load first

    def __call__(self, data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [view(image) for view in self.views]

    def of_sample(self, sample: Any) -> list[torch.Tensor]:
        return self(bytes(sample["jpg"]))


def torchvision_transforms() -> Any:
    """torchvision's transforms.  Beside a CPU build of torch its compiled operators do not load: they are declared, since none is used."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    if not hasattr(torch.ops.torchvision, "nms"):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        pooled = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "qroi_align", "deform_conv2d")
        for name in (*pooled, *(f"_{n}_backward" for n in pooled)):
            library.define(f"{name}(Tensor input) -> Tensor")
    KEPT.append(library)  # its declarations end with it
    return importlib.import_module("torchvision.transforms")


KEPT: list[object] = []


def official(images: list[bytes]) -> None:
    views = Views()

    def work(first: int, end: int) -> None:
        for data in images[first:end]:
            views(data)

    answer(work)


# -- end to end: from files to batches, by worker processes ----------------------------------------------------------------


def webdataset(folder: Path, workers: int) -> Iterator[Any]:
    wds = importlib.import_module("webdataset")
    dataset = wds.WebDataset(sorted(map(str, (folder / "tars").glob("*.tar"))), shardshuffle=False, empty_check=False)
    yield from torch.utils.data.DataLoader(
        dataset.shuffle(200).to_tuple("jpg").map_tuple(Views()), batch_size=BATCH, num_workers=workers, drop_last=True
    )


def streaming(folder: Path, workers: int) -> Iterator[Any]:
    torchvision_transforms()  # it imports torchvision, which must find its operators
    mds = importlib.import_module("streaming")

    class Photos(mds.StreamingDataset):  # type: ignore[misc, name-defined]
        views: Views

        def __getitem__(self, i: int) -> Any:
            return self.views.of_sample(super().__getitem__(i))

    out = folder / "mds"
    if not out.exists():
        with mds.MDSWriter(out=str(out), columns={"jpg": "bytes"}, size_limit=1 << 24) as writer:
            for data in sorted((folder / "raw").glob("*.jpg")):
                writer.write({"jpg": data.read_bytes()})
    photos = Photos(local=str(out), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    photos.views = Views()
    yield from mds.StreamingDataLoader(photos, batch_size=BATCH, num_workers=workers, drop_last=True)


def _bytes_of(path: str) -> dict[str, bytes]:
    return {"jpg": Path(path).read_bytes()}


def litdata(folder: Path, workers: int) -> Iterator[Any]:
    lit, out = importlib.import_module("litdata"), folder / "lit"
    if not out.exists():
        raw = sorted(map(str, (folder / "raw").glob("*.jpg")))
        lit.optimize(fn=_bytes_of, inputs=raw, output_dir=str(out), chunk_bytes="16MB", num_workers=1)

    photos = lit.StreamingDataset(str(out), shuffle=True, drop_last=True, transform=Views().of_sample)
    yield from lit.StreamingDataLoader(photos, batch_size=BATCH, num_workers=workers, drop_last=True)


LOADERS = {"webdataset": webdataset, "streaming": streaming, "litdata": litdata}


def family_mib() -> float:
    """Proportional set size of this process and its descendants: shared pages are counted once."""
    psutil = importlib.import_module("psutil")
    process = psutil.Process()
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def family_cpu() -> float:
    psutil = importlib.import_module("psutil")
    process = psutil.Process()
    return float(sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)]))


def timed(batches: Iterator[Any], count: int, warm: int) -> dict[str, float]:
    """Seconds for `count` batches after `warm`, by when as much is made ahead as at the end."""
    for _ in range(warm):
        next(batches)
    cpu, wall = family_cpu(), time.perf_counter()
    for _ in range(count):
        next(batches)
    return {"cpu": family_cpu() - cpu, "wall": time.perf_counter() - wall, "images": count * BATCH, "mib": family_mib()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["official", *LOADERS])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.which == "official":
        official(photographs(args.images))
    else:
        print(json.dumps(timed(LOADERS[args.which](args.folder, args.workers), args.batches, warm=args.workers)), flush=True)
