"""The real client against real servers that note when each request came, and how many were there at once."""

import asyncio
import itertools
import json
import threading
import time
from email.utils import formatdate

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from ingest.fetch.client import Client, Fetched, Unanswered
from ingest.fetch.run import run_fetch
from ingest.fetch.screen import Reason, Refused
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import FetchConfig
from streamlearn.contract.event_log import CANDIDATES, HOSTS, NewRecord
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.status import Heartbeat
from tests.ingest.server import Place, Site, picture, serving
from tests.ingest.test_hosts import TakenOver

EARLY = 0.5  # of the spacing: a request may be longer under way than the next one, on a busy machine
PICTURE = picture(1)


class Watched:
    """Notes arrivals; answers /robots.txt with `robots`, paths of `pages` with theirs, everything else with a picture."""

    def __init__(self, robots="", **pages):
        self.robots, self.pages = robots, {f"/{name}": page for name, page in pages.items()}
        self.arrivals, self.here, self.most, self.takes = [], 0, 0, 0.0  # (path, monotonic seconds); requests at once

    @property
    def paths(self):
        return [path for path, _ in self.arrivals]

    async def answer(self, request):
        self.arrivals.append((request.path, time.monotonic()))
        self.here += 1
        self.most = max(self.most, self.here)
        try:
            await asyncio.sleep(self.takes)
            if request.path == "/robots.txt":
                return web.Response(text=self.robots) if isinstance(self.robots, str) else self.robots()
            page = self.pages.get(request.path)
            return page() if page else web.Response(body=PICTURE)
        finally:
            self.here -= 1

    async def start(self):
        app = web.Application()
        app.router.add_get("/{tail:.*}", self.answer)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.base = f"http://127.0.0.1:{self.runner.addresses[0][1]}"


def config(**more):
    plain = {"allow_networks": ("127.0.0.0/8",), "host_rate": 0, "breaker_failures": 0, "backoff_s": 0.01, "total_timeout_s": 10.0}
    return FetchConfig(**plain | more)


def with_servers(*sites, main):
    async def go():
        for site in sites:
            await site.start()
        try:
            return await main()
        finally:
            for site in sites:
                await site.runner.cleanup()

    return asyncio.run(go())


def candidate(url):
    return Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z")


def fetch_all(site, *paths, others=(), settings=None):
    async def main():
        async with Client(settings or config()) as client:
            return await asyncio.gather(*(client.fetch(candidate(path if "://" in path else site.base + path)) for path in paths))

    return with_servers(site, *others, main=main)


def gaps(site):
    times = [at for _, at in site.arrivals]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_a_crawl_delay_lies_between_any_two_requests():
    site = Watched("User-agent: *\nCrawl-delay: 0.4\n")
    got = fetch_all(site, "/1.jpg", "/2.jpg", "/3.jpg")
    assert all(isinstance(g, Fetched) for g in got) and len(site.arrivals) == 4  # robots.txt is one of them
    assert min(gaps(site)) >= 0.4 * EARLY


def test_the_rate_is_kept_after_the_burst():
    site = Watched()
    fetch_all(site, *(f"/{i}.jpg" for i in range(8)), settings=config(host_rate=2.5, host_burst=4))
    times = [at for _, at in site.arrivals]
    for first in range(len(times)):
        for last in range(first + 4, len(times)):  # more than a burst takes at least so long
            assert times[last] - times[first] >= (last - first - 3) / 2.5 * EARLY


def test_no_more_requests_at_once_than_slots():
    site = Watched()
    site.takes = 0.05
    fetch_all(site, *(f"/{i}.jpg" for i in range(20)), settings=config(per_host=3))
    assert site.most <= 3 and len(site.arrivals) == 21


def test_quick_tries_take_turns_too():
    site = Watched("User-agent: *\nCrawl-delay: 0.4\n", **{"1.jpg": lambda: web.Response(status=502)})
    (got,) = fetch_all(site, "/1.jpg")
    assert isinstance(got, Unanswered) and site.paths == ["/robots.txt", "/1.jpg", "/1.jpg", "/1.jpg"]
    assert min(gaps(site)) >= 0.4 * EARLY


