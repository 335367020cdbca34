"""robots.txt as RFC 9309 has it: its own examples, what servers answer, what they send, and one request for all who ask."""

import asyncio
import gzip

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from ingest.fetch.client import Client
from ingest.fetch.robots import BODY_BYTES, RULES, Allowed, Disallowed, Page, Robots, Unknown, parse, product_token
from streamlearn.contract.config import FetchConfig
from tests.ingest.virtual import run

SIMPLE = """
User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""  # RFC 9309, 5.1
LONGEST = """
User-Agent: foobot
Allow: /example/page/
Disallow: /example/page/disallowed.gif
"""  # 5.2


def may(text, path, token="streamlearn"):
    body = text if isinstance(text, bytes) else text.encode()
    return isinstance(parse(body, token).verdict(str(URL(f"http://example.com{path}"))), Allowed)


@pytest.mark.parametrize(
    ("token", "path", "allowed"),
    [
        ("foobot", "/example/page.html", True),
        ("foobot", "/example/allowed.gif", True),
        ("foobot", "/", False),
        ("foobot", "/publications/", False),
        ("barbot", "/example/page.html", False),
        ("bazbot", "/example/page.html", False),
        ("barbot", "/example/", True),
        ("bazbot", "/a.gif", True),
        ("quxbot", "/example/page.html", True),
        ("quxbot", "/a.gif", True),
        ("other", "/a.gif", False),
        ("other", "/a.gif.jpg", True),
        ("other", "/example/x", False),
        ("other", "/publications/x.gif", True),  # /publications/ is longer than *.gif$
        ("other", "/x", True),
    ],
)
def test_the_simple_example_of_section_5_1(token, path, allowed):
    assert may(SIMPLE, path, token) is allowed


@pytest.mark.parametrize(
    ("path", "allowed"), [("/example/page/", True), ("/example/page/x", True), ("/example/page/disallowed.gif", False)]
)
def test_the_longest_match_of_section_5_2(path, allowed):
    assert may(LONGEST, path, "foobot") is allowed


def test_groups_of_one_name_are_merged_and_names_have_no_case():
    """Section 2.2.1, its example."""
    text = "user-agent: ExampleBot\ndisallow: /foo\ndisallow: /bar\n\nuser-agent: EXAMPLEBOT\ndisallow: /baz\n\nuser-agent: *\ndisallow: /only-others\n"
    assert [may(text, p, "examplebot") for p in ("/foo", "/bar", "/baz", "/only-others", "/qux")] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("streamlearn", True),
        ("STREAMLEARN", True),
        ("streamlearn/0.1", True),
        ("streamlearn (bot)", True),
        ("stream", False),
        ("learn", False),
        ("streamlearn2", False),
        ("my-streamlearn", False),
        ("", False),
    ],
)
def test_a_group_is_ours_by_the_whole_token(name, ours):
    assert may(f"User-agent: {name}\nDisallow: /\n", "/x") is not ours


@pytest.mark.parametrize(
    ("rule", "path", "matches"),
    [  # the table of section 2.2.2: pattern, then what is asked for
        ("/foo/bar?baz=quz", "/foo/bar?baz=quz", True),
        ("/foo/bar?baz=https://foo.bar", "/foo/bar?baz=https%3A%2F%2Ffoo.bar", True),
        ("/foo/bar/ツ", "/foo/bar/%E3%83%84", True),
        ("/foo/bar/%E3%83%84", "/foo/bar/ツ", True),
        ("/foo/bar/%E3%83%84", "/foo/bar/%e3%83%84", True),
        ("/foo/bar/%62%61%7A", "/foo/bar/baz", True),
        ("/foo/bar/baz", "/foo/bar/%62%61%7A", True),
        # section 2.2.3
        ("/this/path/exactly$", "/this/path/exactly", True),
        ("/this/path/exactly$", "/this/path/exactly/not", False),
        ("/this/*/exactly", "/this/long/path/exactly", True),
        ("/this/*/exactly", "/this/exactly", False),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-*.html", True),
        ("/path/file-with-a-%2A.html", "/path/file-with-a-b.html", False),
        ("/path/foo-%24", "/path/foo-$", True),
        ("/path/foo-%24", "/path/foo-", False),
        ("/ # a comment", "/x", True),
        ("/X", "/x", False),
        ("*", "/x", True),
        ("", "/x", False),
    ],
)
def test_how_a_path_is_matched(rule, path, matches):
    assert may(f"User-agent: *\nDisallow: {rule}\n", path) is not matches


@pytest.mark.parametrize(
    "text", ["Allow: /page\nDisallow: /page", "Disallow: /page\nAllow: /page"], ids=["allow first", "disallow first"]
)  # 2.2.2: if equivalent, allow
def test_of_two_rules_of_one_length_the_one_that_allows_counts(text):
    assert may(f"User-agent: *\n{text}\n", "/page")


def test_robots_txt_itself_is_always_allowed():
    assert may("User-agent: *\nDisallow: /\n", "/robots.txt")


def test_other_records_end_no_group():
    """Section 2.2.4."""
    assert not may("User-agent: a\nSitemap: http://example.com/s\nUser-agent: *\nNoise: 1\nDisallow: /x\n", "/x")


def test_what_is_asked_for_is_judged_not_how_it_was_written():
    assert not may("User-agent: *\nDisallow: /private\n", "/open/../private/x.jpg")


def test_the_deciding_rule_is_told():
    text = "User-agent: *\nDisallow: /a\nDisallow: /a/b/c/d\n\nUser-agent: streamlearn\nDisallow: /a/\nAllow: /a/b/\n"
    assert parse(text.encode(), "streamlearn").verdict("http://h/a/x") == Disallowed("Disallow: /a/")
    assert parse(text.encode(), "else").verdict("http://h/a/b/c/d/e") == Disallowed("Disallow: /a/b/c/d")


@pytest.mark.parametrize(
    ("lines", "delay"),
    [
        ("", None),
        ("Crawl-delay: 5", 5.0),
        ("crawl-delay:0.5", 0.5),
        ("Request-rate: 1/10", 10.0),
        ("Request-rate: 2/1m", 30.0),
        ("Crawl-delay: 3\nRequest-rate: 1/10", 10.0),
        ("Crawl-delay: 0", None),
        ("Crawl-delay: soon", None),
        ("Crawl-delay: -1", None),
        ("Crawl-delay: inf", None),
        ("Crawl-delay: nan", None),
        (f"Request-rate: 1/{10**400}", 1e9),
        (f"Request-rate: {10**400}/1", 1e-9),
    ],
)
def test_delays_are_for_us_or_for_all(lines, delay):
    assert (
        parse(f"User-agent: streamlearn\n{lines}\nDisallow:\n\nUser-agent: *\nCrawl-delay: 99\n".encode(), "streamlearn").delay_s == delay
    )
    assert parse(f"User-agent: other\nCrawl-delay: 99\n\nUser-agent: *\n{lines}\n".encode(), "streamlearn").delay_s == delay


@pytest.mark.parametrize(
    ("agent", "token"),
    [
        (FetchConfig().user_agent, "streamlearn"),
        ("MyBot/2.0 (+mailto:me@example.org)", "mybot"),
        ("MyBot", "mybot"),
        (" my_bot-x / 1", "my_bot-x"),
        ("two words/1", "two"),
        ("*/1", ""),
        ("/1", ""),
        ("", ""),
    ],
)
def test_the_product_token_is_the_user_agent_up_to_the_slash(agent, token):
    assert product_token(agent) == token


def test_without_a_token_the_rules_for_all_count():
    assert not may("User-agent: *\nDisallow: /x\n", "/x", "") and may("User-agent: a\nDisallow: /x\n", "/x", "")


# -- what servers send --

PLAIN = b"User-agent: *\nDisallow: /no\n"


@pytest.mark.parametrize(
    "body",
    [
        PLAIN,
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        PLAIN.replace(b"\n", b"\r"),
        PLAIN.rstrip(),
        b"\0" + PLAIN.replace(b":", b":\0\0"),
        PLAIN.decode().encode("utf-16"),
        PLAIN.replace(b": ", b":\t"),
        b"\xff\xfe\xfd\n" + PLAIN,
        b"<html><body>User agents welcome</body></html>\n" + PLAIN,
        b"A" * 200_000 + b"\n" + PLAIN,
        gzip.compress(PLAIN),
        PLAIN + b"Allow: /" + b"n" * 10**7,
        PLAIN.replace(b"Disallow", b"Dissalow"),
        PLAIN.upper().replace(b"/NO", b"/no"),
    ],
    ids=lambda body: repr(body[:24]),
)
def test_rules_are_found_in_whatever_they_come_in(body):
    assert not may(body, "/no") and may(body, "/yes")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xef\xbb\xbf",
        b"\x1f\x8b broken",
        bytes(range(256)) * 2000,
        b"\0" * 10**6,
        b"\n" * 10**6,
        b"<!doctype html><p>404",
        b"Disallow: /",
        b"\xff\xfe",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_holds_no_rules_allows(body):
    assert may(body, "/x")


def test_a_bomb_is_expanded_no_further_than_the_cap():
    assert may(gzip.compress(b"#" * 10**8), "/x")


def test_a_body_over_the_cap_counts_up_to_its_last_whole_line():
    line = b"Disallow: /%06d\n"
    body = (
        b"User-agent: *\nDisallow: /first\nAllow: /\n" + b"# " + b"x" * (BODY_BYTES - 60) + b"\n" + b"".join(line % i for i in range(1000))
    )
    assert not may(body, "/first") and may(body, "/000999")
    cut = (
        b"User-agent: *\nDisallow: /\n#" + b"x" * (BODY_BYTES - 40) + b"\nAllow: /no-further\n"
    )  # torn in `Allow: /no-f`, which would allow more
    assert not may(cut, "/no-fox")


def test_rules_over_the_cap_are_dropped_but_only_ours_count():
    others = "User-agent: other\n" + "Disallow: /x\n" * (RULES + 10)
    many = "User-agent: *\n" + "".join(f"Disallow: /{i}-\n" for i in range(RULES + 10))
    assert len(parse((others + many).encode(), "streamlearn").lines) == RULES
    assert not may(others + many, "/7-") and may(others + many, f"/{RULES + 5}-")


LINES = st.lists(
    st.tuples(
        st.sampled_from(
            ["User-agent", "user agent", "Disallow", "Allow", "Crawl-delay", "Request-rate", "Sitemap", "Host", "Visit-time", ""]
        ),
        st.sampled_from([":", " ", ": ", "", "::"]),
        st.text(alphabet="*$/%aA0 \t\0\x0b\x85\u2028:#?é\U0001f600", max_size=12)
        | st.sampled_from(["*", "streamlearn", "/", "1/0", "1/5s 1-2", "1e400"]),
    ).map("".join),
    max_size=12,
).map("\n".join)


@given(body=st.binary(max_size=300) | LINES.map(str.encode), path=st.text(alphabet="/%aA0*$?é.", max_size=10))
@settings(max_examples=400, deadline=None)
def test_no_bytes_raise(body, path):
    rules = parse(body, "streamlearn")
    verdict = rules.verdict(str(URL(f"http://h/{path}")))
    assert isinstance(verdict, Allowed | Disallowed)
    if isinstance(verdict, Disallowed):
        assert verdict.rule.startswith("Disallow") and verdict.rule.encode()


# -- the cache --


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
