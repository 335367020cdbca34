"""What goes wrong while a learner is left alone, on purpose: is it found, undone, survived, and what does it cost?

    python -m bench.faults --seeds 0 1 2                the figures for LOG.md; about two CPU minutes an arm and seed
    python -m bench.faults --arms none --seeds 0 1 2 3 4 5 6 7      false alarms: how near a run without fault comes to each sign
    python -m bench.faults --seeds 0 --steps 60 --at 30 --burst 12 --batch 16 --bank 60 --test 60 --looks 1         whether it runs

The role `train` itself (learn/run.py) on CIFAR-10 as a stream, with checkpoints, orders, guards and published snapshots.  From step --at on:

    none      nothing
    nan       a pixel of every batch is NaN: a broken decoder, a broken device
    noise     --burst steps of images of random pixels: a broken source
    constant  --burst steps of one gray image: a site that serves the same placeholder for everything
    pairs     --burst steps of pairs whose second view is another image's: what label noise is to SwAV, whose label is the other view's code
    lr        an order of --factor times the rate
    overflow  an order of a rate whose first update breaks the weights: its own loss and gradient were finite

Printed for each arm: whether a rollback came, how many steps after the fault began, the checkpoint it went back to, steps skipped, the rate's halvings,
and k-NN of the last published snapshot less that of the run without fault after as many sound steps (taken, learnt and not undone).

Each (seed, arm) is one JSON file in --out, not made again.
"""

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from prometheus_client import CollectorRegistry

from bench.correlated import labelled
from bench.shards import open_home, publish
from bench.streaming import jpegs, judged, learner
from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.durable import read_lines
from streamlearn.contract.export import Export
from streamlearn.contract.metrics import SIGNS, LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.orders import Order, input_key, send
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.inputs import Sources
from streamlearn.learn.model import Model
from streamlearn.learn.rollback import GivenUp
from streamlearn.learn.run import run_train
from streamlearn.probes.banks import Split
from streamlearn.stream.loader import Batch, Stream

ARMS = ("none", "nan", "noise", "constant", "pairs", "lr", "overflow")
SETTINGS = ("steps", "at", "burst", "factor", "fresh", "capacity", "round", "batch", "bank", "test", "checkpoint", "snapshot", "looks")


class Faulty:
    """The stream, whose batches from one step on are spoilt; it knows the step by the place in the stream, which a rollback goes back to."""

    def __init__(self, stream: Stream, arm: str, args: argparse.Namespace, steps: dict[tuple[int, int], int], state: dict[str, Any] | None):
        self.stream, self.arm, self.args, self.steps = stream, arm, args, steps
        self.step = steps[state["round"], state["place"]] if state else 0

    def batches(self) -> Iterator[Batch | None]:
        for batch in self.stream.batches():
            yield batch if batch is None else self.spoilt(batch)

    def spoilt(self, batch: Batch) -> Batch:
        step = self.step

        def taken(features_BD: torch.Tensor | None) -> dict[str, Any]:
            state = batch.taken(features_BD)
            self.step = self.steps[state["round"], state["place"]] = step + 1
            return state

        crops = tuple(crop.clone() for crop in batch.crops)
        if self.args.at <= step < self.args.at + self.args.burst:
            if self.arm == "nan":
                crops[0][0, 0, 0, 0, 0] = math.nan
            elif self.arm == "pairs":
                crops[0][1] = crops[0][1].roll(1, 0)
        return dataclasses.replace(batch, crops=crops, taken=taken)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def garbage(arm: str, count: int, seed: int) -> list[bytes]:
    rng, made = np.random.default_rng([seed, 2]), []
    for _ in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) if arm == "noise" else np.full((32, 32, 3), 128, np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=95)
        made.append(out.getvalue())
    return made


def images_of(arm: str, seed: int, args: argparse.Namespace) -> list[bytes]:
    """In the order in which they are learnt; whole rounds are spoilt."""
    a_step = round(args.batch * args.fresh)
    images = jpegs(args.steps * a_step, seed)
    if arm in ("noise", "constant"):
        first, count = args.at * a_step, args.burst * a_step
        images[first : first + count] = garbage(arm, count, seed)
    return images


def config_of(seed: int, args: argparse.Namespace) -> Config:
    config = learner(args, seed, args.fresh)
    train = {"max_steps": args.steps, "checkpoint_steps": args.checkpoint, "snapshot_steps": args.snapshot, "guard_looks": args.looks}
    return config.model_copy(update={"train": config.train.model_copy(update=train | {"bn_images": 512})})


def order(arm: str, store: FolderStore, config: Config, args: argparse.Namespace) -> None:
    """As a learner leaves it that took it before that step and was killed: the step is certain, whatever the time a step takes."""
    rate = config.train.optim.lr * args.factor if arm == "lr" else 1e38
    number = send(store, Order("set", rate, by="ann@desk"))
    told = {"step": args.at, "at": "", "kind": "command", "number": number, "action": "set", "value": rate, "by": "ann@desk", "reason": ""}
    store.put(input_key(number), json.dumps(told).encode())


@functools.cache
def splits_of(seed: int, bank: int, test: int) -> tuple[Split, Split]:
    return labelled("cifar10-train.parquet", bank, 1000 + seed), labelled("cifar10-test.parquet", test, 1000 + seed)