def test_what_is_disallowed_is_never_asked_for():
    site = Watched("User-agent: streamlearn\nDisallow: /private/\n\nUser-agent: *\nDisallow: /\n")
    private, odd, public = fetch_all(site, "/private/1.jpg", "/public/../private/%32.jpg", "/public/1.jpg")
    assert isinstance(private, Refused) and private.reason == Reason.ROBOTS and "Disallow: /private/" in private.detail
    assert isinstance(odd, Refused) and odd.reason == Reason.ROBOTS
    assert isinstance(public, Fetched) and site.paths == ["/robots.txt", "/public/1.jpg"]


def test_robots_txt_can_be_switched_off():
    site = Watched("User-agent: *\nDisallow: /\n")
    (got,) = fetch_all(site, "/1.jpg", settings=config(robots=False))
    assert isinstance(got, Fetched) and site.paths == ["/1.jpg"]


def to(target):
    return lambda: web.Response(status=302, headers={"Location": target})


def test_a_redirect_to_a_disallowed_path_is_not_followed():
    site = Watched("User-agent: *\nDisallow: /private\n", **{"1.jpg": to("/private.jpg")})
    (got,) = fetch_all(site, "/1.jpg")
    assert isinstance(got, Refused) and got.reason == Reason.ROBOTS and site.paths == ["/robots.txt", "/1.jpg"]


def test_a_redirect_to_another_origin_obeys_the_rules_of_that_one():
    open_site, closed = Watched("User-agent: *\nAllow: /\n"), Watched("User-agent: *\nDisallow: /\n")
    open_site.pages["/1.jpg"] = lambda: web.Response(status=301, headers={"Location": f"{closed.base}/1.jpg"})
    (got,) = fetch_all(open_site, "/1.jpg", others=[closed])
    assert isinstance(got, Refused) and got.reason == Reason.ROBOTS and closed.paths == ["/robots.txt"]


def test_a_redirect_takes_a_turn_with_the_host_it_leads_to():
    """Both names are this machine; each is a host with a budget of its own, and the second is on hold."""
    site = Watched()
    site.pages["/1.jpg"] = lambda: web.Response(status=301, headers={"Location": site.base.replace("127.0.0.1", "127.0.0.2") + "/2.jpg"})

    async def main():
        async with Client(config()) as client:
            client.hosts.hold("127.0.0.2", 50.0)
            return await client.fetch(candidate(site.base + "/1.jpg"))

    got = with_servers(site, main=main)
    assert isinstance(got, Unanswered) and got.after_s == pytest.approx(50, abs=5) and site.paths == ["/robots.txt", "/1.jpg"]


@pytest.mark.parametrize("target", ["http://[", "http://a\\@b/", "\x80\xff", "//:0", "http://%zz/", "http://xn--/"])
def test_whatever_a_redirect_names_there_is_an_answer(target):
    site = Watched(**{"1.jpg": to(target)})
    (got,) = fetch_all(site, "/1.jpg", settings=config(attempts=1, total_timeout_s=2.0))
    assert isinstance(got, Refused | Unanswered | Fetched)
    if isinstance(got, Refused | Unanswered):
        got.detail.encode()


def test_a_host_that_wants_longer_pauses_than_we_wait_is_left_alone():
    site = Watched("User-agent: *\nCrawl-delay: 61\n")
    (got,) = fetch_all(site, "/1.jpg")
    assert isinstance(got, Refused) and got.reason == Reason.CRAWL_DELAY and site.paths == ["/robots.txt"]


def test_a_long_crawl_delay_defers_and_nobody_sleeps_for_it():
    site = Watched("User-agent: *\nCrawl-delay: 50\n")
    first, second = fetch_all(site, "/1.jpg", "/2.jpg")
    assert isinstance(first, Unanswered) and isinstance(second, Unanswered)
    assert sorted([round(first.after_s / 50), round(second.after_s / 50)]) == [1, 2] and site.paths == ["/robots.txt"]


