"""robots.txt, as RFC 9309 has it: asked once an origin, kept a day, judged for every URL.

  2xx                       its rules; the group of our product token, else of `*`; the longest match decides (Protego)
  4xx, too many redirects   no rules: everything is allowed (section 2.3.1.3)
  429, 5xx, nobody there    unknown: nothing is asked for, come back later (2.3.1.4; the leave to go on after 30 days is not taken)

The group is picked here, by the whole token (Protego would also take `stream` for streamlearn), and only its lines are kept: memory is
bounded by entries and by the weight of their rules, whoever writes them.
"""

import asyncio
import re
import time
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property

from protego import Protego
from yarl import URL

BODY_BYTES = 500 * 1024  # RFC 9309, 2.5: at least this much must be read; the rest is ignored
RULES = 5000  # lines of our group; the rest is ignored
LINE_CHARS = 16 * 1024  # a longer pattern matches no URL that a candidate can hold
WEIGHT_BYTES = 128 * 2**20  # of all rules kept
MIN_TTL_S = 3600.0  # whatever Cache-Control says
LIGHT_CHARS = 8192  # of rules; more are matched in a thread: a hostile file costs 100 to 200 ms a URL, measured
LOOKED_AT = 32  # rules, for the one to name
_TOKEN = re.compile(r"\*(?=$|[\s/])|[A-Za-z0-9_.-]+")
_LINE = re.compile(
    r"(user[-\s]*agent|allow|dis{1,2}al{1,2}ow|disallaw|diasllow|crawl[-\s]delay|request[-\s]rate)\s*(?::|\s)\s*(.*)", re.I | re.S
)
_SPACE = re.compile("[\x01-\x09\x0b\x0c\x0e-\x1f\x7f\x85\u2028\u2029]")  # Protego would end a line at some of these


@dataclass(frozen=True)
class Page:
    """An answer to a request for robots.txt, after redirects.  `status` 0: nobody answered, as `detail` says."""

    status: int
    body: bytes = b""
    max_age_s: float | None = None  # of Cache-Control
    detail: str = ""
    after_s: float = 0.0  # when to come back, if that was said
    passing: bool = False  # an answer that may soon be another one


@dataclass(frozen=True)
class Allowed:
    delay_s: float | None  # between starts of requests: Crawl-delay or Request-rate, the longer


@dataclass(frozen=True)
class Disallowed:
    rule: str


@dataclass(frozen=True)
class Unknown:
    after_s: float
    detail: str


@dataclass(frozen=True)
class Rules:
    """The rules of one origin for us."""

    lines: tuple[str, ...]
    parsed: Protego
    delay_s: float | None

    @cached_property
    def heavy(self) -> bool:
        return sum(map(len, self.lines)) > LIGHT_CHARS

    def verdict(self, url: str) -> Allowed | Disallowed:
        if self.parsed.can_fetch(url, "*"):
            return Allowed(self.delay_s)
        return Disallowed(self._rule(url))

    def _rule(self, url: str) -> str:
        """The line that decided, for the dead letter: the longest that disallows by itself.  Looked for among some only: it is a courtesy."""
        longest = sorted((line for line in self.lines if line.startswith("Disallow")), key=len, reverse=True)
        for line in longest[:LOOKED_AT]:
            if not Protego.parse(f"User-agent: *\n{line}").can_fetch(url, "*"):
                return line[:200]
        return "Disallow"


@dataclass(frozen=True)
class _Entry:
    rules: Rules | None  # None: unknown
    until: float  # monotonic
    detail: str = ""

    @property
    def weight(self) -> int:
        """Bytes, about: at most 700 a rule and its text thrice, measured with tracemalloc over hostile files."""
        lines = self.rules.lines if self.rules else ()
        return 2000 + sum(700 + 3 * len(line) for line in lines)


