"""When a host may be asked: slots, spacing, holds and a breaker, all local because a host has one owner at a time (tenure.py).

A turn is asked for and comes at once, after a wait of at most `max_wait_s`, or not at all: Busy, a value, says when to come back.  Nothing
here sleeps longer than that, so one slow host never stalls a lane; the caller turns Busy into a retry.

  slots     at most `per_host` requests in flight to a host
  spacing   a token bucket: `host_rate` starts a second, `host_burst` at once; under a Crawl-delay no burst, at least that long between two
  hold      the server named a time (Retry-After): nobody asks before it
  breaker   closed -> `breaker_failures` failures in a row -> open for `breaker_s` -> one trial -> closed, or open for twice as long
  global    `global_rate` starts a second over all hosts, `concurrency` requests in flight to all of them
  rights    only its owner asks a host.  What the owner before has asked is not known: it is taken to have been all that it was allowed, until
            the moment of taking over, so the first start is a whole spacing later, and there is no burst

What must outlive its owner (`news`, `kept`, `take_up`) is told in wall-clock seconds; the rest is measured on a monotonic clock.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Protocol

from streamlearn.contract.config import FetchConfig

DAY_S = 86400.0  # no server holds us longer at a time
BREAKER_MAX_S = 3600.0
SPREAD_S = 3600.0  # callers turned away get places up to here: a retry topic is read in order, a far head would hold up the others
SLACK_S = 1.0  # beyond max_wait_s: spacing is estimated exactly when one queues; this only bounds waiting for a slot
UNSURE_S = 0.1  # between looks at whether we may ask at all
LOOK = 64  # idle entries looked for at a time when the table is full
NEVER = -math.inf


@dataclass(frozen=True)
class Busy:
    """Not now; come back after `after_s` seconds."""

    after_s: float
    why: str


class Rights(Protocol):
    """Who may ask whom."""

    def since(self, host: str) -> float:
        """Since when a host is ours to ask, in monotonic seconds; infinite: it is not."""

    def sure(self) -> bool:
        """Whether that can be relied on now.  Nobody is asked while it cannot."""


class Everyone:
    """All hosts are ours, for ever."""

    def since(self, host: str) -> float:
        return NEVER

    def sure(self) -> bool:
        return True


@dataclass(slots=True)
class _Bucket:
    """A token bucket as one number: `full_at`, when it is full again (GCRA; no tokens are counted, so none are lost to rounding)."""

    spacing_s: float  # 0: no limit
    burst: int
    full_at: float = NEVER

    def earliest(self, now: float, ahead: int = 0) -> float:
        """When the next start may be, once `ahead` others have had theirs."""
        return max(now, max(now, self.full_at) + (ahead - self.burst + 1) * self.spacing_s)

    def take(self, now: float) -> None:
        self.full_at = max(now, self.full_at) + self.spacing_s

    def drain(self, at: float) -> None:
        """As if everything that could be had by then has been taken."""
        self.full_at = max(self.full_at, at + self.burst * self.spacing_s)


@dataclass(slots=True)
class _Host:
    """Times are of the monotonic clock."""

    bucket: _Bucket
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)  # first come, first served
    freed: asyncio.Event = field(default_factory=asyncio.Event)
    in_flight: int = 0
    waiting: int = 0
    delay_s: float = 0.0  # Crawl-delay, as last said
    last: float = NEVER  # the latest start
    hold_until: float = NEVER
    failures: int = 0  # in a row
    failed_at: float = NEVER
    opened: int = 0  # times in a row the breaker opened; 0: closed
    open_until: float = NEVER
    trial: bool = False  # the one request of a half-open breaker is under way
    promised: float = NEVER  # the furthest place given to a caller that was turned away
    since: float = NEVER  # it is ours
    told: float = NEVER  # when its Crawl-delay was last told to those who come after us

    def begin(self, since: float) -> None:
        """It was another's until then."""
        self.since, self.last = since, max(self.last, since)
        self.bucket.drain(since)

    def spacing_s(self) -> float:
        return max(self.bucket.spacing_s, self.delay_s)

    def earliest(self, now: float, ahead: int = 0) -> float:
        if self.delay_s:
            return max(now, self.last + self.spacing_s()) + ahead * self.spacing_s()
        return self.bucket.earliest(now, ahead)

    def matters(self, now: float, breaker_s: float) -> bool:
        """Whether forgetting it could let a request out too early."""
        failing = self.failures > 0 and self.failed_at + breaker_s > now
        return bool(self.in_flight or self.waiting or failing) or now < max(
            self.hold_until, self.open_until, self.bucket.full_at, self.last + self.delay_s
        )


class Turn:
    """One request, from its start to its end: `with turn:`.  Set `ok`; left None (cancelled, refused by us) it says nothing of the host."""

    def __init__(self, hosts: "Hosts", name: str, host: _Host, trial: bool):
        self.name, self.trial, self._hosts, self._host = name, trial, hosts, host
        self.ok: bool | None = None

    def __enter__(self) -> "Turn":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hosts._end(self, self._host)


