"""Archives as Common Crawl writes them, from files and from a server that does ranges."""

import gzip
import io
import json
import os
import tracemalloc

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from ingest.connectors import archive, commoncrawl
from ingest.connectors.archive import Broken, Tape
from ingest.connectors.commoncrawl import CommonCrawlConnector, CommonCrawlOptions
from streamlearn.contract.errors import ConfigError, Retryable
from tests.ingest.connectors.harness import Killed, candidates, cursor, go, go_until, letters, make_log, urls
from tests.ingest.server import serving

PAGE = "http://page.example/dir/"


def member(kind, body, content_type, url=PAGE, http=None):
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    headers = StatusAndHeaders("200 OK", [("Content-Type", http)], protocol="HTTP/1.0") if http else None
    made = writer.create_warc_record(url, kind, payload=io.BytesIO(body), http_headers=headers, warc_content_type=content_type)
    writer.write_record(made)
    return out.getvalue()


def wat_json(links, metas=(), head=None):
    html = {"Links": links, "Head": {"Metas": list(metas)} | (head or {})}
    return {
        "Envelope": {
            "WARC-Header-Metadata": {"WARC-Target-URI": PAGE},
            "Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": html}},
        }
    }


def wat(*numbers):
    links = [{"path": "IMG@/src", "url": f"/{n}.jpg", "alt": f"Alt {n}"} for n in numbers] + [{"path": "A@/href", "url": "/no.jpg"}]
    return member("metadata", json.dumps(wat_json(links)).encode(), "application/json")


def warc(text, http="text/html; charset=utf-8"):
    return member("response", text.encode("utf-8"), "application/http; msgtype=response", http=http)


def image(n):
    return f"http://page.example/{n}.jpg"


INFO = member("warcinfo", b"software: x\r\n", "application/warc-fields")


class Archives:
    """Serves a folder, with ranges; `trouble` makes its next answers bad."""

    def __init__(self, folder):
        self.folder, self.ranges, self.trouble = folder, [], []

    def application(self):
        app = web.Application()
        app.router.add_get("/{name}", self.answer)
        return app

    async def answer(self, request):
        path = self.folder / request.match_info["name"]
        self.ranges.append(request.headers["Range"])
        trouble = self.trouble.pop(0) if self.trouble else None
        if trouble == "whole":
            return web.Response(body=path.read_bytes())
        if trouble == "elsewhere":
            return web.Response(status=206, body=b"x", headers={"Content-Range": "bytes 7-7/9"})
        if trouble == "cut":
            request.transport.write(b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n\r\nxx")
            request.transport.close()
            return web.Response()
        if trouble == "short":  # cut by a proxy that mends the length
            return web.Response(status=206, body=b"x", headers={"Content-Range": f"bytes {request.http_range.start}-{10**6}/{10**7}"})
        if isinstance(trouble, int):
            return web.Response(status=trouble)
        return web.FileResponse(path)


@pytest.fixture
def site(tmp_path):
    made = Archives(tmp_path)
    with serving(made) as made.base:
        yield made


def connector(*files, **more):
    made = CommonCrawlConnector(
        "c", CommonCrawlOptions(files=tuple(map(str, files)), **dict(total_s=60.0, timeout_s=30.0, read_s=60.0) | more)
    )
    made.check()
    return made


def test_a_wat_tells_the_images_its_pages_link_to(tmp_path):
    log = make_log(tmp_path)
    metas = [{"property": "og:image", "content": "o.png"}, {"name": "author", "content": "x"}, "garbage"]
    links = [
        {"path": "IMG@/src", "url": "a.jpg", "alt": "A"},
        {"path": "A@/href", "url": "//l/by", "rel": "license"},
        {"path": "IMG@/src"},
        7,
    ]
    body = json.dumps(wat_json(links, metas, {"Base": "/base/"})).encode()
    (tmp_path / "a.wat.gz").write_bytes(INFO + member("metadata", body, "application/json") + wat(1))
    assert go(log, connector(tmp_path / "a.wat.gz")) == 3 and not letters(log)
    found = {c.url: c for c in candidates(log)}
    first = found["http://page.example/base/a.jpg"]
    assert set(found) == {"http://page.example/base/a.jpg", "http://page.example/base/o.png", image(1)}
    assert (first.alt, first.license) == ("A", "http://l/by") and first.source_ref == f"{tmp_path / 'a.wat.gz'}@{len(INFO)} {PAGE}"
    assert go(log, connector(tmp_path / "a.wat.gz")) == 0


def test_a_warc_tells_the_images_of_its_pages(tmp_path):
    log = make_log(tmp_path)
    pages = (
        warc("<img src=a.jpg alt='\u00e9'>")
        + warc("<img src=no.jpg>", http="text/plain")
        + warc("<img src=b.jpg>", http="text/html; charset=zlib")
    )
    (tmp_path / "a.warc.gz").write_bytes(INFO + pages + member("request", b"GET / HTTP/1.0\r\n\r\n", "application/http; msgtype=request"))
    assert go(log, connector(tmp_path / "a.warc.gz")) == 2 and not letters(log)
    assert {c.url: c.alt for c in candidates(log)} == {f"{PAGE}a.jpg": "\u00e9", f"{PAGE}b.jpg": None}


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(1, 9))
def test_killed_at_any_append_every_image_is_announced_exactly_once(site, tmp_path, monkeypatch, when, nth, remote):
    monkeypatch.setattr(commoncrawl, "BATCH", 4)
    monkeypatch.setattr(archive, "WINDOW", 300)  # records lie across several
    (tmp_path / "a.wat.gz").write_bytes(INFO + wat(0, 1) + wat(2) + wat(*range(3, 9)))  # one record is more than a batch
    (tmp_path / "b.wat.gz").write_bytes(wat(9) + wat(10, 11, 12))
    files = [f"{site.base}/{n}" if remote else tmp_path / n for n in ("a.wat.gz", "b.wat.gz")]
    log = make_log(tmp_path)
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go(log, connector(*files))
    log.countdown = -1
    go(log, connector(*files))
    assert urls(log) == sorted(image(n) for n in range(13)) and cursor(log)["file"] == 2
    assert go(log, connector(*files)) == 0 and not letters(log)


