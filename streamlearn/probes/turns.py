"""Learning comes first: when the evaluator may use the machine.

* On a CPU it runs at a lower priority (nice 5) and on `probe.threads` threads.
* On a GPU that a learner of this home learns on too, it takes turns: after a forward batch of t seconds it leaves the device alone for
  t (1 - share) / share seconds, so that it has at most `probe.device_share` of the time; the learner never waits for more than one batch.
  A learner that waits for data, that has not been heard of for a minute, or that learns on another device, is left nothing.

The two are two processes, which a GPU serves in slices of time; stream priorities order work inside one process only, and no lock is taken, so a
learner never depends on an evaluator that hangs.  `stop` is looked at before each batch and each step of a fit: a measurement that is cut short is made again.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from streamlearn.contract.status import read_status

SILENT_S = 60.0  # a learner whose heartbeat is older is not learning


class Stopped(Exception):
    """The role is asked to end; what was being measured is measured again next time."""


class Turns:
    """One a process; `with turns.turn():` around each forward batch."""

    def __init__(
        self,
        share: float,
        *,
        busy: Callable[[], bool],
        wait: Callable[[float], bool],
        clock: Callable[[], float] = time.monotonic,
        finish: Callable[[], None] = lambda: None,
    ):
        self.share, self.busy, self.wait, self.clock, self.finish = share, busy, wait, clock, finish
        self.yielded_s = 0.0

    def check(self) -> None:
        """Raises Stopped."""
        if self.wait(0):
            raise Stopped

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Raises Stopped."""
        self.check()
        began = self.clock()
        yield
        if not self.busy():
            return
        self.finish()  # a GPU's work is only queued when the call returns
        pause = (self.clock() - began) * (1 - self.share) / self.share
        self.yielded_s += pause
        self.wait(pause)


def alone() -> Turns:
    """Nobody to yield to, nobody to stop for."""
    return Turns(1.0, busy=lambda: False, wait=lambda _: False)


def turns_of(home: Path, device: str, learner: str, share: float, stop: threading.Event) -> Turns:
    """For `device`, with a learner on the device `learner`."""
    if not same_device(device, learner):
        return Turns(1.0, busy=lambda: False, wait=stop.wait)
    return Turns(share, busy=lambda: learning(home), wait=stop.wait, finish=lambda: torch.cuda.synchronize(device))


def same_device(one: str, other: str) -> bool:
    """Whether both are one GPU; `cuda` is cuda:0."""
    a, b = torch.device(one), torch.device(other)
    return a.type == b.type != "cpu" and (a.index or 0) == (b.index or 0)


def learning(home: Path) -> bool:
    """By the heartbeat of the role `train`."""
    beat = read_status(home).get("train", {})
    if beat.get("state") != "learning":
        return False
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(beat["at"])).total_seconds() < SILENT_S
    except (KeyError, ValueError):
        return False
