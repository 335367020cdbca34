"""Feeds, from a server that speaks HTTP as feeds do."""

import asyncio
import json
import threading

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from ingest.connectors import feed, feed_parse, html, http
from ingest.connectors.feed import FeedConnector, FeedOptions
from streamlearn.contract.errors import ConfigError, Retryable
from tests.ingest.connectors.harness import Killed, candidates, cursor, go, letters, make_log, urls
from tests.ingest.server import serving
from tests.ingest.test_hostile_urls import HOSTS

RSS = """<?xml version="1.0"?><rss version="2.0" xmlns:media="http://search.yahoo.com/mrss/"
 xmlns:cc="http://backend.userland.com/creativeCommonsRssModule"><channel><title>t</title>%s</channel></rss>"""
ITEM = '<item><guid>urn:%s</guid><title>Picture %s</title><enclosure url="http://img.example/%s.jpg" type="image/jpeg" length="1"/></item>'


def rss(*numbers):
    return (RSS % "".join(ITEM % (n, n, n) for n in numbers)).encode()


def image(n):
    return f"http://img.example/{n}.jpg"


class Feeds:
    """Serves `bodies` by path, with an ETag of the body; keeps what was asked."""

    def __init__(self):
        self.bodies, self.asked, self.status, self.headers = {}, [], {}, {}

    def application(self):
        app = web.Application()
        app.router.add_get("/{name}", self.answer)
        return app

    async def answer(self, request):
        name = request.match_info["name"]
        self.asked.append((name, request.headers.get("If-None-Match"), request.headers.get("User-Agent")))
        status = self.status.get(name, 200)
        if status == "cut":
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n<rss")
            request.transport.close()
            return web.Response()
        if status == "loop":
            raise web.HTTPFound(f"/{name}")
        if isinstance(status, str) and status.startswith(("http", "/", "file:")):
            return web.Response(status=302, headers={"Location": status})
        if status == "drip":  # a header that never ends
            request.transport.write(b"HTTP/1.1 200 OK\r\nX: ")
            for _ in range(10**4):
                request.transport.write(b"x")
                await asyncio.sleep(0.05)
        if status != 200:
            return web.Response(status=status, headers=self.headers)
        tag = f'"{hash(self.bodies[name])}"'
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304)
        return web.Response(body=self.bodies[name], headers={"ETag": tag}, content_type="application/xml")


@pytest.fixture
def site():
    made = Feeds()
    with serving(made) as made.base:
        yield made


def connector(site, *names, **more):
    options = dict(interval_s=600.0, total_s=60.0, timeout_s=30.0) | more
    made = FeedConnector("c", FeedOptions(feeds=tuple(f"{site.base}/{n}" for n in names or ["f"]), **options))
    made.check()
    return made


def due(made):
    """The interval is over."""
    made._later.clear()
    made._due = lambda url, state: float("inf") if state.get("gone") else 0.0
    return made


def test_a_feed_is_told_once_and_asked_for_only_if_it_changed(site, tmp_path):
    log, made = make_log(tmp_path), connector(site)
    site.bodies["f"] = rss(1, 2)
    assert go(log, made) == 2
    assert go(log, made) == 0 and len(site.asked) == 1  # not before the interval is over
    appends = log.appends
    assert go(log, due(made)) == 0 and site.asked[1][1] == f'"{hash(site.bodies["f"])}"'
    assert log.appends == appends  # a 304 writes nothing
    site.bodies["f"] = rss(3, 2)
    assert go(log, due(connector(site))) == 1 and urls(log) == [image(1), image(2), image(3)]
    first = next(c for c in candidates(log) if c.url == image(1))
    assert first.alt == "Picture 1" and first.source_ref == f"{site.base}/f#urn:1" and "streamlearn" in site.asked[0][2]


@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(1, 8))
def test_killed_at_any_append_every_image_is_announced_exactly_once(site, tmp_path, monkeypatch, when, nth):
    monkeypatch.setattr(feed, "BATCH", 4)
    log = make_log(tmp_path)
    site.bodies["f"], site.bodies["g"] = rss(*range(6)), rss(*range(10, 15))
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go(log, connector(site, "f", "g"))
    log.countdown = -1
    go(log, due(connector(site, "f", "g")))
    assert urls(log) == sorted(image(n) for n in [*range(6), *range(10, 15)])
    assert go(log, due(connector(site, "f", "g"))) == 0


