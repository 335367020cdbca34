"""The learner's role as torchrun starts it, on synthetic batches: `rank_role.py HOME END PARALLEL [SIGNAL RANK PLACE]`.

With the last three, that rank sends itself the signal, once, when it is handed that batch.  In float64 (tests/parity/learner_world.py says why).
"""

import hashlib
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from streamlearn.contract import durable
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.inputs import Sources
from streamlearn.learn.ranks import joined, meeting
from streamlearn.learn.run import run_train
from tests.learn.world import PlainStream, batch, small_config
from tests.parity.learner_world import in_float64


class PartStream(PlainStream):
    """One rank's part of each; nothing at all now and then, at other times on every rank."""

    def __init__(self, state, stop, ranks, strike, told):
        super().__init__(state, 100, stop)
        self.ranks, self.strike, self.told = ranks, strike, told

    def batches(self):
        for place in range(self.place, self.end):
            if self.stop.is_set():
                return
            if (place + self.ranks.rank) % 3 == 0:
                yield None
            self.strike(self.ranks.rank, place)
            part = batch(place).part(self.ranks.rank, self.ranks.world)
            part.crops = tuple(crop.double() for crop in part.crops)
            part.taken = partial(self.learnt, place, part.state)
            yield part

    def learnt(self, place, state, features_BD):
        durable.append_line(self.told, str(place))
        return state

    def eval_images(self, refs, size):
        return super().eval_images(refs, size).double()


def striking(home, number, rank, place):
    """Once: what comes after a restart is left alone."""

    def strike(at_rank, at_place):
        if number and (at_rank, at_place) == (rank, place) and durable.create(home / "struck", b""):
            os.kill(os.getpid(), number)

    return strike


def main(home, end, parallel, number=0, rank=0, place=0):
    torch.set_num_threads(1)
    in_float64()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    config = small_config(parallel=parallel, checkpoint_steps=2, snapshot_steps=4, bn_images=8, max_steps=end, ranks_timeout_s=120.0)
    strike, store = striking(home, number, rank, place), FolderStore(home / "store")

    def publish(export):
        digest = hashlib.sha256(b"".join(w.numpy().tobytes() for _, w in sorted(export.weights.items()))).hexdigest()
        durable.append_line(home / "published", f"{export.step} {digest}")
        return f"0.{export.step}.0", digest

    with meeting("cpu", timeout_s=config.train.ranks_timeout_s):
        ranks = joined()
        heart = Heartbeat(home, "train", period_s=0, mute=not ranks.first)
        metrics, sources = LearnerMetrics(CollectorRegistry()), Sources()
        opened = lambda state: PartStream(state, stop, ranks, strike, home / f"learnt-{ranks.rank}")  # noqa: E731
        state = run_train(config, opened, store, publish, metrics, heart, stop=stop, sources=sources)
    durable.append_line(home / "ended", f"{ranks.rank} of {ranks.world} at {state.step}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
