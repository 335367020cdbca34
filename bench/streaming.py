"""One pass over a stream with replay, against epochs over the same images: as many updates, as many images learnt from in all.

    python -m bench.streaming --seeds 0 1 2                     the figures for LOG.md; about 15 CPU minutes a seed
    python -m bench.streaming --seeds 0 --images 512 --epochs 4 --capacity 128 --round 128 --batch 64 --bank 500 --test 500     whether it runs

The same learner, start, images of CIFAR-10 and rate; only what comes when differs:

    epochs   the set again and again, every image once an epoch in a new order: what offline training does, which keeps the whole set
    stream   every image once as fresh; of each round 1 / epochs is fresh, the rest is drawn from a reservoir of --capacity of those that went by
    once     every image once, no replay: an epoch's updates, so not an equal comparison; what replay is for

Gain = k-NN (k = 20, T = 0.07) of the averaged, calibrated weights less that of the same weights before the first step, on the same bank and test
images, which are drawn anew with each seed.  Printed: every figure, its mean and spread, and stream's gain as a part of epochs'.

Each (seed, arm) is one JSON file in --out, written when it is done and not made again: seeds may be run one by one, by several processes at once
(--arms), and joined (the table is of all files of the same settings; --seeds with nothing after it runs none).
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from bench.correlated import labelled
from bench.real import DATA
from bench.shards import open_home, publish
from streamlearn.contract import durable
from streamlearn.contract.config import Config, CropConfig, ModelConfig, ObjectiveConfig, OptimConfig, StreamConfig, TrainConfig
from streamlearn.learn.ema import calibrated
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import train
from streamlearn.probes.banks import Split
from streamlearn.probes.features import features
from streamlearn.probes.knn import accuracy, knn
from streamlearn.probes.linear import ridge
from streamlearn.stream.decode import decode
from streamlearn.stream.loader import Batch, Stream
from streamlearn.stream.views import eval_crop, normalised

ARMS = ("epochs", "stream", "once")
SETTINGS = ("images", "epochs", "capacity", "round", "batch", "bank", "test", "norm")  # what figures depend on, besides seed and arm
CALIBRATION = 512


def config_of(arm: str, args: argparse.Namespace, seed: int) -> Config:
    config = learner(args, seed, 1 / args.epochs if arm == "stream" else 1.0)
    return config.model_copy(update={"model": config.model.model_copy(update={"norm": args.norm})})


def learner(args: argparse.Namespace, seed: int, fresh: float) -> Config:
    """`fresh`: share of a round.  learning.md, section 4: what makes SwAV learn CIFAR-10 on two cores."""
    return Config(
        stream=StreamConfig(
            seed=seed,
            crops=(CropConfig(count=2, size=32, scale=(0.3, 1.0)),),
            jitter=0.4,
            blur=0.0,
            fresh_fraction=fresh,
            max_replay_per_fresh=0.0,  # no idle rounds: the number of steps is that of the images
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


def jpegs(count: int, seed: int) -> list[bytes]:
    table = pq.read_table(DATA / "cifar10-train.parquet")
    chosen = np.random.default_rng(seed).permutation(table.num_rows)[:count]
    return [table.column("jpeg")[row].as_py() for row in chosen.tolist()]


def judged(trunk: nn.Module, splits: tuple[Split, Split], config: Config) -> dict[str, float]:
    bank, test = splits
    bank_ND, test_MD = (features(trunk, s, config.stream.mean, config.stream.std, 256) for s in splits)
    found = {"knn": knn(bank_ND, bank.labels, test_MD), "ridge": ridge(bank_ND, bank.labels, test_MD)}
    return {name: round(100 * accuracy(predicted, test.labels), 3) for name, predicted in found.items()}


def run(arm: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    config, began, started = config_of(arm, args, seed), time.process_time(), time.monotonic()
    images, rng = jpegs(args.images, seed), np.random.default_rng([seed, 1])
    splits = labelled("cifar10-train.parquet", args.bank, 1000 + seed), labelled("cifar10-test.parquet", args.test, 1000 + seed)
    pixels = np.stack([eval_crop(decode(data), 32) for data in images[:CALIBRATION]])
    calibration = normalised(torch.from_numpy(pixels), config.stream.mean, config.stream.std)
    state, losses = fresh_state(config), []
    before = judged(calibrated(state.ema.model.trunk, calibration), splits, config)
    with tempfile.TemporaryDirectory() as folder:
        home, passes = Path(folder), args.epochs if arm == "epochs" else 1
        for epoch in range(passes):
            order = rng.permutation(len(images)) if epoch else np.arange(len(images))
            publish(home, [images[i] for i in order], "jpg", a_shard=args.round, start=epoch * len(images))
        stream = Stream(config.stream, *open_home(home), home / "cache", batch=args.batch, state=None, stop=threading.Event())

        def batches() -> Iterator[Batch]:
            for batch in stream.batches():
                if batch is not None:
                    yield batch
                elif state.fresh == passes * len(images):
                    return  # everything is learnt; else a shard is on its way

        train(state, batches(), [lambda state, step: losses.append(step.loss)])
        stream.close()
    after = judged(calibrated(state.ema.model.trunk, calibration), splits, config)
    return {
        "seed": seed,
        "arm": arm,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "steps": state.step,
        "learnt": state.images,
        "fresh": state.fresh,
        "before": before,
        "after": after,
        "loss": [round(statistics.mean(losses[i : i + 50]), 4) for i in range(0, len(losses), 50)],
        "cpu_s": round(time.process_time() - began),
        "wall_s": round(time.monotonic() - started),
    }


def file_of(arm: str, seed: int, args: argparse.Namespace) -> Path:
    settings = json.dumps({name: getattr(args, name) for name in SETTINGS}, sort_keys=True)
    return Path(args.out) / f"streaming-{hashlib.sha256(settings.encode()).hexdigest()[:8]}-{seed}-{arm}.json"


def joined(args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """One a seed: arm -> its figures, of the seeds that have both epochs and stream."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for path in sorted(Path(args.out).glob(file_of("*", 0, args).name.replace("-0-*", "-*-*"))):
        one = json.loads(path.read_bytes())
        gains = {f"{name} gain": one["after"][name] - one["before"][name] for name in ("knn", "ridge")}
        flat = {"steps": one["steps"], "learnt": one["learnt"], "untrained k-NN": one["before"]["knn"], "k-NN": one["after"]["knn"]}
        found.setdefault(one["seed"], {})[one["arm"]] = flat | gains | {"cpu_s": one["cpu_s"], "last loss": one["loss"][-1]}
    return [arms for _, arms in sorted(found.items()) if {"epochs", "stream"} <= set(arms)]