def test_a_feed_that_is_gone_is_not_asked_for_again(site, tmp_path):
    log = make_log(tmp_path)
    site.status["f"] = 410
    assert go(log, connector(site)) == 0 and cursor(log)["feeds"][f"{site.base}/f"] == {"gone": True}
    assert go(log, due(connector(site))) == 0 and len(site.asked) == 1


@pytest.mark.parametrize("trouble", [404, 500, "cut", "loop", "drip"])
def test_a_feed_in_trouble_does_not_hold_up_the_others(site, tmp_path, trouble):
    log = make_log(tmp_path)
    site.bodies["g"], site.status["f"] = rss(1), trouble
    made = connector(site, "f", "g", total_s=1.0) if trouble == "drip" else connector(site, "f", "g")
    with pytest.raises(Retryable, match="/f"):
        go(log, made)
    assert urls(log) == [image(1)] and len([a for a in site.asked if a[0] == "f"]) in (1, 6)  # a loop is followed five times
    before = len(site.asked)
    assert go(log, made) == 0 and len(site.asked) == before  # it waits by itself
    site.bodies["f"], site.status = rss(2), {}
    assert go(log, due(connector(site, "f", "g"))) == 1


def test_a_redirect_of_a_feed_leads_to_no_guarded_address(site, tmp_path):
    """The user has named a host, here `localhost`, and no other one of this network."""
    log, trap, reached = make_log(tmp_path), Feeds(), []
    trap.bodies["x"] = rss(1)
    with serving(trap) as base:
        port = base.rsplit(":", 1)[1]
        for host in [h for h in HOSTS if h.isascii() and h.lower().rstrip(".") != "localhost"]:
            site.status["f"] = f"http://{host}:{port}/x"
            made = FeedConnector("c", FeedOptions(feeds=(site.base.replace("127.0.0.1", "localhost") + "/f",), timeout_s=1.0))
            with pytest.raises(Retryable):
                go(log, made)
            made.close()
            reached += trap.asked
        site.status["f"] = "file:///etc/passwd"
        with pytest.raises(Retryable, match="neither http nor https"):
            go(log, connector(site))
    assert reached == [] and len(site.asked) > 60 and urls(log) == []


def test_a_redirect_within_the_host_is_followed(site, tmp_path):
    log = make_log(tmp_path)
    site.status["f"], site.bodies["g"] = "/g", rss(1)
    assert go(log, connector(site)) == 1 and [a[0] for a in site.asked] == ["f", "g"]


def test_retry_after_is_honoured(site, tmp_path):
    site.status["f"], site.headers = 429, {"Retry-After": "777"}
    made = connector(site)
    with pytest.raises(Retryable) as error:
        go(make_log(tmp_path), made)
    assert 770 < error.value.after_s <= 777
    assert go(make_log(tmp_path), made) == 0 and len(site.asked) == 1


@pytest.mark.parametrize("value", ["-5", "soon", "Mon, 99 Foo", "²", "9" * 5000])
def test_garbage_in_retry_after_is_no_harm(value):
    assert http.retry_after_s({"Retry-After": value}) in (None, http.MAX_WAIT_S)


def test_what_the_feed_shows_is_remembered_however_long_its_history(site, tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "TOLD", 10)
    log = make_log(tmp_path)
    for round_ in range(12):  # 100 always stands there, below what is new
        site.bodies["f"] = rss(*range(3 * round_, 3 * round_ + 3), 100)
        go(log, due(connector(site)))
    assert urls(log) == sorted(image(n) for n in [*range(36), 100])
    assert len(cursor(log)["feeds"][f"{site.base}/f"]["told"]) == 10 * 8


@pytest.mark.parametrize(
    "body", [b"<html><body>moved</body></html>", b"", b"\x00\xff\xfe" * 99, b'{"version": 3}', b"{" * 10**5, b"[" * 10**5]
)
def test_garbage_is_refused_once_and_the_next_answer_is_read(site, tmp_path, body):
    log = make_log(tmp_path)
    site.bodies["f"] = body
    assert go(log, connector(site)) == 0 and len(letters(log)) == 1
    site.status["f"] = 200
    go(log, due(connector(site)))
    assert len(letters(log)) == 1
    site.bodies["f"] = rss(1)
    assert go(log, due(connector(site))) == 1


