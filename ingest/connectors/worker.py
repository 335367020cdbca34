"""One thread for each connector, so that one that is slow or broken stops no other.

  state        when
  UNASSIGNED   it has not begun yet
  RUNNING      it discovers, or waits for its next look; a fault that may pass is tried again, later and later (`retrying` says which)
  PAUSED       it has stopped discovering and keeps what it holds open
  STOPPED      its thread has ended and everything is closed
  FAILED       `trace` says why.  What the user must mend (ConfigError) waits for a restart or a new configuration; anything else is tried
               again by itself, later and later, and is FAILED until it gets on

A name has one thread at a time: the successor of a changed or restarted connector begins when its predecessor has let go.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ingest.connectors.book import PAUSED, RUNNING, STOPPED, Entry
from streamlearn.contract.errors import ConfigError, Retryable, Stuck

UNASSIGNED, FAILED = "UNASSIGNED", "FAILED"
TRACE = 8000  # characters that are kept
FIRST_S = 0.5  # before the second try; doubles up to errors_retry_delay_max_s
logger = logging.getLogger(__name__)


class Polls(Protocol):
    """What a worker drives (run.Source)."""

    appended: int  # candidates so far

    def poll(self, stop: threading.Event) -> int: ...
    def close(self) -> None: ...


class Worker:
    """One connector at work."""

    def __init__(self, entry: Entry, open_source: Callable[[Entry], Polls], failed: Callable[[], None]):
        self.entry, self._open, self._count_failure = entry, open_source, failed
        self.trace = self.retrying = ""
        self.fatal: BaseException | None = None  # what the role must end of
        self._state, self._tries, self._before = UNASSIGNED, 0, 0
        self._source: Polls | None = None
        self._lock = threading.Lock()
        self._target, self._ending = entry.target, False
        self._halt, self._changed = threading.Event(), threading.Event()
        if entry.target != RUNNING:
            self._halt.set()
        self._thread = threading.Thread(target=self._main, name=f"connector {entry.config.name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def candidates(self) -> int:
        """Announced by this worker."""
        source = self._source
        return self._before + (source.appended if source else 0)

    @property
    def state(self) -> str:
        source = self._source
        return RUNNING if self._state == FAILED and source is not None and source.appended else self._state

    def aim(self, target: str) -> None:
        """RUNNING or PAUSED.  It is PAUSED once `state` says so: the batch at hand is finished first."""
        with self._lock:
            if self._ending or target == self._target:
                return
            self._target = target
            if target == RUNNING:
                self._halt.clear()
                self._state = RUNNING if self._state == PAUSED else self._state  # from now on it may discover: PAUSED would be no promise
            else:
                self._halt.set()
            self._changed.set()

    def end(self) -> None:
        """It has ended once it is not `alive`."""
        with self._lock:
            self._ending = True
            self._halt.set()
            self._changed.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _main(self) -> None:
        try:
            while not self._ending:
                wait_s = 3600.0 if self._rests() else self._round()
                if wait_s is None:
                    return
                self._changed.wait(wait_s)
                self._changed.clear()
        except BaseException as e:  # a library that hangs (Stuck), or an end from outside: the role has to know
            self.fatal = e
        finally:
            self._close()

    def _rests(self) -> bool:
        with self._lock:
            if self._target != RUNNING:
                self._state = PAUSED
            return self._target != RUNNING

    def _round(self) -> float | None:
        """Open it if need be, and let it discover.  Seconds until the next round; None: there is none."""
        settings = self.entry.config
        try:
            if self._source is None:
                self._source = self._open(self.entry)
                self._state = FAILED if self._state == FAILED else RUNNING  # until it gets on
            self._source.poll(self._halt)
        except Retryable as e:
            logger.warning("connector %s waits: %s", settings.name, e)
            self.retrying = str(e)
            self._state = RUNNING if self._state in (UNASSIGNED, PAUSED) else self._state
            return max(e.after_s, self._later())
        except Stuck:
            raise
        except ConfigError as e:
            self._fail(str(e))
            return None
        except Exception as e:  # somebody else's class may raise anything: it is FAILED with its trace, and the others go on
            self._fail("".join(traceback.format_exception(e)))
            self._close()
            return self._later()
        self._state, self.trace, self.retrying, self._tries = RUNNING, "", "", 0
        return settings.poll_s

    def _later(self) -> float:
        self._tries += 1
        return float(min(self.entry.config.errors_retry_delay_max_s, FIRST_S * 2 ** min(self._tries - 1, 20)))

    def _fail(self, trace: str) -> None:
        logger.error("connector %s FAILED: %s", self.entry.config.name, trace)
        self._count_failure()
        self._state, self.trace, self.retrying = FAILED, trace[-TRACE:], ""

    def _close(self) -> None:
        source = self._source
        if source is None:
            return
        self._before += source.appended
        self._source = None
        try:
            source.close()
        except Exception:
            logger.exception("connector %s: close()", self.entry.config.name)


class Workers:
    """The threads of all connectors, kept as the book says."""

    def __init__(self, open_source: Callable[[Entry], Polls], failed: Callable[[], None]):
        self._open, self._failed = open_source, failed
        self._lock = threading.Lock()  # the REST API looks while the role changes
        self._workers: dict[str, Worker] = {}
        self._before: dict[str, int] = {}  # candidates of workers that have ended

    def follow(self, wanted: Mapping[str, Entry]) -> None:
        """Start, pause, end.  Raises what a thread died of."""
        with self._lock:
            for name, worker in list(self._workers.items()):
                if worker.fatal is not None:
                    raise worker.fatal
                entry = wanted.get(name)
                if entry is not None and entry.target != STOPPED and _same(worker.entry, entry):
                    worker.aim(entry.target)
                    continue
                worker.end()
                if not worker.alive:
                    self._before[name] = self._before.get(name, 0) + worker.candidates
                    del self._workers[name]
            for name, entry in wanted.items():
                if name not in self._workers and entry.target != STOPPED:
                    self._workers[name] = Worker(entry, self._open, self._failed)

    def states(self, wanted: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
        """Of each connector: state, trace, retrying, candidates of this process."""
        with self._lock:
            found = {}
            for name, entry in wanted.items():
                worker = self._workers.get(name)
                idle = STOPPED if entry.target == STOPPED else UNASSIGNED
                status: dict[str, Any] = {"state": worker.state if worker else idle, "candidates": self._before.get(name, 0)}
                if worker is not None:
                    status["candidates"] += worker.candidates
                    status |= {"trace": worker.trace} if worker.trace else {}
                    status |= {"retrying": worker.retrying} if worker.retrying else {}
                found[name] = status
            return found

    def idle(self, name: str) -> bool:
        """Whether no thread has this connector."""
        with self._lock:
            return name not in self._workers

    def end(self, timeout_s: float) -> None:
        with self._lock:
            workers = list(self._workers.values())
        for worker in workers:
            worker.end()
        deadline = time.monotonic() + timeout_s
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))


def _same(before: Entry, after: Entry) -> bool:
    return before.config == after.config and before.restarts == after.restarts