class Hosts:
    """One per process."""

    def __init__(
        self,
        config: FetchConfig,
        rights: Rights | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self.config, self.rights = config, rights or Everyone()
        self.clock, self.wall = clock, wall  # clock: the event loop's own, in seconds; wall: unix seconds
        self.room = asyncio.Semaphore(config.concurrency)  # requests in flight; whoever waits for a host's time takes up none of it
        self.news: set[str] = set()  # hosts of which `kept` has changed; whoever has told it to the others takes them out
        self.changed = asyncio.Event()  # there is news
        self._hosts: OrderedDict[str, _Host] = OrderedDict()  # least lately used first
        rate = config.global_rate
        self._all = _Bucket(1 / rate if rate else 0.0, max(1, int(rate)))  # a second's worth at once

    def __len__(self) -> int:
        return len(self._hosts)

    def ours(self, name: str) -> bool:
        return self.rights.since(name) < math.inf

    async def turn(self, name: str, delay_s: float | None = None, *, guest: bool = False) -> Turn | Busy:
        """A slot for one request to a host, to be used as `with turn:` at once.

        `delay_s`: the host's Crawl-delay, 0 for none; None when it is not known here: then as last said.  `guest`: it need not be ours.
        """
        host = self._entry(name)
        if host is None:
            return Busy(self.config.max_wait_s, f"{len(self)} hosts are being waited on: fetch.hosts")
        since = self.rights.since(name)
        if host.since < since < math.inf:
            host.begin(since)
        if delay_s is not None:
            self._slow_down(name, host, delay_s)
        if busy := self._shut(name, host) or self._queue_too_long(name, host):
            return busy
        host.waiting += 1
        try:
            async with asyncio.timeout(self.config.max_wait_s + SLACK_S) as limit, host.gate:
                while host.in_flight >= self.config.per_host:
                    host.freed.clear()
                    await host.freed.wait()
                return await self._start(name, host, limit, guest)
        except TimeoutError:
            return Busy(self.config.max_wait_s, f"{name}: {host.in_flight} requests in flight for over {self.config.max_wait_s:g} s")
        finally:
            host.waiting -= 1

    def hold(self, name: str, seconds: float) -> None:
        """Nobody asks this host for so long, at most a day.  For a host whose turn is being had: that one is never forgotten."""
        if host := self._entry(name):
            host.hold_until = max(host.hold_until, self.clock() + min(seconds, DAY_S))
            self.tell(name)

    def _slow_down(self, name: str, host: _Host, delay_s: float) -> None:
        now = self.clock()
        if delay_s != host.delay_s or (delay_s and host.told + self.config.robots_ttl_s < now):
            host.delay_s, host.told = delay_s, now
            self.tell(name)

    def tell(self, name: str) -> None:
        """What `kept` says of a host is news."""
        self.news.add(name)
        self.changed.set()

    async def _start(self, name: str, host: _Host, limit: asyncio.Timeout, guest: bool) -> Turn | Busy:
        """Wait for the host's time, then for everyone's.  Called at the head of the host's queue, with a slot free."""
        while (at := host.earliest(now := self.clock())) > now:
            if at - now > self.config.max_wait_s:
                return Busy(at - now, f"{name}: its Crawl-delay grew to {host.delay_s:g} s")
            await asyncio.sleep(at - now)
        limit.reschedule(None)  # for the host, it is time; from here on we wait for ourselves
        await self.room.acquire()
        turn: Turn | Busy | None = None
        try:
            turn = await self._begin(name, host, guest)
            return turn
        finally:
            if not isinstance(turn, Turn):
                self.room.release()

    async def _begin(self, name: str, host: _Host, guest: bool) -> Turn | Busy:
        """All that may say no is asked last: the request follows at once."""
        now = self.clock()
        at = self._all.earliest(now)
        if at - now > self.config.max_wait_s:
            return Busy(at - now, f"over {self.config.global_rate:g} requests a second: fetch.global_rate")
        self._all.take(now)
        if at > now:
            await asyncio.sleep(at - now)
        while not self.rights.sure():
            await asyncio.sleep(UNSURE_S)
        if not guest and host.since != self.rights.since(name):
            return Busy(1.0, f"{name} changes hands")
        if busy := self._shut(name, host):  # held or opened while this one waited
            return busy
        now = self.clock()
        host.last = now
        host.bucket.take(now)
        host.in_flight += 1
        host.trial = host.opened > 0
        return Turn(self, name, host, host.trial)

    def _end(self, turn: Turn, host: _Host) -> None:
        trial, ok = turn.trial, turn.ok
        self.room.release()
        host.in_flight -= 1
        host.freed.set()
        if trial:
            host.trial = False
        if ok is None or (host.opened and not trial):  # an answer to a question from before the breaker opened is no trial
            return
        if ok:
            host.failures, host.opened, host.open_until = 0, 0, NEVER
            return
        now = self.clock()
        host.failures, host.failed_at = host.failures + 1, now
        if self.config.breaker_failures and (trial or host.failures >= self.config.breaker_failures):
            host.opened = min(host.opened + 1, 32)
            longest = max(BREAKER_MAX_S, self.config.breaker_s)
            host.open_until = now + min(self.config.breaker_s * 2 ** (host.opened - 1), longest)
            self.tell(turn.name)

    def _shut(self, name: str, host: _Host) -> Busy | None:
        now = self.clock()
        if now < host.hold_until:
            return Busy(host.hold_until - now, f"{name} asked to be left alone")
        if now < host.open_until:
            return Busy(host.open_until - now, f"{name} failed {host.failures} times in a row")
        if host.trial:
            return Busy(self.config.breaker_s, f"{name} is being tried once after {host.failures} failures")
        return None

    def _queue_too_long(self, name: str, host: _Host) -> Busy | None:
        """Busy if its place in the queue is over `max_wait_s` away.  Each caller turned away is told another time, not all the same one."""
        now = self.clock()
        at = host.earliest(now, host.waiting)
        if at - now <= self.config.max_wait_s:
            return None
        at = max(at, min(host.promised + host.spacing_s(), now + SPREAD_S))
        host.promised = at
        return Busy(at - now, f"{name}: {host.waiting} requests wait, one every {host.spacing_s():g} s")

    def _entry(self, name: str) -> _Host | None:
        """The host's state, made if need be; None when the table is full of hosts that matter."""
        host = self._hosts.get(name)
        if host is None:
            if len(self._hosts) >= self.config.hosts and not self._forget():
                return None
            rate = self.config.host_rate
            host = self._hosts[name] = _Host(_Bucket(1 / rate if rate else 0.0, self.config.host_burst))
        self._hosts.move_to_end(name)
        return host

    def _forget(self) -> bool:
        """Drop idle entries among the oldest; those that still matter go to the end, so that the next look is at others."""
        now, before = self.clock(), len(self._hosts)
        for name in [name for name, _ in zip(self._hosts, range(LOOK), strict=False)]:
            if self._hosts[name].matters(now, self.config.breaker_s):
                self._hosts.move_to_end(name)
            else:
                del self._hosts[name]
        return len(self._hosts) < before

    def kept(self, name: str) -> dict[str, float]:
        """What the next owner of a host must know: its hold, its open breaker, its Crawl-delay.  JSON, unix seconds; empty: nothing."""
        host, now, wall = self._hosts.get(name), self.clock(), self.wall()
        found: dict[str, float] = {}
        if host is None:
            return found
        if host.hold_until > now:
            found["hold_until"] = wall + host.hold_until - now
        if host.open_until > now:
            found |= {"open_until": wall + host.open_until - now, "opened": host.opened, "failures": host.failures}
        if host.delay_s:
            found |= {"delay_s": host.delay_s, "delay_until": wall + 2 * self.config.robots_ttl_s}  # told again before that
        return found | ({"at": wall} if found else {})

    def take_up(self, name: str, kept: object) -> bool:
        """Take up what `kept` gave; whether there is still anything to it.

        Never raises: what is not understood is left out, and no time is longer than it can have been.
        """
        raw = kept if isinstance(kept, dict) else {}
        wall = max(self.wall(), _number(raw.get("at"), 0.0))  # a clock that was set back makes nobody wait longer than when it was told
        if max(_number(raw.get(key), 0.0) for key in ("hold_until", "open_until", "delay_until")) <= wall:
            return False
        if host := self._entry(name):
            self._take_up(host, raw, wall)
        return True

    def _take_up(self, host: _Host, kept: dict[Any, Any], wall: float) -> None:
        now = self.clock()
        held, shut = (_number(kept.get(key), 0.0) - wall for key in ("hold_until", "open_until"))
        if held > 0:
            host.hold_until = max(host.hold_until, now + min(held, DAY_S))
        if shut > 0 and self.config.breaker_failures:
            host.open_until = now + min(shut, max(BREAKER_MAX_S, self.config.breaker_s))
            host.opened = int(min(max(_number(kept.get("opened"), 1.0), 1.0), 32.0))
            host.failures = int(min(max(_number(kept.get("failures"), 1.0), 1.0), 1e6))
        delay = _number(kept.get("delay_s"), 0.0)
        if delay > 0 and _number(kept.get("delay_until"), 0.0) > wall:
            host.delay_s = min(delay, DAY_S)


def retry_after_s(value: str, wall: float) -> float:
    """Seconds of a Retry-After, a number or an HTTP date, at most a day; 0 for nonsense or the past (retry topics wait long enough)."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value), DAY_S)
    try:
        at = parsedate_to_datetime(value)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)  # HTTP's dates are always GMT
        return min(max(0.0, at.timestamp() - wall), DAY_S)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _number(value: object, otherwise: float) -> float:
    """A finite number, or what is used instead."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        return otherwise
    return float(value)
