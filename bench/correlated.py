"""One pass over a strongly correlated stream: FIFO, reservoir and MinRed replay, against the same images shuffled.

    python -m bench.correlated --images 6400 --frames 4 --capacity 2048 --seeds 3       the figures for LOG.md
    python -m bench.correlated --images 384 --frames 4 --capacity 256 --round 64 --batch 64 --bank 500 --test 500        a look whether it runs

CIFAR-10 JPEGs sorted by class; each is followed by frames that hardly differ from it (moved by a pixel or two, a bit brighter or darker, encoded
anew), as a video's would.  The repo's own learner takes one pass, with the same number of steps, fresh images and replay draws under every policy; only what
is kept for replay differs.  Printed: k-NN and ridge of the averaged weights on test images, and of the samples kept in the end how many
different originals and classes there are.
"""

import argparse
import io
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from bench.real import DATA
from bench.shards import open_home, publish
from streamlearn.contract.config import Config, CropConfig, ModelConfig, ObjectiveConfig, OptimConfig, StreamConfig, TrainConfig
from streamlearn.learn.ema import calibrated
from streamlearn.learn.state import TrainState, fresh_state
from streamlearn.learn.trainer import train
from streamlearn.probes.banks import Split
from streamlearn.probes.features import features
from streamlearn.probes.knn import accuracy, knn
from streamlearn.probes.linear import ridge
from streamlearn.stream.decode import decode
from streamlearn.stream.loader import Batch, Stream
from streamlearn.stream.views import eval_crop

# name: what is kept, whether the stream is shuffled
Policy = Literal["reservoir", "minred", "fifo"]
RUNS: dict[str, tuple[Policy, bool]] = {
    "fifo": ("fifo", False),
    "reservoir": ("reservoir", False),
    "minred": ("minred", False),
    "shuffled": ("reservoir", True),
}


@dataclass(frozen=True)
class Frames:
    """The stream in its order."""

    data: list[bytes]
    original: np.ndarray
    label: np.ndarray


def frames(images: int, count: int, seed: int) -> Frames:
    """`images` originals, sorted by class, each as `count` frames."""
    table, rng = pq.read_table(DATA / "cifar10-train.parquet"), np.random.default_rng(seed)
    chosen = rng.permutation(table.num_rows)[:images]
    labels = np.array(table.column("label").to_pylist())[chosen]
    in_order = np.argsort(labels, kind="stable")
    data = []
    for row in chosen[in_order].tolist():
        picture = table.column("jpeg")[row].as_py()
        data += [picture, *(_frame(picture, rng) for _ in range(count - 1))]
    return Frames(data, np.repeat(np.arange(images), count), np.repeat(labels[in_order], count))