class Robots:
    """One per process.  `get` asks for a URL (guarded, capped, following redirects) and never raises but for bugs."""

    def __init__(
        self,
        get: Callable[[URL], Awaitable[Page]],
        *,
        token: str,
        ttl_s: float,
        retry_s: float,
        entries: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.get, self.token, self.ttl_s, self.retry_s, self.entries, self.clock = get, token, ttl_s, retry_s, entries, clock
        self._kept: OrderedDict[URL, _Entry] = OrderedDict()  # least lately used first
        self._weight = 0
        self._asking: dict[URL, asyncio.Task[_Entry]] = {}

    async def verdict(self, url: URL) -> Allowed | Disallowed | Unknown:
        """Whether the URL may be asked for.  Every caller of one origin waits for the same request."""
        place = robots_url(url)
        entry = self._kept.get(place)
        if entry is None or entry.until <= self.clock():
            entry = await self._asked(place)
        else:
            self._kept.move_to_end(place)
        if entry.rules is None:
            return Unknown(max(1.0, entry.until - self.clock()), f"{place}: {entry.detail}")
        if entry.rules.heavy:
            return await asyncio.to_thread(entry.rules.verdict, str(url))
        return entry.rules.verdict(str(url))

    async def close(self) -> None:
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    async def _asked(self, place: URL) -> _Entry:
        task = self._asking.get(place)
        if task is None:
            task = self._asking[place] = asyncio.create_task(self._ask(place))
            task.add_done_callback(lambda _: self._asking.pop(place, None))
        return await asyncio.shield(task)  # a caller that is cancelled does not take it from the others

    async def _ask(self, place: URL) -> _Entry:
        page = await self.get(place)
        if page.status in (0, 429) or page.status >= 500:  # 429 is no answer about rules; as Google reads it
            entry = _Entry(None, self.clock() + max(1.0, page.after_s or self.retry_s), page.detail or f"HTTP {page.status}")
        else:
            body = page.body if 200 <= page.status < 300 else b""
            rules = await asyncio.to_thread(parse, body, self.token)
            entry = _Entry(rules, self.clock() + (self.retry_s if page.passing else self._ttl_s(page.max_age_s)))
        self._keep(place, entry)
        return entry

    def _ttl_s(self, max_age_s: float | None) -> float:
        return self.ttl_s if max_age_s is None else min(self.ttl_s, max(max_age_s, MIN_TTL_S))

    def _keep(self, place: URL, entry: _Entry) -> None:
        if old := self._kept.pop(place, None):
            self._weight -= old.weight
        self._kept[place] = entry
        self._weight += entry.weight
        while len(self._kept) > self.entries or (self._weight > WEIGHT_BYTES and len(self._kept) > 1):
            self._weight -= self._kept.popitem(last=False)[1].weight


def robots_url(url: URL) -> URL:
    """Where the rules for a URL stand: one for each scheme, host and port."""
    return URL.build(scheme=url.scheme, host=(url.raw_host or "").rstrip("."), port=url.port, path="/robots.txt")


def product_token(user_agent: str) -> str:
    """The name that robots.txt knows us by: the user agent up to its "/", as far as RFC 9309 lets a name go."""
    found = _TOKEN.match(user_agent.partition("/")[0].strip())
    return found.group().lower() if found and found.group() != "*" else ""


def parse(body: bytes, token: str) -> Rules:
    """The rules that some bytes hold for us.  Any bytes: pages, pictures, gzip, other encodings; never raises."""
    lines = _ours(_text(body), token)
    parsed = Protego.parse("User-agent: *\n" + "\n".join(lines))
    delay, rate = parsed.crawl_delay("*"), parsed.request_rate("*")
    slow = min(rate.seconds, 10**9) / min(rate.requests, 10**9) if rate else 0.0  # at any time of day: its hours are the server's
    return Rules(tuple(lines), parsed, max(delay or 0.0, slow) or None)


def _text(body: bytes) -> str:
    if body[:2] == b"\x1f\x8b":  # sent compressed though we asked for it plain; expanded no further than the cap
        try:
            body = zlib.decompressobj(31).decompress(body, BODY_BYTES + 1)
        except zlib.error:
            return ""
    cut = len(body) > BODY_BYTES
    text = body[:BODY_BYTES].decode("utf-8-sig", "replace").replace("\0", "").lstrip("\ufeff\ufffd")
    if cut:  # a line torn in two would say something else
        text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1]
    return _SPACE.sub(" ", text)


def _ours(text: str, token: str) -> list[str]:
    """The rules of our groups, merged; of the groups of `*` if none is ours (RFC 9309, 2.2.1).  Spelled as Protego knows them."""
    groups: dict[str, list[str]] = {}
    names: set[str] = set()
    in_rules = False
    for raw in re.split(r"\r\n|\r|\n", text):
        found = _LINE.fullmatch(raw.partition("#")[0].strip()) if len(raw) <= LINE_CHARS else None
        if found is None:
            continue
        key, value = found.group(1).lower(), found.group(2).strip()
        if key.startswith("user"):
            if in_rules:
                names, in_rules = set(), False
            if (name := _TOKEN.match(value)) and name.group().lower() in (token, "*"):
                names.add(name.group().lower())
                groups.setdefault(name.group().lower(), [])
            continue
        in_rules = True
        for lines in (groups[name] for name in names):
            if len(lines) < RULES:
                lines.append(f"{_FIELD[key[0]]}: {value}")
    return groups.get(token, groups.get("*", []))


_FIELD = {"a": "Allow", "d": "Disallow", "c": "Crawl-delay", "r": "Request-rate"}
