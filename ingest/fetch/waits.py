"""What the fetcher cannot go on without just now: a broker, a store, room on a disk.

Waiting is back-pressure, not failure: a lane that waits reads nothing more and keeps what it has in hand, so nothing is lost and nothing piles
up.  The role stays healthy and says what it waits for and since when, in its heartbeat (hence /healthz, /readyz and the terminal) and as
metrics.  A wait ends when the step that failed succeeds, not when it is tried again; nor when its partition goes to another fetcher: whoever
meets the same fault soon after waits since then.  Fetchers that come and go while a store is out would else never be seen to wait for long.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from streamlearn.contract.errors import Retryable
from streamlearn.contract.metrics import FetchMetrics, set_waiting
from streamlearn.contract.status import now

CARRIED_S = 120.0  # a fault that a lane left behind, and that none has met again for so long, is over
LOG_S = 60.0  # between two lines about one wait: an outage of a day is not a line every few seconds
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wait:
    why: str  # the error's words: what, where, what to do
    on: str  # of metrics.WAITS_ON
    since: str  # RFC 3339
    began: float  # by the clock
    logged: float  # likewise, the last time


class Waits:
    """Which partition waits at which step (contract.metrics.STEPS)."""

    def __init__(self, metrics: FetchMetrics, clock: Callable[[], float] = time.monotonic):
        self.metrics, self.clock = metrics, clock
        self._open: dict[tuple[str, str], Wait] = {}  # (who, step)
        self._left: dict[str, tuple[Wait, float]] = {}  # step -> the longest whose partition went away, and when the last one did

    async def out(self, who: str, step: str, e: Retryable, *, pause_s: float | None = None) -> None:
        """Say so, and wait as long as the error says, or `pause_s`."""
        at = self.clock()
        known = self._open.get((who, step)) or self._carried(e.on, at) or Wait("", "", now(), at, at - LOG_S)
        due = at - known.logged >= LOG_S
        if due:
            logger.error("%s waits (%s) since %s: %s", who, step, known.since, e)
        self._open[who, step] = replace(known, why=str(e), on=e.on, logged=at if due else known.logged)
        self.metrics.waits.labels(step).inc()
        await asyncio.sleep(e.after_s if pause_s is None else pause_s)

    def over(self, who: str, step: str) -> None:
        """The step succeeded."""
        known = self._open.pop((who, step), None)
        self._left.pop(step, None)
        if known:
            logger.warning("%s goes on (%s) after %.1f s", who, step, self.clock() - known.began)

    def gone(self, who: str) -> None:
        """It does not wait any more, for it is not there any more."""
        at = self.clock()
        for key in [key for key in self._open if key[0] == who]:
            wait, step = self._open.pop(key), key[1]
            other, seen = self._left.get(step, (wait, at))
            self._left[step] = (other if at - seen < CARRIED_S and other.began < wait.began else wait, at)

    def _carried(self, on: str, at: float) -> Wait | None:
        """The longest that a lane left behind and that is still out."""
        left = [wait for wait, seen in self._left.values() if wait.on == on and at - seen < CARRIED_S]
        return min(left, key=lambda wait: wait.began, default=None)

    def told(self) -> dict[str, Any]:
        """For the heartbeat: the longest wait in words, and who all wait.  Sets the gauge, too."""
        longest = min(self._open.values(), key=lambda wait: wait.began, default=None)
        seconds = self.clock() - longest.began if longest else 0.0
        set_waiting(self.metrics.waiting, longest.on if longest else "", seconds)
        return {
            "waiting": longest.why if longest else "",
            "waiting_on": longest.on if longest else "",
            "waiting_since": longest.since if longest else "",
            "waiting_s": round(seconds, 1),
            "waiting_at": sorted(f"{who} ({step})" for who, step in self._open),
        }
