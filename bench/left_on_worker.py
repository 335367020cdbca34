"""One rank of the learner that bench.left_on leaves on: the real role and stream, on a store that can be full or be the last thing a process touches.

`python -m torch.distributed.run … -m bench.left_on_worker HOME`; without torchrun: one process.
It ends once HOME/orders/end names a number of samples and so many were fresh.

What it is ordered to suffer lies as files in HOME/orders: `full`: every put finds the disk full, as long as the file lies there; `die-KIND-WHEN-RANK`:
that rank is killed, once, when it puts that kind of a checkpoint's object, before, in the middle (half of the bytes are written), or after.
What it has learnt stands in HOME/journal/RANK.jsonl: a line for each start and for each step, with the numbers that the images spell (bench.passes).
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from bench import passes
from bench.shards import open_home
from streamlearn.contract import durable
from streamlearn.contract.config import Config, CropConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from streamlearn.contract.errors import NotFound
from streamlearn.contract.export import Export
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import POINTER, FolderStore, ObjectStore
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.inputs import Sources
from streamlearn.learn.ranks import Ranks, joined, meeting
from streamlearn.learn.run import run_train
from streamlearn.stream.audit import audit
from streamlearn.stream.loader import Batch, Stream

KINDS = ("part", "rest", "json", "latest")  # of a checkpoint's objects (learn/sharded.py); all but the parts are the first rank's
WHEN = ("before", "mid", "after")
EVERY, PUBLISHED = 5, 20  # steps between checkpoints, and between snapshots
CONFIG = Config(
    stream=passes.CONFIG.model_copy(update={"crops": (CropConfig(count=2, size=16, scale=(0.5, 1.0)),), "workers": 0}),
    model=ModelConfig(backbone="regnety-tiny", head=(16, 8)),
    objective=ObjectiveConfig(prototypes=6, queue=80, freeze_prototypes=2, epsilon=0.05),
    train=TrainConfig(
        batch=passes.BATCH,
        threads=1,
        optim=OptimConfig(kind="lars", lr=0.5, warmup_steps=3),
        checkpoint_steps=EVERY,
        snapshot_steps=PUBLISHED,
        bn_images=16,
        guard_looks=0,  # images of one colour each: there is not much in them
        ranks_timeout_s=300.0,
    ),
)  # without workers of the stream: a start costs three imports of torch less, and their deaths are bench.passes' affair


class TroubledStore(FolderStore):
    """Does as it is ordered."""

    def __init__(self, home: Path, rank: int):
        super().__init__(home / "store")
        self.orders, self.rank, self.events = home / "orders", rank, home / "events.txt"

    def put(self, key: str, data: bytes) -> None:
        self._room(key, data)
        kind = ("latest" if key == POINTER else key.rpartition(".")[2]) if key.startswith("checkpoints/") else ""
        if self._ordered(kind, "mid"):
            path = self._path(key)
            path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp").write_bytes(data[: len(data) // 2])
            self._die()
        if self._ordered(kind, "before"):
            self._die()
        super().put(key, data)
        if self._ordered(kind, "after"):
            self._die()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._room(key, data)
        return super().put_if_absent(key, data)

    def _room(self, key: str, data: bytes) -> None:
        if (self.orders / "full").exists():
            durable.append_line(self.events, f"full {key}")
            try:
                Path("/dev/full").write_bytes(data)  # the kernel's own word for it
            except OSError as e:
                raise durable.translate(e, self._path(key)) from e

    def _ordered(self, kind: str, when: str) -> bool:
        order = self.orders / f"die-{kind}-{when}-{self.rank}"
        if not kind or not order.exists():
            return False
        order.unlink()
        return True

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Noted(Stream):
    """The stream, which also writes down what is learnt of it, and tells the learner to stop once everything was fresh."""

    def __init__(self, home: Path, store: ObjectStore, state: dict[str, Any] | None, ranks: Ranks, stop: threading.Event):
        catalog, _ = open_home(home)
        cache = home / "cache"
        super().__init__(
            CONFIG.stream, catalog, store, cache, batch=CONFIG.train.batch, state=state, stop=stop, rank=ranks.rank, ranks=ranks.world
        )
        self.journal, self.end = home / "journal" / f"{ranks.rank}.jsonl", home / "orders" / "end"
        self.step = audit(CONFIG.stream, store, state).batches if state else 0
        self.note(start=self.step, newest=newest(store), ranks=ranks.world)

    def batches(self) -> Iterator[Batch | None]:
        for batch in super().batches():
            if batch is None and self.end.exists() and self.ahead.learnt.fresh >= int(self.end.read_text()):
                self.stop.set()
            yield batch if batch is None else dataclasses.replace(batch, taken=partial(self.learnt, batch))

    def learnt(self, batch: Batch, features_BD: Tensor | None = None) -> dict[str, Any]:
        state = batch.taken(features_BD)
        self.note(step=self.step, numbers=passes.numbers(batch.crops[0]), fresh=[int(new) for new in batch.fresh])
        self.step += 1
        return state

    def note(self, **what: Any) -> None:
        durable.append_line(self.journal, json.dumps(what))


def newest(store: ObjectStore) -> int:
    """Step of the newest checkpoint; 0 where there is none."""
    try:
        return int(json.loads(store.get(POINTER))["checkpoints"][0]["step"])
    except NotFound:
        return 0


def main(home: Path) -> None:
    torch.set_num_threads(1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def publish(export: Export) -> tuple[str, str]:
        digest = hashlib.sha256(b"".join(w.numpy().tobytes() for _, w in sorted(export.weights.items()))).hexdigest()
        durable.append_line(home / "published.txt", f"{export.step} {digest}")
        return f"0.{export.step}.0", digest

    with meeting("cpu", timeout_s=CONFIG.train.ranks_timeout_s):
        ranks = joined()
        store, heart = TroubledStore(home, ranks.rank), Heartbeat(home, "train", mute=not ranks.first)
        opened = lambda state: Noted(home, store, state, ranks, stop)  # noqa: E731
        run_train(CONFIG, opened, store, publish, LearnerMetrics(CollectorRegistry()), heart, stop=stop, sources=Sources())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
