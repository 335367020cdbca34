"""Fetch one image, safely and politely.  What can go wrong, and who acts:

* Unchanged      a value: a refresh heard 304, what is stored is what is there
* Refused        a value: counted, dead-lettered, the offset moves on (ingest.fetch.screen.Reason)
* Unanswered     a value: every quick try failed in a way that may pass (5xx, 429, resets, time-outs, DNS), or it is not this host's turn,
                 or its robots.txt cannot be had, or it is another owner's to ask: deferred to a retry topic
* anything else  a bug: the process ends with its traceback and is restarted

Each hop, the first URL and every redirect alike: the URL is judged (guard.complaint; denied.py), then whether its host is ours to ask (tenure.py), then
its origin's robots.txt (robots.py), then a turn is taken with its host (hosts.py), then it is asked for; the answer's headers may opt out
(optout.py) before its body is read.  A candidate that leads to a host of another owner is handed over to that one, at the address it has come to.

Caps on connect time, total time, redirects, bytes; addresses checked on the socket (guard.py), for robots.txt too;
one TLS context and one connection pool for the process; no proxies, no cookies, no credentials.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from yarl import URL

from ingest.denied import Denied
from ingest.fetch import optout, robots
from ingest.fetch.guard import AddressRefused, Guard, complaint
from ingest.fetch.hosts import Busy, Hosts, Rights, Turn, retry_after_s
from ingest.fetch.screen import Reason, Refused, Seen, screen
from ingest.fetch.transport import Answer, BadUrl, Broken, Transport
from streamlearn.contract.candidate import REFRESH, VIA_CHARS, Candidate, host_of
from streamlearn.contract.config import FetchConfig
from streamlearn.contract.errors import Retryable
from streamlearn.contract.status import now

CHUNK = 2**16  # bytes
_REDIRECTS = {301, 302, 303, 307, 308}
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}
_NAMES_A_TIME = {429, 503}  # with Retry-After: for the whole host
_ROBOTS_REDIRECTS = 5  # RFC 9309, 2.3.1.2
_SMALL_TALK = 2**16  # bytes of a page that says no, read so that its connection can be used again
_NAME = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?", re.I | re.A)  # or an IPv6 literal
_TAKEN_DOWN = Refused(Reason.TAKEN_DOWN, "")  # not a word of what it was
T = TypeVar("T")


@dataclass(frozen=True)
class Fetched:
    body: bytes
    seen: Seen
    final_url: str
    fetched_at: str
    http_status: int = 0
    etag: str = ""
    last_modified: str = ""


@dataclass(frozen=True)
class Unchanged:
    """HTTP 304 to a refresh."""


@dataclass(frozen=True)
class Unanswered:
    """No answer yet; `after_s` if it is known when to come back."""

    detail: str
    after_s: float = 0.0
    asked: bool = True  # false: it was not the host's turn, nobody asked
    via: str = ""  # another owner is to go on from here
    hops: int = 0  # redirects on the way there


@dataclass(frozen=True)
class _Body:
    """A whole body, not yet looked at."""

    data: bytes
    etag: str
    last_modified: str


@dataclass
class _Left:
    """Seconds left for the requests of one try; waiting for a host's turn costs none."""

    seconds: float


@dataclass(frozen=True)
class _Wanted(Generic[T]):
    """What is asked for, how much of the body is wanted, and what is made of it."""

    headers: dict[str, str]
    cap: Callable[[Answer], int]
    read: Callable[[Answer], T]


class _Again(Exception):
    """This try failed in a way that may pass."""

    def __init__(self, detail: str, after_s: float = 0.0, *, asked: bool = True):
        super().__init__(detail)
        self.after_s, self.asked = after_s, asked


class _Elsewhere(Exception):
    """The next address is of a host that another owner asks."""

    def __init__(self, via: str, hops: int):
        super().__init__(f"{via} is another owner's to ask for")
        self.via, self.hops = via, hops


