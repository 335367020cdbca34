"""A small town of web servers that write down who asked what of whom, and when; and the audit of what they wrote.

Every server is an address of this machine (127.0.0.x), so its name is its own and nothing needs to be resolved.
"""

import asyncio
import itertools
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from tests.ingest.server import picture

JITTER_S = 0.5  # between a request's start and its line in the log lie two processes that share two cores with everything else
PICTURE = picture(1)


@dataclass
class Hit:
    """A line of the log; times are monotonic seconds of the server."""

    host: str
    asker: str  # its user agent
    began: float
    ended: float = float("inf")
    aborted: bool = False  # whoever asked hung up
    retry_after_s: float = 0.0  # as told in the answer
    path: str = ""


@dataclass(frozen=True)
class Rules:
    rate: float  # starts a second
    burst: int
    per_host: int
    delays: dict = field(default_factory=dict)  # host -> Crawl-delay


def audit(hits, rules, jitter_s=JITTER_S):
    """What hosts may complain of, in words; empty: nothing."""
    found = []
    for host, of_host in sorted(_by_host(hits).items()):
        delay_s = rules.delays.get(host)
        found += _paced(of_host, rules, jitter_s) if delay_s is None else _spaced(of_host, delay_s, jitter_s)
        found += _at_once(of_host, rules.per_host, jitter_s)
        found += _held(of_host, jitter_s)
    return found


def changes_of_asker(hits):
    """host -> how often another asked than the one before."""
    pairs = {host: itertools.pairwise(of_host) for host, of_host in _by_host(hits).items()}
    return {host: sum(a.asker != b.asker for a, b in both) for host, both in pairs.items()}


def _by_host(hits):
    found = defaultdict(list)
    for hit in sorted(hits, key=lambda h: h.began):
        found[hit.host].append(hit)
    return found


def _paced(hits, rules, jitter_s):
    """The rate after a burst: the same bucket as the fetcher's, over whoever asked (GCRA)."""
    spacing_s, full_at, found = 1 / rules.rate, -float("inf"), []
    for hit in hits:
        early_s = full_at - (rules.burst - 1) * spacing_s - hit.began
        if early_s > jitter_s:
            found.append(f"{hit.host}: {hit.path} came {early_s:.2f} s too early, from {hit.asker}")
        full_at = max(full_at, hit.began) + spacing_s
    return found


def _spaced(hits, delay_s, jitter_s):
    gaps = ((b, b.began - a.began, a.asker) for a, b in itertools.pairwise(hits))
    return [
        f"{b.host}: {b.path} after {gap:.2f} s, its Crawl-delay is {delay_s:g} s; from {a} to {b.asker}"
        for b, gap, a in gaps
        if gap < delay_s - jitter_s
    ]


def _at_once(hits, most, jitter_s):
    """A server hears of a hang-up a little later than it happens; of its own answer's end it knows before the asker."""
    ends = [hit.ended - (jitter_s if hit.aborted else 0.0) for hit in hits]
    found = []
    for i, hit in enumerate(hits):
        here = 1 + sum(end > hit.began for end in ends[:i])
        if here > most:
            found.append(f"{hit.host}: {here} at once when {hit.path} came from {hit.asker}")
    return found


def _held(hits, jitter_s):
    found = []
    for told in (hit for hit in hits if hit.retry_after_s):
        start, end = told.ended + jitter_s, told.ended + told.retry_after_s - jitter_s
        found += [
            f"{h.host}: {h.path} came {told.ended + told.retry_after_s - h.began:.2f} s before Retry-After was over, from {h.asker}; told to {told.asker}"
            for h in hits
            if start < h.began < end
        ]
    return found


class Town:
    """Serves a picture at every path but /robots.txt and /to/<host>/..., which redirects."""

    def __init__(self, hosts, *, delays=None, takes=None):
        self.hosts, self.delays, self.takes = tuple(hosts), delays or {}, takes or {}  # seconds
        self.hits, self.lock, self.port = [], threading.Lock(), 0
        self.busy = {}  # host -> Retry-After of its next answer

    def log(self):
        with self.lock:
            return list(self.hits)

    def told(self, host):
        """When a host last named a time."""
        return next((hit.ended for hit in reversed(self.log()) if hit.host == host and hit.retry_after_s), None)

    def url(self, host, path):
        return f"http://{host}:{self.port}{path}"

    async def answer(self, request):
        host = request.host.partition(":")[0]
        hit = Hit(host, request.headers.get("User-Agent", ""), time.monotonic(), path=request.path)
        with self.lock:
            self.hits.append(hit)
        try:
            if request.path == "/robots.txt":
                return web.Response(text=f"User-agent: *\nCrawl-delay: {self.delays[host]:g}\n" if host in self.delays else "")
            await asyncio.sleep(self.takes.get(host, 0.02))
            if after_s := self.busy.pop(host, 0):
                hit.retry_after_s = after_s
                return web.Response(status=429, headers={"Retry-After": str(after_s)})
            if request.path.startswith("/to/"):
                return web.Response(status=302, headers={"Location": self.url(request.path.split("/")[2], f"/from/{host}{request.path}")})
            return web.Response(body=PICTURE)
        except asyncio.CancelledError:
            hit.aborted = True
            raise
        finally:
            hit.ended = time.monotonic()

    @contextmanager
    def open(self):
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start():
            app = web.Application()
            app.router.add_get("/{tail:.*}", self.answer)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            for host in self.hosts:
                await web.TCPSite(runner, host, self.port).start()
                self.port = runner.addresses[0][1]
            ready.set()
            return runner

        def work():
            asyncio.set_event_loop(loop)
            runner = loop.run_until_complete(start())
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