def table(seeds: list[dict[str, dict[str, float]]], args: argparse.Namespace) -> str:
    """Mean (least - most) of the seeds; and the score."""
    told = ", ".join(f"{name} {getattr(args, name)}" for name in SETTINGS)
    lines = [f"{told}: mean (least - most) of {len(seeds)} seeds"]
    for arm in ARMS:
        rows = [arms[arm] for arms in seeds if arm in arms]
        if not rows:
            continue
        cells = [f"{name} {_spread([row[name] for row in rows])}" for name in rows[0]]
        lines.append(f"{arm:7}" + " | ".join(cells))
    for arms in seeds:
        assert arms["epochs"]["steps"] == arms["stream"]["steps"] and arms["epochs"]["learnt"] == arms["stream"]["learnt"], (
            "unequal updates"
        )
    for name in ("knn gain", "ridge gain"):
        stream, epochs = ([arms[arm][name] for arms in seeds] for arm in ("stream", "epochs"))
        share = f"{100 * sum(stream) / sum(epochs):.1f} %" if sum(epochs) > 0 else "nothing to compare: epochs gained nothing, not"
        points = [a - b for a, b in zip(stream, epochs, strict=True)]
        lines.append(f"stream's {name} is {share} of epochs' (of the means); stream less epochs, in points: {_spread(points)}")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} - {max(values):.1f})"


def main(args: argparse.Namespace) -> None:
    if args.images % args.round or args.round % args.batch:
        raise SystemExit(
            f"--images must be whole rounds, and --round whole batches: try --images {25 * 3 * args.batch} --round {3 * args.batch}"
        )
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            path = file_of(arm, seed, args)
            if not path.exists():
                durable.write(path, json.dumps(run(arm, seed, args), indent=1).encode())
            print(path.name, path.read_text().replace("\n", ""), flush=True)
    seeds = joined(args)
    print(f"\n{table(seeds, args)}" if seeds else f"\nno seed has both epochs and stream in {args.out} yet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", default="runs/streaming", help="folder of the JSON files")
    parser.add_argument("--images", type=int, default=9600, help="different ones")
    parser.add_argument("--epochs", type=int, default=8, help="times that an image is learnt from, on average")
    parser.add_argument("--capacity", type=int, default=2048, help="of the stream's reservoir")
    parser.add_argument("--round", type=int, default=384, help="fresh images in a round, and in a shard: whole batches")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bank", type=int, default=10000)
    parser.add_argument("--test", type=int, default=10000)
    parser.add_argument("--norm", choices=("bn", "gn_ws"), default="bn")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments)
