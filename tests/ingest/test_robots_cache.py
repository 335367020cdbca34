"""How rules of robots.txt are kept, and asked for over the wire."""

import asyncio

import pytest
from aiohttp import web
from yarl import URL

from ingest.fetch.client import Client
from ingest.fetch.robots import Allowed, Disallowed, Page, Robots, Unknown
from streamlearn.contract.config import FetchConfig
from tests.ingest.test_robots import PLAIN
from tests.ingest.virtual import run


class Web:
    """Answers for robots.txt, counted."""

    def __init__(self, **pages):
        self.pages, self.asked, self.takes = pages, [], 0.0

    async def get(self, url):
        self.asked.append(str(url))
        await asyncio.sleep(self.takes)
        return self.pages.get(url.host, Page(404))


def cache(web, clock, **more):
    return Robots(web.get, clock=clock, **{"token": "streamlearn", "ttl_s": 86400.0, "retry_s": 600.0, "entries": 100} | more)


DENY = b"User-agent: *\nDisallow: /\n"


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        (Page(200, DENY), Disallowed),
        (Page(206, DENY), Disallowed),
        (Page(200), Allowed),
        (Page(401, DENY), Allowed),
        (Page(403), Allowed),
        (Page(404), Allowed),
        (Page(410), Allowed),
        (Page(302), Allowed),
        (Page(429), Unknown),
        (Page(500), Unknown),
        (Page(503), Unknown),
        (Page(520), Unknown),
        (Page(0, detail="nobody"), Unknown),
    ],
)
def test_what_each_answer_means(page, kind):
    async def main(clock):
        return await cache(Web(h=page), clock).verdict(URL("http://h/x"))

    got = run(main)
    assert isinstance(got, kind)
    if kind is Unknown:
        assert got.after_s == pytest.approx(600) and "http://h/robots.txt" in got.detail


def asked_at(seconds, page, **more):
    """How often robots.txt was asked for, by looks at these times."""

    async def main(clock):
        web, began = Web(h=page), clock()
        robots = cache(web, clock, **more)
        for at in seconds:
            await asyncio.sleep(began + at - clock())
            await robots.verdict(URL("http://h/x"))
        return len(web.asked)

    return run(main)


def test_rules_are_kept_a_day():
    assert asked_at([0, 1, 86399], Page(200, DENY)) == 1
    assert asked_at([0, 86401], Page(200, DENY)) == 2
    assert asked_at([0, 86399], Page(404)) == 1


def test_max_age_counts_if_it_is_shorter_but_not_under_an_hour():
    assert asked_at([0, 7199], Page(200, DENY, max_age_s=7200)) == 1
    assert asked_at([0, 7201], Page(200, DENY, max_age_s=7200)) == 2
    assert asked_at([0, 3599], Page(200, DENY, max_age_s=0)) == 1
    assert asked_at([0, 3601], Page(200, DENY, max_age_s=0)) == 2
    assert asked_at([0, 86401], Page(200, DENY, max_age_s=1e9)) == 2


def test_trouble_is_kept_a_short_time_or_as_long_as_was_said():
    assert asked_at([0, 599], Page(500)) == 1
    assert asked_at([0, 601], Page(500)) == 2
    assert asked_at([0, 1999], Page(503, after_s=2000)) == 1
    assert asked_at([0, 2001], Page(503, after_s=2000)) == 2
    assert asked_at([0, 601], Page(403, passing=True)) == 2


def test_scheme_host_and_port_have_rules_of_their_own():
    async def main(clock):
        web = Web()
        robots = cache(web, clock)
        for url in ("http://h/x", "http://H:80/y?z", "http://h./", "https://h/x", "https://h:443/", "http://h:8080/x", "http://other/x"):
            await robots.verdict(URL(url))
        return web.asked

    assert run(main) == ["http://h/robots.txt", "https://h/robots.txt", "http://h:8080/robots.txt", "http://other/robots.txt"]


def test_all_who_ask_at_once_share_one_request_and_a_cancelled_one_takes_it_from_nobody():
    async def main(clock):
        web = Web(h=Page(200, DENY))
        web.takes = 5.0
        robots = cache(web, clock)
        tasks = [asyncio.create_task(robots.verdict(URL(f"http://h/{i}"))) for i in range(50)]
        await asyncio.sleep(1.0)
        tasks[0].cancel()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(got[0], asyncio.CancelledError) and all(isinstance(v, Disallowed) for v in got[1:])
        assert robots._asking == {}
        return web.asked

    assert run(main) == ["http://h/robots.txt"]


def test_closing_ends_what_is_under_way():
    async def main(clock):
        web = Web()
        web.takes = 1e6
        robots = cache(web, clock)
        task = asyncio.create_task(robots.verdict(URL("http://h/x")))
        await asyncio.sleep(1.0)
        await robots.close()
        return await asyncio.gather(task, return_exceptions=True)

    assert isinstance(run(main)[0], asyncio.CancelledError)


