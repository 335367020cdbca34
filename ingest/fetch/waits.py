"""What the fetcher cannot go on without just now: a broker, a store, room on a disk.

Waiting is back-pressure, not failure: a lane that waits reads nothing more and keeps what it has in hand, so nothing is lost and nothing piles
up.  The role stays healthy and says what it waits for and since when, in its heartbeat (hence /healthz, /readyz and the terminal) and as
metrics.  A wait ends when the step that failed succeeds, not when it is tried again.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from streamlearn.contract.errors import Retryable
from streamlearn.contract.metrics import FetchMetrics, set_waiting
from streamlearn.contract.status import now

LOG_S = 60.0  # between two lines about one wait: an outage of a day is not a line every few seconds
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wait:
    why: str  # the error's words: what, where, what to do
    on: str  # of metrics.WAITS_ON
    since: str  # RFC 3339
    began: float  # monotonic
    logged: float  # likewise, the last time


class Waits:
    """Which partition waits at which step (contract.metrics.STEPS)."""

    def __init__(self, metrics: FetchMetrics):
        self.metrics = metrics
        self._open: dict[tuple[str, str], Wait] = {}  # (who, step), longest first

    async def out(self, who: str, step: str, e: Retryable, *, pause_s: float | None = None) -> None:
        """Say so, and wait as long as the error says, or `pause_s`."""
        at = time.monotonic()
        known = self._open.get((who, step)) or Wait("", "", now(), at, at - LOG_S)
        due = at - known.logged >= LOG_S
        if due:
            logger.error("%s waits (%s) since %s: %s", who, step, known.since, e)
        self._open[who, step] = replace(known, why=str(e), on=e.on, logged=at if due else known.logged)
        self.metrics.waits.labels(step).inc()
        await asyncio.sleep(e.after_s if pause_s is None else pause_s)

    def over(self, who: str, step: str) -> None:
        """The step succeeded."""
        known = self._open.pop((who, step), None)
        if known:
            logger.warning("%s goes on (%s) after %.1f s", who, step, time.monotonic() - known.began)

    def gone(self, who: str) -> None:
        """It does not wait any more, for it is not there any more."""
        for key in [key for key in self._open if key[0] == who]:
            del self._open[key]

    def told(self) -> dict[str, Any]:
        """For the heartbeat: the longest wait in words, and who all wait.  Sets the gauge, too."""
        longest = next(iter(self._open.values()), None)
        seconds = time.monotonic() - longest.began if longest else 0.0
        set_waiting(self.metrics.waiting, longest.on if longest else "", seconds)
        return {
            "waiting": longest.why if longest else "",
            "waiting_on": longest.on if longest else "",
            "waiting_since": longest.since if longest else "",
            "waiting_s": round(seconds, 1),
            "waiting_at": sorted(f"{who} ({step})" for who, step in self._open),
        }