def test_a_look_ends_in_time_and_the_next_one_goes_on(tmp_path):
    (tmp_path / "a.wat.gz").write_bytes(b"".join(wat(n) for n in range(20)))
    log, made = make_log(tmp_path), connector(tmp_path / "a.wat.gz", read_s=1e-3)
    go(log, made)
    assert len(urls(log)) < 20
    go_until(log, made, lambda: len(urls(log)) >= 20)
    assert urls(log) == sorted(image(n) for n in range(20))


def test_a_connection_that_breaks_loses_nothing(site, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "WINDOW", 300)
    (tmp_path / "a.wat.gz").write_bytes(b"".join(wat(n) for n in range(5)))
    log, made = make_log(tmp_path), connector(f"{site.base}/a.wat.gz")
    for trouble in ("cut", 503, 429, 403, "short"):
        site.trouble = [None, trouble]
        with pytest.raises(Retryable):
            go(log, made)
    go(log, made)
    assert urls(log) == sorted(image(n) for n in range(5)) and not letters(log)
    assert site.ranges[0] == "bytes=0-299" and site.ranges[1] == "bytes=300-599"


@pytest.mark.parametrize(
    ("trouble", "why"), [(404, "HTTP 404"), (410, "HTTP 410"), ("elsewhere", "Content-Range"), ("whole", "does no ranges")]
)
def test_a_file_that_cannot_be_had_is_refused_and_the_next_one_read(site, tmp_path, trouble, why):
    (tmp_path / "a.wat.gz").write_bytes(os.urandom(5000))
    (tmp_path / "b.wat.gz").write_bytes(wat(1))
    log = make_log(tmp_path)
    site.trouble = [trouble]
    assert go(log, connector(f"{site.base}/a.wat.gz", f"{site.base}/b.wat.gz", max_bytes=4000)) == 1
    assert len(letters(log)) == 1 and why in letters(log)[0]


def test_a_small_file_from_a_server_without_ranges_is_read(site, tmp_path):
    (tmp_path / "a.wat.gz").write_bytes(wat(1))
    site.trouble = ["whole"] * 9
    assert go(make_log(tmp_path), connector(f"{site.base}/a.wat.gz")) == 1


def bomb():
    return gzip.compress(b"WARC/1.0\r\n" + b"\0" * 10**7)