def test_the_least_lately_used_goes():
    async def main(clock):
        web = Web()
        robots = cache(web, clock, entries=2)
        for host in ("a", "b", "a", "c", "a", "b"):
            await robots.verdict(URL(f"http://{host}/x"))
        return [URL(u).host for u in web.asked]

    assert run(main) == ["a", "b", "c", "b"]


def test_large_files_push_others_out_by_their_weight(monkeypatch):
    monkeypatch.setattr("ingest.fetch.robots.WEIGHT_BYTES", 10**6)
    large = Page(200, b"User-agent: *\n" + b"Disallow: /x\n" * 1000)  # about 740 kB

    async def main(clock):
        web = Web(a=large, b=large)
        robots = cache(web, clock)
        for host in ("a", "b", "b", "a", "small", "small", "a"):
            await robots.verdict(URL(f"http://{host}/x"))
        assert robots._weight == sum(entry.weight for entry in robots._kept.values())
        return [URL(u).host for u in web.asked]

    assert run(main) == ["a", "b", "a", "small"]


def test_heavy_rules_are_matched_as_light_ones_are():
    text = "User-agent: *\n" + "".join(f"Disallow: /{i}-\n" for i in range(1000))

    async def main(clock):
        robots = cache(Web(h=Page(200, text.encode())), clock)
        return [await robots.verdict(URL(f"http://h/{path}")) for path in ("100-x", "free")]

    assert run(main) == [Disallowed("Disallow: /100-"), Allowed(None)]


# -- over the wire --


def over_the_wire(handler, *, urls=("/x.jpg",), **more):
    """Verdicts for paths of a real server whose robots.txt (and whatever it redirects to) `handler` answers; and the paths it was asked for."""
    asked = []

    async def answer(request):
        asked.append(request.path)
        return await handler(request)

    async def go():
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            base = f"http://127.0.0.1:{runner.addresses[0][1]}"
            config = FetchConfig(
                **{"allow_networks": ("127.0.0.0/8",), "host_rate": 0, "total_timeout_s": 2.0, "connect_timeout_s": 1.0} | more
            )
            async with Client(config) as client:
                return await asyncio.gather(*(client.robots.verdict(URL(base + url)) for url in urls)), asked
        finally:
            await runner.cleanup()

    return asyncio.run(go())


def test_a_server_sees_one_request_whoever_asks():
    async def handler(request):
        await asyncio.sleep(0.05)
        assert "gzip" not in request.headers["Accept-Encoding"]
        return web.Response(body=PLAIN, headers={"Cache-Control": "public, max-age=7200"})

    verdicts, asked = over_the_wire(handler, urls=[f"/{'no' if i % 2 else 'yes'}/{i}" for i in range(40)])
    assert asked == ["/robots.txt"]
    assert [type(v) for v in verdicts] == [Allowed, Disallowed] * 20


@pytest.mark.parametrize(("hops", "kind"), [(1, Disallowed), (5, Disallowed), (6, Allowed)])
def test_five_redirects_are_followed(hops, kind):
    async def handler(request):
        at = 0 if request.path == "/robots.txt" else int(request.path[1:])
        if at < hops:
            raise web.HTTPFound(f"/{at + 1}")
        return web.Response(body=DENY)

    verdicts, asked = over_the_wire(handler)
    assert isinstance(verdicts[0], kind) and len(asked) == min(hops, 5) + 1


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/robots.txt", "file:///etc/passwd", "http://user:secret@127.0.0.1/", "http://[", "//:0"]
)
def test_a_redirect_to_a_guarded_place_is_not_followed_and_allows(target):
    async def handler(request):
        return web.Response(status=301, headers={"Location": target})

    verdicts, asked = over_the_wire(handler)
    assert verdicts == [Allowed(None)] and asked == ["/robots.txt"]


def test_an_endless_file_is_read_up_to_the_cap():
    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(DENY)
        try:
            for _ in range(10**6):
                await response.write(b"# more\n" * 1000)
        except ConnectionError:
            cut.append(True)
        return response

    cut = []
    verdicts, _ = over_the_wire(handler)
    assert isinstance(verdicts[0], Disallowed) and cut


def test_a_server_that_does_not_answer_is_unknown():
    async def handler(request):
        await asyncio.sleep(20)

    verdicts, _ = over_the_wire(handler, total_timeout_s=0.3)
    assert isinstance(verdicts[0], Unknown) and "no whole answer" in verdicts[0].detail and verdicts[0].after_s > 500


@pytest.mark.parametrize("status", [500, 503, 599])
def test_a_server_in_trouble_is_unknown(status):
    async def handler(request):
        return web.Response(status=status)

    assert isinstance(over_the_wire(handler)[0][0], Unknown)