class Client:
    """One per process.  Use as an async context."""

    def __init__(self, config: FetchConfig, folders: Callable[[], tuple[Path, ...]] = tuple, rights: Rights | None = None):
        """`folders` tells, resolved, what `file:` candidates may name; asked again where one names something else.  May raise Retryable."""
        self.config, self.guard = config, Guard(config.allow_networks)
        self._folders, self.folders = folders, folders()
        self.token = robots.product_token(config.user_agent)
        self.hosts = Hosts(config, rights)
        self.denied = Denied()  # what was taken down; whoever owns us replaces it
        self._under_way: dict[asyncio.Timeout, str] = {}  # requests, and the host that must be ours for them
        self.robots = robots.Robots(
            self._robots_txt,
            token=self.token,
            ttl_s=config.robots_ttl_s,
            retry_s=config.robots_retry_s,
            entries=config.robots_entries,
        )

    async def __aenter__(self) -> "Client":
        self._transport = Transport(
            self.guard,
            user_agent=self.config.user_agent,
            connect_timeout_s=self.config.connect_timeout_s,
            connections=self.config.concurrency,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.robots.close()
        await self._transport.close()

    async def fetch(self, candidate: Candidate) -> Fetched | Refused | Unanswered | Unchanged:
        """The image of a candidate, or why there is none."""
        if self.denied.url(candidate.url):
            return _TAKEN_DOWN
        found = await self._fetch(candidate)
        if isinstance(found, Fetched) and self.denied and self.denied.image(hashlib.sha256(found.body).hexdigest()):
            return _TAKEN_DOWN
        return found

    async def _fetch(self, candidate: Candidate) -> Fetched | Refused | Unanswered | Unchanged:
        if candidate.url.startswith("file:"):
            return await asyncio.to_thread(self._read_file, candidate.url)
        answer = Unanswered("")
        for attempt in range(self.config.attempts):
            if attempt:
                await asyncio.sleep(self.config.backoff_s * 2 ** (attempt - 1))
            try:
                return await self._try(candidate)
            except _Elsewhere as e:
                return Unanswered(str(e), asked=False, via=e.via, hops=e.hops)
            except _Again as e:
                answer = Unanswered(str(e), e.after_s, e.asked or attempt > 0)
                if e.after_s:
                    break  # it was said when to come back: no quick tries before that
        return answer

    async def _try(self, candidate: Candidate) -> Fetched | Refused | Unchanged:
        left, wanted = _Left(self.config.total_timeout_s), self._wanted(_validators(candidate))
        at = _address(candidate.via or candidate.url)
        for hop in range(candidate.hops, self.config.max_redirects + 1):
            if isinstance(at, str):
                return Refused(Reason.BAD_URL, f"{at} (after a redirect)" if hop else at)
            if self.denied.url(str(at)):
                return _TAKEN_DOWN
            if not self.hosts.ours(host_of(at)):
                if len(str(at)) > VIA_CHARS:
                    return Refused(Reason.BAD_URL, f"{len(str(at))} characters (after a redirect)")
                raise _Elsewhere(str(at), hop)
            delay_s = await self._permission(at)
            if isinstance(delay_s, Refused):
                return delay_s
            found = await self._request(at, delay_s, left, wanted)
            if isinstance(found, Refused | Unchanged):
                return found
            if isinstance(found, _Body):  # looked at after the turn: the host need not wait for our processor
                seen = await self._screen(found.data)
                if isinstance(seen, Refused):
                    return Refused(seen.reason, seen.detail, 200)
                return Fetched(found.data, seen, str(at) if hop else candidate.url, now(), 200, found.etag, found.last_modified)
            at = _address(found, at)
        return Refused(Reason.REDIRECTS, f"more than {self.config.max_redirects}")

    async def _permission(self, url: URL) -> float | Refused:
        """The Crawl-delay under which robots.txt lets us ask for a URL, in seconds, 0 for none."""
        if not self.config.robots:
            return 0.0
        verdict = await self.robots.verdict(url)
        if isinstance(verdict, robots.Unknown):
            raise _Again(verdict.detail, verdict.after_s)
        if isinstance(verdict, robots.Disallowed):
            return Refused(Reason.ROBOTS, f"{url}: {verdict.rule}")
        delay_s = verdict.delay_s or 0.0
        if delay_s > self.config.max_crawl_delay_s:
            return Refused(Reason.CRAWL_DELAY, f"{delay_s:g} s between requests, over {self.config.max_crawl_delay_s:g}")
        return delay_s

    async def leave(self) -> None:
        """End the requests to hosts that are not ours any more; back once none is on its way."""
        while gone := [limit for limit, host in self._under_way.items() if host and not self.hosts.ours(host)]:
            for limit in (one for one in gone if not one.expired()):
                limit.reschedule(0.0)  # the clock is past that
            await asyncio.sleep(0.001)

    async def _request(self, url: URL, delay_s: float | None, left: _Left, wanted: "_Wanted[T]", *, guest: bool = False) -> T | Refused:
        """One request, in its host's turn, and what is made of the answer.  Raises _Again."""
        host = host_of(url)
        turn = await self.hosts.turn(host, delay_s, guest=guest)
        if isinstance(turn, Busy):
            raise _Again(turn.why, turn.after_s, asked=False)
        with turn:
            began, limit = time.monotonic(), asyncio.timeout(max(0.001, left.seconds))
            try:
                async with limit:
                    self._under_way[limit] = "" if guest else host
                    answer = await self._transport.get(str(url), wanted.headers, cap=wanted.cap)
            except TimeoutError:
                if not guest and not self.hosts.ours(host):
                    raise _Again(f"{host} changes hands", 1.0) from None
                turn.ok = False
                raise _Again(f"no whole answer within {self.config.total_timeout_s:g} s") from None
            except AddressRefused as e:
                return Refused(Reason.ADDRESS, str(e.strerror))
            except BadUrl as e:
                return Refused(Reason.BAD_URL, str(e))
            except Broken as e:
                turn.ok = False
                raise _Again(str(e)) from e
            finally:
                left.seconds -= time.monotonic() - began
                self._under_way.pop(limit, None)
            self._raise_if_it_may_pass(answer, turn)
            turn.ok = answer.status < 500
        return wanted.read(answer)

    def _raise_if_it_may_pass(self, answer: Answer, turn: Turn) -> None:
        if answer.status not in _MAY_PASS:
            return
        turn.ok = False
        after_s = retry_after_s(answer.headers.get("retry-after"), time.time())
        if after_s and answer.status in _NAMES_A_TIME:
            self.hosts.hold(turn.name, after_s)  # before the turn ends: nobody slips in between
        raise _Again(f"HTTP {answer.status}", after_s)

    def _wanted(self, conditions: dict[str, str]) -> "_Wanted[_Body | Refused | Unchanged | str]":
        """An image; where there are conditions, only if it has changed."""

        def read(answer: Answer) -> _Body | Refused | Unchanged | str:
            if answer.status != 304 or not conditions:
                return self._image(answer)
            why = self._opted_out(answer)  # the bytes are the same, what may be done with them may not be
            return Refused(Reason.OPT_OUT, why, 304) if why else Unchanged()

        return _Wanted({"Accept": "image/*"} | conditions, self._image_cap, read)

    def _image_cap(self, answer: Answer) -> int:
        """Bytes of the body to take."""
        if answer.status != 200:
            return _SMALL_TALK
        return 0 if self._opted_out(answer) or answer.length > self.config.max_bytes else self.config.max_bytes

    def _image(self, answer: Answer) -> _Body | Refused | str:
        """The body of an answer, a refusal, or where it redirects to."""
        if target := _redirect(answer):
            return target
        if answer.status != 200:
            return Refused(Reason.GONE, f"HTTP {answer.status}", answer.status)
        if why := self._opted_out(answer):
            return Refused(Reason.OPT_OUT, why, 200)
        if answer.length > self.config.max_bytes:
            return Refused(Reason.TOO_LARGE, f"{answer.length} bytes announced, over {self.config.max_bytes}", 200)
        if answer.cut:  # whatever was announced
            return Refused(Reason.TOO_LARGE, f"over {self.config.max_bytes} bytes", 200)
        return _Body(answer.body, answer.headers.get("etag")[:256], answer.headers.get("last-modified")[:64])

    def _opted_out(self, answer: Answer) -> str:
        return optout.refusal(answer.headers.items(), token=self.token, respect_noindex=self.config.respect_noindex)

    async def _robots_txt(self, url: URL) -> robots.Page:
        """An origin's robots.txt: guarded, capped and in its hosts' turns like any other request.

        Where it is redirected to another host (RFC 9309, 2.3.1.2), that one is asked by whoever owns the first, once for each time that the
        rules are read: to hand that over would tell the rules to the wrong one.
        """
        left = _Left(self.config.total_timeout_s)
        first = host_of(url)
        try:
            for _ in range(_ROBOTS_REDIRECTS + 1):
                found = await self._request(url, None, left, _ROBOTS, guest=host_of(url) != first)
                if isinstance(found, Refused):  # by our guard: its URLs will be refused with the same reason, without an answer of theirs
                    return robots.Page(403, detail=found.detail, passing=True)
                if isinstance(found, robots.Page):
                    return found
                target = _address(found, url)
                if isinstance(target, str):
                    return robots.Page(404, detail=target)
                url = target
        except _Again as e:
            return robots.Page(0, detail=str(e), after_s=e.after_s)
        return robots.Page(404, detail=f"more than {_ROBOTS_REDIRECTS} redirects")

    async def _screen(self, body: bytes) -> Seen | Refused:
        caps = {"max_pixels": self.config.max_pixels, "min_side": self.config.min_side}
        if len(body) < CHUNK:
            return screen(body, **caps)  # a thread's hand-over costs more than a small image
        return await asyncio.to_thread(screen, body, **caps)

    def _is_watched(self, real: Path) -> bool:
        """A connector that was made since we started may watch it."""
        if not any(real.is_relative_to(folder) for folder in self.folders):
            self.folders = self._folders()
        return any(real.is_relative_to(folder) for folder in self.folders)

    def _read_file(self, url: str) -> Fetched | Refused | Unanswered:
        """A `file:` candidate, only from a watched folder; symbolic links are followed before they are judged."""
        parts = urlsplit(url)
        path = Path(unquote(parts.path))
        try:
            real = path.resolve(strict=True)
            if parts.netloc or not self._is_watched(real):
                return Refused(Reason.OUTSIDE, f"{path} is in none of the watched folders")
            if not real.is_file():
                return Refused(Reason.NOT_AN_IMAGE, f"{path} is not a plain file")
            with real.open("rb") as f:
                body = f.read(self.config.max_bytes + 1)
        except FileNotFoundError:
            return Refused(Reason.GONE, f"{path} is not there any more")
        except (ValueError, RuntimeError) as e:  # a NUL in the name; links that go round
            return Refused(Reason.BAD_URL, f"{url[:200]!a}: {e}")
        except (OSError, Retryable) as e:
            return Unanswered(f"{path}: {e}")
        if len(body) > self.config.max_bytes:
            return Refused(Reason.TOO_LARGE, f"{path}: over {self.config.max_bytes} bytes")
        seen = screen(body, max_pixels=self.config.max_pixels, min_side=self.config.min_side)
        return seen if isinstance(seen, Refused) else Fetched(body, seen, url, now())


def _validators(candidate: Candidate) -> dict[str, str]:
    """The headers that ask for an image only if it is another than the one that is stored."""
    if candidate.purpose != REFRESH:
        return {}
    told = {"If-None-Match": candidate.etag, "If-Modified-Since": candidate.last_modified}
    # what a server once told may be no header that can be sent: then it is asked without
    return {name: value for name, value in told.items() if value and value.isascii() and value.isprintable()}


def _address(url: str, base: URL | None = None) -> URL | str:
    """What will be asked for, spelled as it will be; or why it may not be.  A `Location` is relative to its `base`, and may be anything."""
    try:
        url = urljoin(str(base), url) if base else url
        if why := complaint(url):
            return why
        at = URL(url)
        if _NAME.fullmatch(at.raw_host or "") or ":" in (at.raw_host or ""):
            return at
        return f"{at.raw_host!a} is no name of a host"  # the resolver would raise a UnicodeError: no name, no error of its own
    except ValueError as e:
        return f"not a URL: {str(e)!a}"


def _redirect(answer: Answer) -> str:
    """Where an answer sends us; empty if nowhere."""
    return answer.headers.get("location") if answer.status in _REDIRECTS else ""


def _page(answer: Answer) -> robots.Page | str:
    """A robots.txt, or where it redirects to."""
    if target := _redirect(answer):
        return target
    if not 200 <= answer.status < 300:
        return robots.Page(answer.status, detail=f"HTTP {answer.status}")
    aged = re.search(r"(?:^|[\s,])max-age=\"?(\d{1,9})", answer.headers.get("cache-control").lower(), re.ASCII)
    return robots.Page(answer.status, answer.body, float(aged.group(1)) if aged else None)


_ROBOTS = _Wanted(
    {"Accept": "text/plain, */*;q=0.5", "Accept-Encoding": "identity"},
    lambda answer: robots.BODY_BYTES if 200 <= answer.status < 300 else _SMALL_TALK,
    _page,
)