def _frame(jpeg: bytes, rng: np.random.Generator) -> bytes:
    pixels = np.pad(np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")), ((2, 2), (2, 2), (0, 0)), mode="edge")
    top, left = rng.integers(0, 5, 2)
    moved = pixels[top : top + pixels.shape[0] - 4, left : left + pixels.shape[1] - 4].astype(np.float32)
    out = io.BytesIO()
    Image.fromarray(np.clip(moved * rng.uniform(0.95, 1.05), 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def labelled(name: str, count: int, seed: int) -> Split:
    table = pq.read_table(DATA / name)
    rows = np.random.default_rng(seed).permutation(table.num_rows)[:count].tolist()
    pixels = np.stack([eval_crop(decode(table.column("jpeg")[r].as_py()), 32) for r in rows])
    return Split(pixels, torch.tensor([table.column("label")[r].as_py() for r in rows]))


def config_of(policy: Policy, args: argparse.Namespace, seed: int) -> Config:
    """learning.md, section 4: what makes SwAV learn CIFAR-10 on two cores."""
    return Config(
        stream=StreamConfig(
            seed=seed,
            crops=(CropConfig(count=2, size=32, scale=(0.3, 1.0)),),
            jitter=0.4,
            blur=0.0,
            fresh_fraction=args.fresh,
            max_replay_per_fresh=0.0,  # no idle rounds: all policies take the same number of steps
            replay=policy,
            reservoir=args.capacity,
            round_samples=args.round,
            workers=0,
            prefetch=1,
        ),
        model=ModelConfig(backbone="regnety-tiny", head=(512, 128)),
        objective=ObjectiveConfig(prototypes=128, epsilon=0.015, freeze_prototypes=60),
        train=TrainConfig(
            seed=seed, batch=args.batch, ema_decay=0.99, optim=OptimConfig(kind="sgd", lr=0.3, warmup_steps=20, weight_decay=5e-4)
        ),
    )


def passed(config: Config, home: Path, stop: threading.Event) -> tuple[Stream, TrainState]:
    """The learner after one pass."""
    stream = Stream(config.stream, *open_home(home), home / "cache", batch=config.train.batch, state=None, stop=stop)
    state = fresh_state(config)

    def batches() -> Iterator[Batch]:
        for batch in stream.batches():
            if batch is None:
                return
            yield batch

    train(state, batches(), [])
    return stream, state


def run(name: str, stream_of: Frames, splits: tuple[Split, Split], args: argparse.Namespace, seed: int) -> dict[str, float]:
    policy, shuffled = RUNS[name]
    at = np.random.default_rng(seed).permutation(len(stream_of.data)) if shuffled else np.arange(len(stream_of.data))
    config, began = config_of(policy, args, seed), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        publish(home, [stream_of.data[i] for i in at], "jpg", a_shard=args.round)
        stream, state = passed(config, home, threading.Event())
        kept = stream.sample(state.stream, args.capacity)
        offsets = at[[int(key.rsplit("/", 1)[1].split("-")[0]) + int(index) for key, _, index in (ref.partition("#") for ref in kept)]]
        trunk = calibrated(state.ema.model.trunk, stream.eval_images(kept[:512], 32))
    bank, test = splits
    bank_ND, test_MD = (features(trunk, s, config.stream.mean, config.stream.std, 256) for s in splits)
    return {
        "steps": state.step,
        "k-NN %": 100 * accuracy(knn(bank_ND, bank.labels, test_MD), test.labels),
        "ridge %": 100 * accuracy(ridge(bank_ND, bank.labels, test_MD), test.labels),
        "originals": len(np.unique(stream_of.original[offsets])),
        "classes": float(np.exp(_entropy(np.bincount(stream_of.label[offsets], minlength=10) / len(offsets)))),
        "CPU s": time.process_time() - began,
    }


def _entropy(p: np.ndarray) -> float:
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for seed in range(args.seeds):
        stream_of = frames(args.images, args.frames, seed)
        splits = labelled("cifar10-train.parquet", args.bank, 1000 + seed), labelled("cifar10-test.parquet", args.test, 1000 + seed)
        for name in RUNS:
            results[name].append(run(name, stream_of, splits, args, seed))
            print(seed, name, {k: round(v, 1) for k, v in results[name][-1].items()}, flush=True)
    columns = list(results["fifo"][0])
    print(f"\n{args.images} images x {args.frames} frames, capacity {args.capacity}, one pass, mean (least - most) of {args.seeds} seeds")
    print(f"{'':10}" + "".join(f"{c:>22}" for c in columns))
    for name, found in results.items():
        cells = [[r[c] for r in found] for c in columns]
        print(f"{name:10}" + "".join(f"{statistics.mean(c):8.1f} ({min(c):.1f} - {max(c):.1f})".rjust(22) for c in cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6400, help="originals")
    parser.add_argument("--frames", type=int, default=4, help="of each original")
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--round", type=int, default=128, help="fresh images in a round, and in a shard")
    parser.add_argument("--fresh", type=float, default=0.25, help="share of fresh images: 0.25 is four updates an image")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bank", type=int, default=5000)
    parser.add_argument("--test", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
