"""A real stream in two quarters: does the learner forget, does the gate see it, and does it let a damaged snapshot pass?

    python -m bench.quarters --images 8000 --steps 300

CIFAR-10's classes 0 to 4 come in the third quarter, 5 to 9 in the fourth; each quarter has a labelled bank of its own.  One learner goes through both,
publishes snapshots, and the evaluator measures each on both banks.  Printed: the matrix, forgetting and transfer; then what the gate says of the last
snapshot of the second quarter, and of a copy of it that was damaged (a tenth of its weights, noise), against the last of the first quarter as `stable`.
"""

import argparse
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prometheus_client import CollectorRegistry

from bench.real import DATA
from bench.shards import open_home, publish
from streamlearn.contract.config import (
    BankConfig,
    Config,
    CropConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ProbeConfig,
    SnapshotsConfig,
    StreamConfig,
    TrainConfig,
)
from streamlearn.contract.export import Export
from streamlearn.contract.metrics import EvaluatorMetrics, LearnerMetrics
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.run import run_train
from streamlearn.probes.evaluator import Evaluator
from streamlearn.probes.gate import PROMOTED, REFUSED, Verdict, judge
from streamlearn.snapshots import publish as snapshots
from streamlearn.snapshots.artifact import version
from streamlearn.snapshots.history import STABLE
from streamlearn.snapshots.promote import promote
from streamlearn.stream.loader import Stream

QUARTERS = {"2026Q3": ("2026-08-01", range(5)), "2026Q4": ("2026-11-01", range(5, 10))}


def bank(folder: Path, name: str, split: str, classes: range, count: int) -> Path:
    """A parquet of `count` images of these classes."""
    table = pq.read_table(DATA / f"cifar10-{split}.parquet", columns=["jpeg", "label"])
    held = np.flatnonzero(np.isin(np.array(table.column("label").to_pylist()), list(classes)))
    rows = np.random.default_rng(1).permutation(held)[-count:]  # the stream has the first: see `streamed`
    path = folder / f"{name}-{split}.parquet"
    pq.write_table(table.take(pa.array(rows)), path)
    return path


def streamed(classes: range, count: int) -> list[bytes]:
    table = pq.read_table(DATA / "cifar10-train.parquet", columns=["jpeg", "label"])
    held = np.flatnonzero(np.isin(np.array(table.column("label").to_pylist()), list(classes)))
    rows = np.random.default_rng(1).permutation(held)[:count]
    return [table.column("jpeg")[int(row)].as_py() for row in rows]