BROKEN = {
    "noise": os.urandom(3000).replace(b"\x1f\x8b", b"xx"),
    "corrupt": wat(98)[:-30] + b"\xff" * 30,
    "cut": wat(98)[:-40],
    "bomb": bomb(),
    "bomb in a gzip": gzip.compress(gzip.compress(b"\0" * 10**6)),
    "no record": gzip.compress(b"hello"),
    "no json": member("metadata", b"{", "application/json"),
    "deep json": member("metadata", b"[" * 10**5, "application/json"),
    "headless": gzip.compress(b"WARC/1.0\r\nContent-Length: x\r\n\r\n"),
    "empty head": gzip.compress(b"WARC/1.0\r\n"),
    "endless nothing": gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * 60_000,  # empty stored blocks
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("window", [700, 2**20])
def test_what_is_broken_is_refused_and_reading_goes_on_at_the_next_record(tmp_path, monkeypatch, name, window):
    monkeypatch.setattr(archive, "WINDOW", window)
    log = make_log(tmp_path)
    (tmp_path / "a.wat.gz").write_bytes(wat(1) + BROKEN[name] + wat(2) + wat(3))
    assert go(log, connector(tmp_path / "a.wat.gz", max_record_bytes=100_000)) == 3
    assert urls(log) == [image(1), image(2), image(3)]
    assert letters(log) or name in ("empty head", "headless")  # warcio takes them for records of no type


def test_a_file_that_ends_within_a_record_is_refused_there(tmp_path):
    log = make_log(tmp_path)
    (tmp_path / "a.wat.gz").write_bytes(wat(1) + wat(2)[:-9])
    (tmp_path / "b.wat.gz").write_bytes(wat(3))
    assert go(log, connector(tmp_path / "a.wat.gz", tmp_path / "b.wat.gz")) == 2
    assert len(letters(log)) == 1 and "truncated" in letters(log)[0]


def test_memory_is_flat_where_a_record_is_a_bomb():
    packed = bomb()
    tracemalloc.start()
    try:
        with pytest.raises(Broken, match="over max_record_bytes"):
            archive.unpack(Tape(lambda at, size: packed[at : at + size]), 0, 1000)
        assert tracemalloc.get_traced_memory()[1] < 10**6  # unpacked it is ten
    finally:
        tracemalloc.stop()


def test_what_a_record_says_of_itself_is_not_believed_too_far():
    with pytest.raises(Broken, match="no WARC record"):
        archive.links(wat(1), 10**6)  # packed once more: warcio would unpack it, without a cap
    assert len(archive.links(gzip.decompress(wat(*range(1500))), 10**6)) == archive.MAX_LINKS
    (found,) = archive.links(gzip.decompress(warc("<img src=\\x61.jpg>", http="text/html; charset=unicode_escape")), 10**6)
    assert found.url == f"{PAGE}\\x61.jpg"  # not every codec of Python is one of the web's


def test_a_record_that_unpacks_to_nothing_for_ever_is_left():
    """Empty blocks, five bytes each, come to nothing however many there are."""
    head, read = gzip.compress(b"")[:10], []

    def endless(at, size):
        read.append(at)
        assert len(read) < 10
        return (head + b"\0\0\0\xff\xff" * (size // 5))[:size]

    with pytest.raises(Broken, match="over max_record_bytes = 1000"):
        archive.unpack(Tape(endless), 0, 1000)


@given(st.integers(0, 40), st.integers(4, 30))
def test_the_next_record_is_found_wherever_the_windows_fall(before, window):
    data = b"x" * before + b"\x1f\x8b\x08\x00"
    original, archive.WINDOW = archive.WINDOW, window
    try:
        tape, at, there = Tape(lambda at, size: data[at : at + size]), 0, False
        while not there and tape.piece(at):
            there, at = archive.seek(tape, at)
    finally:
        archive.WINDOW = original
    assert (there, at) == (True, before)


def test_a_list_of_files_may_be_packed_and_may_grow(site, tmp_path):
    log, paths = make_log(tmp_path), tmp_path / "wat.paths.gz"
    (tmp_path / "a.wat.gz").write_bytes(wat(1))
    (tmp_path / "b.wat.gz").write_bytes(wat(2))
    paths.write_bytes(gzip.compress(b"a.wat.gz\n\n"))
    made = connector(paths=str(paths), base=f"{site.base}/")
    assert go(log, made) == 1
    paths.write_bytes(gzip.compress(f"a.wat.gz\n{tmp_path}/b.wat.gz\n".encode()))
    assert go(log, made) == 1 and urls(log) == [image(1), image(2)]
    paths.write_bytes(gzip.compress(b"c.wat.gz\n"))
    with pytest.raises(Retryable, match="put it back where it was"):
        go(log, made)
    paths.write_bytes(b"garbage")
    with pytest.raises(Retryable, match="paths = .*cannot be read"):
        go(log, made)


@pytest.mark.parametrize("more", [dict(), dict(files=("nowhere.wat.gz",)), dict(files=("http://u:p@x/a.gz",)), dict(paths="nowhere")])
def test_bad_options_are_refused_before_anything_starts(more):
    with pytest.raises(ConfigError, match=f"connector c: {next(iter(more), 'files')} = "):
        CommonCrawlConnector("c", CommonCrawlOptions(**more)).check()


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from(["path", "url", "alt", "rel", "property", "content", "Metas", "Base", "Link"])


@given(
    VALUES | st.lists(st.dictionaries(KEYS, VALUES | st.just("IMG@/src"))),
    VALUES | st.dictionaries(KEYS, VALUES),
    st.binary(max_size=60),
    st.integers(0, 10**4),
)
def test_any_record_can_be_read(links, head, noise, at):
    body = json.dumps(
        {"Envelope": {"Payload-Metadata": {"HTTP-Response-Metadata": {"HTML-Metadata": {"Links": links, "Head": head}}}}}
    ).encode()
    whole = gzip.decompress(member("metadata", body, "application/json"))
    assert isinstance(archive.links(whole, 10**6), list)
    page = gzip.decompress(warc("<img src=x>"))
    for one in (whole, page):
        cut = at % len(one)
        try:
            archive.links(b"WARC/" + one[5:cut] + noise + one[cut:], 10**6)
        except Broken as e:
            assert str(e)
