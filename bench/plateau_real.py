"""A rate that is never told when it will be stopped, against cosines that are, on real images: CIFAR-10 as a stream with replay.

    python -m bench.plateau_real --seeds 0 1 2          the figures for LOG.md; hours on a core, so a file for each run (see below)
    python -m bench.plateau_real --seeds 0 --images 512 --round 128 --batch 64 --bank 300 --test 300 --peaks 0.3        whether it runs

    plateau   warm-up, constant, halved on proved plateau: one run, looked at where each cosine ends
    cosine    for each of four stops (1/8, 1/4, 1/2 and all of the stream) a run of its own to that very step, at every peak of --peaks

All learn the same images in the same order from the same start.  Compared is k-NN (k = 20, T = 0.07) on the same bank and test images: of plateau the
average that is published, of the cosines the best of all peaks, and the better of their last weights and their average: a cosine that is tuned on the
very figure that is compared.  The goal is a difference of at most a point at each stop, in the mean of the seeds.

Each run is one JSON file in --out and not made again: runs may be shared out with --runs, and are joined by a last call with --seeds and nothing after it.
"""

import argparse
import hashlib
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.correlated import labelled
from bench.shards import open_home, publish
from bench.streaming import CALIBRATION, jpegs, judged, learner
from streamlearn.contract import durable
from streamlearn.contract.config import Config, OptimConfig, PlateauConfig
from streamlearn.learn.ema import calibrated
from streamlearn.learn.lr_policy import HalveOnPlateau
from streamlearn.learn.state import TrainState, fresh_state
from streamlearn.learn.trainer import Step, train
from streamlearn.stream.decode import decode
from streamlearn.stream.loader import Batch, Stream
from streamlearn.stream.views import eval_crop, normalised

SETTINGS = ("images", "fresh", "capacity", "round", "batch", "bank", "test", "block", "lr")
PARTS = (8, 4, 2, 1)  # of the whole stream, at the stops


class Cosine(HalveOnPlateau):
    """To zero at a step that is known."""

    def __init__(self, optim: OptimConfig, plateau: PlateauConfig, stop: int):
        super().__init__(optim, plateau)
        self.stop = stop

    def rate(self, step: int) -> float:
        return super().rate(step) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.stop)))

    def observe(self, loss: float, step: int) -> bool:
        self.changed_at = step + 1  # its rate never stands: the average's horizon stays at its least
        return False


def stops(args: argparse.Namespace) -> list[int]:
    """Steps."""
    total = args.images // args.round * math.ceil(args.round / args.fresh / args.batch)
    return [total // part for part in PARTS]


def config_of(args: argparse.Namespace, seed: int, lr: float) -> Config:
    config = learner(args, seed, args.fresh)
    train = config.train.model_copy(
        update={"optim": config.train.optim.model_copy(update={"lr": lr}), "plateau": PlateauConfig(block_steps=args.block)}
    )
    return config.model_copy(update={"train": train})


def run(name: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """`name`: plateau, or cosine-<stop>-<peak>."""
    kind, _, told = name.partition("-")
    stop, peak = (int(told.split("-")[0]), float(told.split("-")[1])) if told else (stops(args)[-1], args.lr)
    config, began = config_of(args, seed, peak), time.process_time()
    images = jpegs(args.images, seed)
    splits = labelled("cifar10-train.parquet", args.bank, 1000 + seed), labelled("cifar10-test.parquet", args.test, 1000 + seed)
    pixels = np.stack([eval_crop(decode(data), 32) for data in images[:CALIBRATION]])
    calibration = normalised(torch.from_numpy(pixels), config.stream.mean, config.stream.std)
    state, losses, found = fresh_state(config), list[float](), dict[str, dict[str, float]]()
    if kind == "cosine":
        state.policy = Cosine(config.train.optim, config.train.plateau, stop)

    def look(state: TrainState, step: Step) -> None:
        losses.append(step.loss)
        if state.step == stop or (kind == "plateau" and state.step in stops(args)):
            for part, trunk in (("average", state.ema.model.trunk), ("weights", state.model.trunk)):
                found[f"{part} at {state.step}"] = judged(calibrated(trunk, calibration), splits, config)

    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder), images, "jpg", a_shard=args.round)
        stream = Stream(
            config.stream, *open_home(Path(folder)), Path(folder) / "cache", batch=args.batch, state=None, stop=threading.Event()
        )

        def batches() -> Iterator[Batch]:
            for batch in stream.batches():
                if batch is not None:
                    yield batch
                if state.step >= stop:
                    return

        train(state, batches(), [look])
        stream.close()
    return {
        "run": name,
        "seed": seed,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "found": found,
        "halvings": state.policy.halvings,
        "loss": [round(statistics.mean(losses[i : i + 50]), 4) for i in range(0, len(losses), 50)],
        "cpu_s": round(time.process_time() - began),
    }