def config_of(home: Path, args: argparse.Namespace) -> Config:
    """learning.md, section 4: what makes SwAV learn CIFAR-10 on two cores."""
    banks = tuple(
        BankConfig(
            name=name.lower(),
            train=str(bank(home, name, "train", classes, args.bank)),
            test=str(bank(home, name, "test", classes, args.bank)),
            generation=name,
        )
        for name, (_, classes) in QUARTERS.items()
    )
    return Config(
        home=str(home),
        stream=StreamConfig(
            crops=(CropConfig(count=2, size=32, scale=(0.3, 1.0)),),
            jitter=0.4,
            blur=0.0,
            fresh_fraction=0.25,
            max_replay_per_fresh=100.0,
            reservoir=args.images * 2,
            round_samples=args.images // 4,
            workers=0,
            prefetch=1,
        ),
        model=ModelConfig(backbone="regnety-tiny", head=(512, 128)),
        objective=ObjectiveConfig(prototypes=128, epsilon=0.015, freeze_prototypes=60),
        train=TrainConfig(
            batch=128,
            ema_decay=0.99,
            checkpoint_steps=args.steps,
            snapshot_steps=max(1, args.steps // args.snapshots),
            bn_images=512,
            name="quarters",
            optim=OptimConfig(kind="sgd", lr=0.3, warmup_steps=20, weight_decay=5e-4),
        ),
        probe=ProbeConfig(banks=banks, threads=1),
        snapshots=SnapshotsConfig(promote="never"),  # here the evaluator's hand is `Loop.judge`, so that every verdict is printed
    )


class Loop:
    """Learner and evaluator on one home, one after the other."""

    def __init__(self, home: Path, config: Config):
        self.home, self.config = home, config
        self.registry = OciLayout(home / "registry")
        self.exports: dict[int, Export] = {}  # by step: a learner that starts again publishes its last snapshot again
        self.offset = 0

    def learn(self, images: list[bytes], day: str, until: int) -> None:
        publish(self.home, images, "jpg", a_shard=len(images) // 4, start=self.offset, day=day)
        self.offset += len(images)
        stop, config = (
            threading.Event(),
            self.config.model_copy(update={"train": self.config.train.model_copy(update={"max_steps": until})}),
        )

        def open_stream(state: dict[str, Any] | None) -> Stream:
            return Stream(config.stream, *open_home(self.home), self.home / "cache", batch=config.train.batch, state=state, stop=stop)

        store = open_home(self.home)[1]
        run_train(config, open_stream, store, self.publish, LearnerMetrics(CollectorRegistry()), Heartbeat(self.home, "train"), stop=stop)

    def measured(self) -> dict[str, Any]:
        """continual.json, once every snapshot is measured on every bank."""
        heart = Heartbeat(self.home, "evaluate")
        evaluator = Evaluator(self.config, self.registry, EvaluatorMetrics(CollectorRegistry()), heart, home=self.home)
        while evaluator.measure_next():
            pass
        return evaluator.overview.continual(evaluator.banks.configs())

    def judge(self, step: int) -> Verdict:
        """What the gate says of it against the present `stable`; done, if it says so."""
        names = [bank.name for bank in self.config.probe.banks]
        verdict = judge(self.registry, version(step), STABLE, self.config.snapshots.gate, banks=names)
        if verdict.outcome == PROMOTED:
            promote(self.registry, STABLE, verdict.digest, by="bench.quarters", why=verdict.why, expect=verdict.against)
        return verdict

    def publish(self, export: Export) -> tuple[str, str]:
        self.exports[export.step] = export
        return snapshots.publish(self.registry, export)


def damaged(export: Export, share: float, seed: int = 0) -> Export:
    """The same a step later, with a share of each layer's weights replaced by noise of the layer's own scale."""
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in export.weights.items():
        if weight.dim() > 1:  # not BatchNorm's, whose variances noise would make negative: that network says nothing at all
            hit = torch.rand(weight.shape, generator=g) < share
            weight = torch.where(hit, torch.randn(weight.shape, generator=g) * weight.std() + weight.mean(), weight)
        weights[name] = weight
    return replace(export, step=export.step + 1, weights=weights)


def table(matrix: dict[str, Any]) -> None:
    """A[row, column]: rows are the quarters' last snapshots, columns the quarters' banks."""
    names = matrix["generations"]
    print(f"\nk-NN accuracy, %{'':6}" + "".join(f"{name:>10}" for name in names))
    for name, row in zip(["untrained", *names], [matrix["untrained"], *matrix["matrix"]], strict=True):
        print(f"{name:22}" + "".join(f"{'-' if v is None else f'{100 * v:.2f}':>10}" for v in row))
    for measure, value in matrix["measures"].items():
        low, high = matrix["intervals"].get(measure) or (None, None)
        print(
            f"{measure:22}{'-' if value is None else f'{100 * value:+.1f}':>10}   95 %: {low and f'{100 * low:+.1f}'} .. {high and f'{100 * high:+.1f}'}"
        )


def main(args: argparse.Namespace) -> bool:
    """Whether the damaged snapshot was refused."""
    whole, verdicts = run(args)
    table(whole["probes"]["knn"])
    for row in whole["probes"]["knn"]["by_snapshot"]:
        print(
            f"step {row['step']:5} {row['generation']}: " + ", ".join(f"{bank} {100 * value:.2f}" for bank, value in row["scores"].items())
        )
    for name, step, verdict in verdicts:
        print(f"\n{name} step {step}: {verdict.outcome} for stable\n  " + "\n  ".join(verdict.reasons))
    return verdicts[-1][2].outcome == REFUSED


def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, int, Verdict]]]:
    """What the evaluator says of both quarters (continual.json), and (quarter, step, verdict) of each snapshot; the damaged one last."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        home = Path(folder)
        loop = Loop(home, config_of(home, args))
        verdicts = list[tuple[str, int, Verdict]]()
        for i, (name, (day, classes)) in enumerate(QUARTERS.items(), 1):
            loop.learn(streamed(classes, args.images), day, until=i * args.steps)
            whole = loop.measured()  # before the damaged one is there: it would be the last of its quarter
            verdicts += [(name, step, loop.judge(step)) for step in loop.exports if step > (i - 1) * args.steps]
        broken = damaged(loop.exports[max(loop.exports)], args.damage)
        loop.publish(broken)
        loop.measured()
        verdicts.append(("damaged", broken.step, loop.judge(broken.step)))
        return whole, verdicts


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000, help="of a quarter")
    parser.add_argument("--steps", type=int, default=300, help="of a quarter")
    parser.add_argument("--snapshots", type=int, default=2, help="of a quarter")
    parser.add_argument("--bank", type=int, default=4000, help="labelled images of a quarter, and as many to test")
    parser.add_argument("--damage", type=float, default=0.1, help="share of the weights that is replaced by noise")
    parser.add_argument("--scratch", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(not main(arguments().parse_args()))
