"""What reaches a learner from outside, each bound to one step: orders, results of the probe, refreshes, drift.

  1. put      train/commands/<n>.json, if absent      `streamlearn train lr`, from anywhere (contract/orders.py)
  2. see      a thread of the learner looks every few seconds; at generations/, results and the drift watch too
  3. put      train/inputs/<m>.json, with the step    between two steps                <- THE COMMIT POINT
  4. take     it is in force before that step
  5. tell     history
  6. count    m is in the state, and so in the next checkpoint

Killed after   what is left                                 who mends it
  1, 2         an order that nobody has taken               the learner takes it when it comes back
  3, 4, 5      an input that is newer than the checkpoint   the next start goes on from the checkpoint, and takes the input before the very
                                                            same step: the sequence is that of a run that was never killed
  6            nothing

So each is taken exactly once in the sequence that the weights have been through.  A rollback settles those of the steps it passes over
(rollback.py).  A learner is alone in its home, so only one writes inputs.  A put whose reply is lost is done again with a later step; the learner had
not taken it before, so nothing was learnt under it.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamlearn.contract.errors import Corrupt, Retryable
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.orders import input_key, read_input, read_order
from streamlearn.contract.status import now
from streamlearn.learn.state import TrainState

GENERATIONS = "generations/"
LOOK_S = 5.0  # between looks
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """What the drift watch last said of a source."""

    distance: float
    threshold: float  # without drift the distance is at most this


@dataclass(frozen=True)
class Sources:
    """Where inputs come from, besides the store.  Both may raise Retryable."""

    probe: Callable[[int], list[tuple[int, float]]] = lambda after: []  # (step, error 0-1) of snapshots after a step, as far as measured
    drift: Callable[[], Mapping[str, Window]] = dict  # by source


class Inputs:
    def __init__(self, store: ObjectStore, state: TrainState, sources: Sources, *, look_s: float = LOOK_S):
        """Raises Retryable, Corrupt: what was taken after the checkpoint must be known before it goes on."""
        self.store, self.sources, self.look_s = store, sources, look_s
        self.again: list[dict[str, Any]] = []  # taken after the checkpoint by a run that was killed
        number = state.inputs.get("count", 0)
        seen = state.inputs
        while (found := read_input(store, number := number + 1)) is not None:
            self.again.append(found)
            seen = counted(seen, found)
        self.seen = seen  # of the thread's
        self._news: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self._kept: dict[str, Any] | None = None  # seen, and not committed yet
        self._not_before = 0.0  # monotonic
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="inputs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def take(self, state: TrainState) -> list[dict[str, Any]]:
        """Put in force what is to be before the step that comes: what was taken, for the history.  Raises what the thread met."""
        taken = []
        while self.again and self.again[0]["step"] <= state.step:
            taken.append(in_force(state, self.again.pop(0)))
        while not self.again and (fact := self._next()) is not None:
            entry = {"step": state.step, "at": now(), **fact}
            try:
                self.store.put(input_key(state.inputs.get("count", 0) + 1), json.dumps(entry).encode())
            except Retryable as e:
                logger.warning("an input of step %d is kept back: %s", state.step, e)
                self._not_before = time.monotonic() + e.after_s
                break
            self._kept = None
            taken.append(in_force(state, entry))
        return taken

    def look(self) -> None:
        """Step 2, once.  Raises Retryable."""
        for fact in self._found():
            self.seen = counted(self.seen, fact)
            self._news.put(fact)

    def _found(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        number = self.seen.get("command", 0)
        try:
            while (order := read_order(self.store, number := number + 1)) is not None:
                found.append({"kind": "command", "number": number, "action": order.action, "value": order.value, "by": order.by}
                             | {"reason": order.reason})  # fmt: skip
        except Corrupt as e:
            found.append({"kind": "refused", "number": number, "why": str(e)})
        known = self.seen.get("generations", [])
        names = [key.removeprefix(GENERATIONS).removesuffix(".json") for key in self.store.list(GENERATIONS)]
        found += [{"kind": "refresh", "generation": name} for name in names if name not in known]
        for source, window in sorted(self.sources.drift().items()):
            # from the last distance that was heeded, not from the first window: a source that has changed for good is heeded once
            if abs(window.distance - self.seen.get("drift", {}).get(source, 0.0)) > window.threshold:
                found.append({"kind": "drift", "source": source, "distance": window.distance})
        return found + [{"kind": "probe", "of": step, "error": error} for step, error in self.sources.probe(self.seen.get("probe", 0))]

    def _next(self) -> dict[str, Any] | None:
        if self._kept is None and not self._news.empty():
            fact = self._news.get()
            if isinstance(fact, BaseException):
                raise fact
            self._kept = fact
        return self._kept if time.monotonic() >= self._not_before else None

    def _run(self) -> None:
        while not self._stop.is_set():
            wait = self.look_s
            try:
                self.look()
            except Retryable as e:
                logger.warning("orders and results are out of reach: %s", e)
                wait = max(wait, e.after_s)
            except BaseException as e:  # handed to the training thread by take()
                self._news.put(e)
                return
            self._stop.wait(wait)


def in_force(state: TrainState, entry: dict[str, Any]) -> dict[str, Any]:
    """Step 4 and 6; `entry`.  Of many ranks on every one, as the first tells it."""
    state.inputs = counted(state.inputs, entry) | {"count": state.inputs.get("count", 0) + 1}
    kind = entry["kind"]
    if kind == "command":
        state.policy.command(entry["action"], entry["value"], state.step)
    elif kind == "refresh":
        state.policy.restart(state.step, f"generation {entry['generation']} was cut")
    elif kind == "drift":
        state.policy.restart(state.step, f"the content of source {entry['source']} has changed")
    elif kind == "probe":
        state.policy.probe(entry["of"], entry["error"])
    return entry


def settle(store: ObjectStore, state: TrainState) -> None:
    """Take at once what was taken after the checkpoint: by a rollback, which passes over the steps it belonged to.  Raises Retryable, Corrupt."""
    while (entry := read_input(store, state.inputs.get("count", 0) + 1)) is not None:
        in_force(state, entry)


def counted(seen: Mapping[str, Any], fact: Mapping[str, Any]) -> dict[str, Any]:
    """`seen` with one more: how far each kind has been heeded."""
    kind = fact["kind"]
    if kind in ("command", "refused"):
        return {**seen, "command": fact["number"]}
    if kind == "refresh":
        return {**seen, "generations": [*seen.get("generations", []), fact["generation"]]}
    if kind == "drift":
        return {**seen, "drift": {**seen.get("drift", {}), fact["source"]: fact["distance"]}}
    return {**seen, "probe": max(seen.get("probe", 0), fact["of"])}