def test_a_feed_over_the_cap_is_refused(site, tmp_path):
    log = make_log(tmp_path)
    site.bodies["f"] = rss(*range(100))
    assert go(log, connector(site, max_bytes=2000)) == 0 and "over max_bytes = 2000" in letters(log)[0]


def test_a_feed_that_is_made_to_hurt_does_not_hold_up_the_rest(site, tmp_path):
    log = make_log(tmp_path)
    site.bodies["f"], site.bodies["g"] = b"<rss version='2.0'><channel>" + b"<a>" * 300_000, rss(1)
    assert go(log, connector(site, "f", "g", total_s=1.0)) == 1 and "reading it takes over 1 s" in letters(log)[0]


def read(body, kind="application/xml", from_html=True):
    body = body.encode() if isinstance(body, str) else body
    return [(i.url, i.alt, i.license) for i in feed_parse.images(body, "http://site.example/dir/feed", kind, from_html=from_html)]


def test_media_rss():
    item = """<item><guid>1</guid><title>T</title><media:license href="http://l/by">CC BY</media:license>%s</item>"""
    group = (
        '<media:group><media:content url="/a.jpg" medium="image"/><media:content url="b.mp4" medium="video"/></media:group>'
        '<media:content url="c.png"/><media:thumbnail url="small.jpg"/>'
    )
    assert read(RSS % item % group) == [
        ("http://site.example/a.jpg", "T", "http://l/by"),
        ("http://site.example/dir/c.png", "T", "http://l/by"),
    ]
    assert read(RSS % item % '<media:thumbnail url="small.jpg"/>')[0][0] == "http://site.example/dir/small.jpg"
    assert read(RSS % "<item><enclosure url='x.mp3' type='audio/mpeg'/></item>") == []


def test_licenses_of_the_feed_hold_for_its_entries():
    text = RSS % "<copyright>all rights</copyright><item><guid>1</guid><enclosure url='http://x/1.jpg' type='image/jpeg'/></item>"
    assert read(text) == [("http://x/1.jpg", "", "all rights")]
    own = "<item><cc:license>http://cc/by</cc:license><enclosure url='http://x/1.jpg' type='image/jpeg'/></item>"
    assert read(RSS % own)[0][2] == "http://cc/by"


def test_atom_with_xml_base_and_images_in_its_html():
    atom = """<feed xmlns="http://www.w3.org/2005/Atom" xml:base="http://other.example/x/"><entry><id>u:1</id><title>T</title>
      <link rel="enclosure" type="image/png" href="e.png"/><link rel="license" href="http://cc/0"/>
      <content type="html">&lt;p>&lt;img src="i.jpg" alt="a &amp;gt; b">&lt;/p></content></entry></feed>"""
    both = [("http://other.example/x/e.png", "T", "http://cc/0"), ("http://other.example/x/i.jpg", "a > b", "http://cc/0")]
    assert read(atom) == both and read(atom, from_html=False) == both[:1]


def test_rss_1_and_0_91():
    rdf = """<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns="http://purl.org/rss/1.0/">
      <item rdf:about="http://s/1"><title>T</title><link>http://s/1</link><description>&lt;img src=/1.jpg></description></item></rdf:RDF>"""
    assert read(rdf) == [("http://site.example/1.jpg", "T", "")]
    old = '<rss version="0.91"><channel><item><title>T</title><description>&lt;img src="http://x/2.gif"&gt;</description></item></channel></rss>'
    assert read(old) == [("http://x/2.gif", "T", "")]


def test_json_feed():
    items = [
        {
            "id": 7,
            "title": "T",
            "image": "/a.jpg",
            "attachments": [{"url": "b", "mime_type": "image/png"}, {"url": "c.mp3", "mime_type": "audio/x"}],
        },
        {"id": "8", "content_html": "<img src=d.jpg alt=D>", "attachments": "none", "image": 5},
        "garbage",
    ]
    body = json.dumps({"version": "https://jsonfeed.org/version/1.1", "title": "f", "items": items})
    expected = [("http://site.example/a.jpg", "T", ""), ("http://site.example/dir/b", "T", ""), ("http://site.example/dir/d.jpg", "D", "")]
    assert read(body, "application/feed+json") == read(body) == expected
    assert len(read(body, from_html=False)) == 2