@pytest.mark.parametrize("status", [500, 503])
def test_while_robots_txt_is_in_trouble_nothing_else_is_asked_for(status):
    site = Watched(lambda: web.Response(status=status))
    got = fetch_all(site, "/1.jpg", "/2.jpg")
    assert all(isinstance(g, Unanswered) and g.after_s > 500 and f"HTTP {status}" in g.detail for g in got) and site.paths == [
        "/robots.txt"
    ]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_robots_txt_allows(status):
    (got,) = fetch_all(Watched(lambda: web.Response(status=status)), "/1.jpg")
    assert isinstance(got, Fetched)


@pytest.mark.parametrize(
    "headers", [{"X-Robots-Tag": "noai"}, {"X-Robots-Tag": "streamlearn: noimageai"}, {"X-Robots-Tag": "noindex"}, {"TDM-Reservation": "1"}]
)
def test_an_image_whose_headers_opt_out_is_refused(headers):
    (got,) = fetch_all(Watched(**{"1.jpg": lambda: web.Response(body=PICTURE, headers=headers)}), "/1.jpg")
    assert isinstance(got, Refused) and got.reason == Reason.OPT_OUT and got.http_status == 200


def test_its_body_is_not_read():
    async def main():
        site.pages["/1.jpg"] = lambda: web.Response(body=b"x" * 10**8, headers={"X-Robots-Tag": "noai"})
        async with Client(config()) as client:
            return await client.fetch(candidate(site.base + "/1.jpg"))

    site = Watched()
    got = with_servers(site, main=main)
    assert got.reason == Reason.OPT_OUT  # not TOO_LARGE: what was said comes first


def test_noindex_counts_only_if_it_is_to_be_respected():
    site = Watched(**{"1.jpg": lambda: web.Response(body=PICTURE, headers={"X-Robots-Tag": "noindex"})})
    (got,) = fetch_all(site, "/1.jpg", settings=config(respect_noindex=False))
    assert isinstance(got, Fetched)


def busy(value, status=429):
    return lambda: web.Response(status=status, headers={"Retry-After": value() if callable(value) else value})


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", ["120", lambda: formatdate(time.time() + 121, usegmt=True)], ids=["seconds", "date"])
def test_a_time_that_the_server_names_is_kept_by_all_and_over_a_restart(value, status):
    site = Watched(**{"1.jpg": busy(value, status)})

    async def main():
        async with Client(config()) as client:
            first = await client.fetch(candidate(site.base + "/1.jpg"))
            second = await client.fetch(candidate(site.base + "/2.jpg"))
            kept = json.loads(json.dumps(client.hosts.kept("127.0.0.1")))
        async with Client(config()) as client:
            assert client.hosts.take_up("127.0.0.1", kept)
            third = await client.fetch(candidate(site.base + "/3.jpg"))
        return first, second, third

    for got in with_servers(site, main=main):
        assert isinstance(got, Unanswered) and got.after_s == pytest.approx(120, abs=20), got
    assert site.paths == ["/robots.txt", "/1.jpg"]


def fetched_by_the_role(home, urls):
    """Run the whole role over new candidates until it has an outcome for each."""
    place = Place(home)
    place.log.ensure_topic(CANDIDATES, place.config.log.partitions)
    place.log.append([NewRecord(CANDIDATES, b"", candidate(url).to_json(), 0) for url in urls])
    end, stop = place.log.bounds(CANDIDATES, 0)[1], threading.Event()

    def watch():
        watcher = Place(home)  # connections of its own
        deadline = time.monotonic() + 60
        while watcher.catalog.position(CANDIDATES, 0) < end and time.monotonic() < deadline:
            time.sleep(0.05)
        stop.set()

    thread = threading.Thread(target=watch)
    thread.start()
    metrics = FetchMetrics(CollectorRegistry())
    run_fetch(place.config, place.log, place.store, place.catalog, metrics, Heartbeat(home, "fetch"), stop=stop, home=home)
    thread.join(60)
    assert place.catalog.position(CANDIDATES, 0) == end