def run(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    config, began, stop = config_of(seed, args), time.process_time(), threading.Event()
    splits = splits_of(seed, args.bank, args.test)
    exports, steps, given_up = dict[int, Export](), dict[tuple[int, int], int](), ""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        publish(home, images_of(arm, seed, args), "jpg", a_shard=args.round)
        catalog, store = open_home(home)
        if arm in ("lr", "overflow"):
            order(arm, store, config, args)

        def opened(state: dict[str, Any] | None) -> Any:
            stream = Stream(config.stream, catalog, store, home / "cache", batch=args.batch, state=state, stop=stop)
            return Faulty(stream, arm, args, steps, state)

        def shelf(export: Export) -> tuple[str, str]:
            exports[export.step] = export
            return str(export.step), "sha256:none"

        told = LearnerMetrics(CollectorRegistry()), Heartbeat(home, "train", period_s=0)
        skipped = bad = 0
        try:
            state = run_train(config, opened, store, shelf, *told, stop=stop, sources=Sources())
            skipped, bad = state.skipped, state.bad_steps
        except GivenUp as e:
            given_up = str(e)
        history = list(read_lines(home / "history" / "train.jsonl"))
    model = Model(config.model)
    found = {}
    for step, export in exports.items():
        if arm == "none" or step == max(exports):
            model.trunk.load_state_dict(export.weights)
            found[str(step)] = judged(model.trunk, splits, config)
    return {
        "seed": seed,
        "arm": arm,
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "rollbacks": [{k: e[k] for k in ("step", "to", "halved", "why")} for e in history if e.get("event") == "rollback"],
        "withheld": [e["step"] for e in history if e.get("event") == "snapshot_withheld"],
        "given_up": given_up,
        "skipped": skipped,
        "bad": bad,
        "found": found,
        "looks": [{k: e.get(k) for k in ("step", "loss", "lr", "signs", "looked")} for e in history if "grad_norm" in e],
        "cpu_s": round(time.process_time() - began),
    }


def file_of(arm: str, seed: int, args: argparse.Namespace) -> Path:
    settings = json.dumps({name: getattr(args, name) for name in SETTINGS}, sort_keys=True)
    return Path(args.out) / f"faults-{hashlib.sha256(settings.encode()).hexdigest()[:8]}-{seed}-{arm}.json"


def summary(one: dict[str, Any], clean: dict[str, Any], args: argparse.Namespace) -> str:
    """A run in a line."""
    step, after = max((int(step), found["knn"]) for step, found in one["found"].items())
    sound = step - one["skipped"] - one["bad"]
    nearest = min(clean["found"], key=lambda s: abs(int(s) - sound))
    told = [
        f"{r['step'] - args.at:+} steps: back to {r['to'] - args.at:+}{', halved' if r['halved'] else ''} ({r['why'].split('.')[0]})"
        for r in one["rollbacks"]
    ]
    ended = f"; GAVE UP: {one['given_up']}" if one["given_up"] else ""
    difference = f"{after - clean['found'][nearest]['knn']:+.1f} of the run without fault at step {nearest}"
    return (
        f"{'; '.join(told) or 'no rollback'}; {one['skipped']} skipped, {one['bad']} bad; k-NN {after:.1f} at {step}, {difference}{ended}"
    )


def nearest_signs(runs: list[dict[str, Any]]) -> Iterator[str]:
    """How near runs without fault come to each sign, once they were well."""
    for sign in SIGNS:
        values = [look["looked"][sign] for one in runs for look in one["looks"] if look["looked"] and look["looked"]["well"]]
        there = sum(sign in look["signs"] for one in runs for look in one["looks"] if look["looked"] and look["looked"]["well"])
        if values:
            yield f"{sign:10} {there} of {len(values)} looks; least {min(values):.3f}, median {statistics.median(values):.3f}, most {max(values):.3f}"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    made: dict[tuple[int, str], dict[str, Any]] = {}
    for seed in args.seeds:
        for arm in args.arms:
            path = file_of(arm, seed, args)
            if not path.exists():
                durable.write(path, json.dumps(run(arm, seed, args), indent=1).encode())
            made[seed, arm] = json.loads(path.read_bytes())
            clean = file_of("none", seed, args)
            if clean.exists() and made[seed, arm]["found"]:
                print(f"seed {seed} {arm:9}{summary(made[seed, arm], json.loads(clean.read_bytes()), args)}", flush=True)
    runs = [one for (_, arm), one in made.items() if arm == "none"]
    print(f"{len(runs)} runs without fault: {sum(len(one['rollbacks']) for one in runs)} rollbacks, "
          f"{sum(len(one['withheld']) for one in runs)} snapshots withheld", *nearest_signs(runs), sep="\n")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", default="runs/faults", help="folder of the JSON files")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--at", type=int, default=100, help="step before which the fault begins")
    parser.add_argument("--burst", type=int, default=70, help="steps")
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--fresh", type=float, default=1.0, help="share of fresh images; below 1 the burst enters the reservoir")
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--round", type=int, default=640, help="fresh images in a round, and in a shard")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--bank", type=int, default=4000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--checkpoint", type=int, default=15, help="steps between checkpoints")
    parser.add_argument("--snapshot", type=int, default=15)
    parser.add_argument("--looks", type=int, default=5, help="train.guard_looks")
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