def test_neither_files_nor_a_thousand_million_laughs_come_out_of_a_feed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    laughs = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))
    doctype = f'<!DOCTYPE rss [<!ENTITY l0 "ha"><!ENTITY f SYSTEM "file://{tmp_path}/secret">{laughs}]>'
    body = (
        '<?xml version="1.0"?>' + doctype + RSS.partition("?>")[2] % "<item><title>&f;&l9;</title><enclosure url='http://x/1.jpg'/></item>"
    )
    (found,) = read(body)
    assert "secret" not in found[1] and len(found[1]) < 1000


@given(
    st.binary(max_size=300),
    st.integers(0, 10**4),
    st.sampled_from(["application/xml", "application/json", "text/x; charset=rot13", "\x00"]),
)
def test_reading_never_raises_anything_but_no_feed(noise, at, kind):
    whole = (RSS % (ITEM % (1, 1, 1) + "<item><description>&lt;img src='x'></description></item>")).encode()
    for body in (
        noise,
        whole[: at % len(whole)] + noise + whole[at % len(whole) :],
        b'{"version":"https://jsonfeed.org/version/1","items":[' + noise,
    ):
        try:
            feed_parse.images(body, "http://s/", kind, from_html=True)
        except feed_parse.NoFeed as e:
            assert str(e)


LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=9)
JSON = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["url", "id"]), x), max_leaves=4)
KEYS = st.sampled_from(["id", "image", "banner_image", "attachments", "title", "summary", "content_html", "license", "url"])


@given(st.lists(st.dictionaries(KEYS, JSON, max_size=5), max_size=4))
def test_any_json_feed_can_be_read(items):
    body = json.dumps({"version": "https://jsonfeed.org/version/1.1", "items": items}).encode()
    assert isinstance(feed_parse.images(body, "http://s/", "", from_html=True), list)


def test_html_is_read_as_it_is_written():
    text = """<base href="/b/"><!-- <img src=no1.jpg> --><script>"<img src=no2.jpg>"</script><IMG ALT='1 > 0' SRC = "a.jpg"><img/src=c.jpg/>
      <img src="data:image/gif;base64,x" data-src='d.jpg'><meta property=og:image content=http://o/g.jpg><img src="a.jpg">
      <a rel="nofollow license" href="//l/by"><img alt="x&amp;y" src="http://[bad"><img src="javascript:x"><image src=no3.jpg><!-- <img src=no4.jpg>"""
    page = html.read(text, "http://s/x/")
    assert page.images == [
        ("http://s/b/a.jpg", "1 > 0"),
        ("http://s/b/c.jpg/", ""),
        ("http://s/b/d.jpg", ""),
        ("http://o/g.jpg", ""),
    ]
    assert page.license == "http://l/by"


@pytest.mark.parametrize(
    "piece", ["<!---->", "<!--", "<img", '<img "', "<img a=", "<script>", "<a x='", "<img src=x ", "<" * 9, "<img " + " " * 99]
)
def test_html_that_is_made_to_hurt_is_read_within_seconds(piece):
    done = threading.Event()
    text = piece * (2**20 // len(piece)) + "<img src=x>"
    threading.Thread(target=lambda: (html.read(text, "http://s/"), done.set()), daemon=True).start()
    assert done.wait(60)


@given(st.text(alphabet="<>!-/imgscrpt='\" \n\u0130&;xa", max_size=200))
def test_any_html_can_be_read(text):
    assert all(u.startswith("http") for u, _ in html.read(text, "http://s/").images)


@pytest.mark.parametrize(
    ("url", "why"), [("ftp://x/f", "neither http nor https"), ("http://u:p@x/", "credentials"), ("http://x/" + "y" * 2000, "2,000")]
)
def test_a_bad_feed_is_refused_before_anything_starts(url, why):
    with pytest.raises(ConfigError, match=f"connector c: feeds = .*{why}"):
        FeedConnector("c", FeedOptions(feeds=(url,))).check()
    with pytest.raises(ConfigError, match="named twice"):
        FeedConnector("c", FeedOptions(feeds=("http://x/", "http://x/"))).check()