@pytest.mark.parametrize("kept", [True, False])
def test_the_role_keeps_what_hosts_asked_for_over_restarts(tmp_path, kept):
    site = Site()
    with serving(site) as base:
        fetched_by_the_role(tmp_path, [f"{base}/trouble/busy"])  # Retry-After: 77
        if not kept:
            Place(tmp_path).log.append([NewRecord(HOSTS, b"127.0.0.1", b'{"hold_until": [')])
        fetched_by_the_role(tmp_path, [f"{base}/7.jpg"])
    assert site.hits["busy"] == 1 and site.hits.get(7, 0) == (0 if kept else 1)


def test_an_absurd_time_is_a_day():
    (got,) = fetch_all(Watched(**{"1.jpg": busy("999999999999")}), "/1.jpg")
    assert isinstance(got, Unanswered) and got.after_s == 86400


def test_a_crawl_delay_is_kept_over_a_restart():
    site = Watched("User-agent: *\nCrawl-delay: 40\n")

    async def main():
        settings = config(max_wait_s=0.2)
        async with Client(settings) as client:
            await client.fetch(candidate(site.base + "/1.jpg"))
            kept = json.loads(json.dumps(client.hosts.kept("127.0.0.1")))
        async with Client(settings, rights=TakenOver(time.monotonic())) as client:
            assert client.hosts.take_up("127.0.0.1", kept)
            return await client.fetch(candidate(site.base + "/1.jpg"))

    got = with_servers(site, main=main)
    assert isinstance(got, Unanswered) and 0 < got.after_s <= 40 and site.paths == ["/robots.txt"]


def test_a_host_that_fails_is_left_alone_and_then_tried_once():
    failing = lambda: web.Response(status=500)  # noqa: E731
    site = Watched(**{f"{i}.jpg": failing for i in range(10)})

    async def main():
        async with Client(config(breaker_failures=4, breaker_s=2.0, attempts=1)) as client:
            got = [await client.fetch(candidate(f"{site.base}/{i}.jpg")) for i in range(7)]
            assert site.paths == ["/robots.txt", "/0.jpg", "/1.jpg", "/2.jpg", "/3.jpg"]
            assert [g.after_s > 0 for g in got] == [False] * 4 + [True] * 3
            await asyncio.sleep(2.1)
            site.pages.clear()  # it is well again
            site.takes = 0.3
            together = await asyncio.gather(*(client.fetch(candidate(f"{site.base}/{i}.jpg")) for i in range(3)))
            assert [type(g) for g in together] == [Fetched, Unanswered, Unanswered]
            return await client.fetch(candidate(f"{site.base}/9.jpg"))

    assert isinstance(with_servers(site, main=main), Fetched)


@pytest.mark.parametrize("trouble", ["hangs", "nobody there"])
def test_a_host_that_does_not_answer_is_left_alone(trouble):
    site = Watched()

    async def main():
        async with Client(config(breaker_failures=2, attempts=1, total_timeout_s=0.3, robots=False)) as client:
            if trouble == "hangs":
                site.takes = 20.0
            else:
                await site.runner.cleanup()
            return [await client.fetch(candidate(f"{site.base}/{i}.jpg")) for i in range(4)]

    got = with_servers(site, main=main)
    assert [round(g.after_s, -1) for g in got] == [0, 0, 60, 60] and len(site.arrivals) == (2 if trouble == "hangs" else 0)


def test_time_spent_waiting_for_a_turn_is_not_the_servers():
    site = Watched()
    site.takes = 0.1
    got = fetch_all(site, *(f"/{i}.jpg" for i in range(6)), settings=config(per_host=1, total_timeout_s=0.5))
    assert all(isinstance(g, Fetched) for g in got)


def test_refused_images_do_not_open_the_breaker():
    site = Watched(**{f"{i}.jpg": (lambda: web.Response(status=404)) for i in range(10)})
    got = fetch_all(site, *(f"/{i}.jpg" for i in range(10)), "/picture.jpg", settings=config(breaker_failures=3, per_host=1))
    assert [g.reason for g in got[:10]] == [Reason.GONE] * 10 and isinstance(got[10], Fetched)