def runs(args: argparse.Namespace) -> list[str]:
    return ["plateau", *(f"cosine-{stop}-{peak}" for stop in stops(args) for peak in args.peaks)]


def file_of(name: str, seed: int, args: argparse.Namespace) -> Path:
    settings = json.dumps({name: getattr(args, name) for name in SETTINGS}, sort_keys=True)
    return Path(args.out) / f"plateau-{hashlib.sha256(settings.encode()).hexdigest()[:8]}-{seed}-{name}.json"


def compared(args: argparse.Namespace) -> Iterator[str]:
    """Lines of the table, of the seeds of which all runs are there."""
    by_seed: dict[int, dict[str, dict[str, dict[str, float]]]] = {}
    for path in sorted(Path(args.out).glob(file_of("*", 0, args).name.replace("-0-*", "-*-*"))):
        one = json.loads(path.read_bytes())
        by_seed.setdefault(one["seed"], {})[one["run"]] = one["found"]
    whole = {seed: found for seed, found in sorted(by_seed.items()) if set(runs(args)) <= set(found)}
    yield f"{len(whole)} seeds: {', '.join(map(str, whole)) or 'none is complete'}"
    for stop in stops(args) if whole else ():
        ours = [found["plateau"][f"average at {stop}"]["knn"] for found in whole.values()]
        bare = [found["plateau"][f"weights at {stop}"]["knn"] for found in whole.values()]
        best = [
            max(found[f"cosine-{stop}-{peak}"][f"{part} at {stop}"]["knn"] for peak in args.peaks for part in ("average", "weights"))
            for found in whole.values()
        ]
        differences = [a - b for a, b in zip(ours, best, strict=True)]
        means = f"plateau's average {statistics.mean(ours):.2f}, its weights {statistics.mean(bare):.2f}, best cosine {statistics.mean(best):.2f}"
        spread = f"{statistics.mean(differences):+.2f} ({min(differences):+.2f} to {max(differences):+.2f})"
        yield f"stopped at {stop:>6}: {means}; difference {spread}: {'within a point' if statistics.mean(differences) >= -1 else 'MISSED'}"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.runs or runs(args):
            path = file_of(name, seed, args)
            if not path.exists():
                durable.write(path, json.dumps(run(name, seed, args), indent=1).encode())
            print(path.name, path.read_text().replace("\n", ""), flush=True)
    print("\n".join(compared(args)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="*", help="plateau, cosine-<stop>-<peak>; all of them")
    parser.add_argument("--out", default="runs/plateau", help="folder of the JSON files")
    parser.add_argument("--images", type=int, default=49920)
    parser.add_argument("--fresh", type=float, default=0.125, help="share of fresh images")
    parser.add_argument("--capacity", type=int, default=8192)
    parser.add_argument("--round", type=int, default=384)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bank", type=int, default=10000)
    parser.add_argument("--test", type=int, default=10000)
    parser.add_argument("--block", type=int, default=25, help="train.plateau.block_steps")
    parser.add_argument("--lr", type=float, default=0.3, help="plateau's")
    parser.add_argument("--peaks", type=float, nargs="*", default=[0.15, 0.3, 0.6])
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
