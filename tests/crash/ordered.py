"""A learner that an order reaches, and that ends itself with SIGKILL at a named place: run by test_orders_killed.py in a process of its own.

python -m tests.crash.ordered HOME END PLACE ...      one life a place, the last without one; prints how each ended
"""

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.orders import Order, send
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.inputs import Sources
from streamlearn.learn.run import run_train
from tests.learn.test_run import Shelf
from tests.learn.world import PlainStream, small_config


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(FolderStore):
    """`place`: before or after, and what the key begins with; or `step N`, which is the stream's."""

    place = ""

    def put(self, key, data):
        self._at("before", key)
        super().put(key, data)
        self._at("after", key)

    def put_if_absent(self, key, data):
        self._at("before", key)
        done = super().put_if_absent(key, data)
        self._at("after", key)
        return done

    def _at(self, when, key):
        if self.place and f"{when} {key}".startswith(self.place):
            die()


class Doomed(PlainStream):
    """Ends the process once step N is taken: asked for the next batch."""

    store = None

    def batches(self):
        for batch in super().batches():
            yield batch
            if self.store.place == f"step {batch.state['place'] if batch else 0}":
                die()


def live(home, end, place):
    store, stop = Deadly(Path(home) / "store"), threading.Event()
    store.place = place

    def opened(state):
        stream = Doomed(state, end, stop)
        stream.store = store
        return stream

    if not FolderStore(store.root).list("train/commands/"):
        send(store, Order("halve", by="ann@desk"))
    told = LearnerMetrics(CollectorRegistry()), Heartbeat(Path(home), "train", period_s=0)
    config = small_config(checkpoint_steps=3, snapshot_steps=1000, bn_images=8, max_steps=end)
    run_train(config, opened, store, Shelf(), *told, stop=stop, sources=Sources())


def main(home, end, places):
    torch.set_num_threads(1)
    for place in [*places, ""]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(home, end, place)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        print(f"{place}: {'killed' if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
