"""What a role of many threads cannot go on without just now: the store, the catalog, brokers, room on a disk.

Waiting is back-pressure, not failure: what is ready is learnt, what is not yet is asked for again, and no sample is given up.  The role says
what it waits for and since when, in its heartbeat and as metrics, as the fetcher does (ingest/fetch/waits.py, docs/how-it-works.md).
"""

import logging
import random
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from streamlearn.contract.errors import Retryable
from streamlearn.contract.status import now

FIRST_S, MOST_S = 0.5, 30.0  # between tries: doubles, unless the error says that it takes longer
LOG_S = 60.0  # between two lines about one wait
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wait:
    error: Retryable
    tries: int
    since: str  # RFC 3339
    began: float  # monotonic
    logged: float  # likewise, the last time


class Waits:
    """For any number of threads."""

    def __init__(self, who: str = "the stream") -> None:
        self.who, self.failures = who, 0
        self._lock = threading.Lock()
        self._open: dict[str, Wait] = {}  # what cannot be done, longest first

    def out(self, what: str, e: Retryable) -> float:
        """It failed; seconds until it is to be tried again: of many who wait for one store, not all at once."""
        at = time.monotonic()
        with self._lock:
            known = self._open.get(what) or Wait(e, 0, now(), at, at - LOG_S)
            due = at - known.logged >= LOG_S
            self._open[what] = replace(known, error=e, tries=known.tries + 1, logged=at if due else known.logged)
            self.failures += 1
        if due:
            logger.error("%s waits (%s) since %s: %s", self.who, what, known.since, e)
        return max(e.after_s, min(MOST_S, FIRST_S * 2.0 ** min(known.tries, 16))) * random.uniform(0.75, 1.25)

    def over(self, what: str) -> None:
        """It succeeded."""
        with self._lock:
            known = self._open.pop(what, None)
        if known:
            logger.warning("%s goes on (%s) after %.1f s", self.who, what, time.monotonic() - known.began)

    def gone(self, what: str) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._open.pop(what, None)

    def why(self) -> Retryable | None:
        """The error that is waited out for the longest; None: nothing is."""
        with self._lock:
            return next((wait.error for wait in self._open.values()), None)

    def told(self) -> dict[str, Any]:
        """For the heartbeat."""
        with self._lock:
            waits = dict(self._open)
        longest = next(iter(waits.values()), None)
        return {
            "waiting": str(longest.error) if longest else "",
            "waiting_on": longest.error.on if longest else "",
            "waiting_since": longest.since if longest else "",
            "waiting_s": round(time.monotonic() - longest.began, 1) if longest else 0.0,
            "waiting_at": sorted({what.partition(" ")[0] for what in waits}),
        }
