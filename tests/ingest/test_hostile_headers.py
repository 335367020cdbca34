"""Headers are somebody else's bytes: whatever they say, there is a verdict, and what is kept of them can be written down."""

import asyncio
import json
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from ingest.connectors import http
from ingest.fetch import hosts
from ingest.fetch.client import Client, Fetched, Unanswered, Unchanged, _address, _page
from ingest.fetch.guard import complaint
from ingest.fetch.screen import Reason, Refused
from ingest.fetch.transport import Answer, Headers
from streamlearn.contract.candidate import REFRESH, Candidate
from streamlearn.contract.config import FetchConfig
from tests.ingest.server import picture

CONFIG = FetchConfig(
    allow_networks=("127.0.0.1/32",), total_timeout_s=60.0, attempts=1, host_rate=0, robots=False, breaker_failures=0, max_bytes=10_000
)
BODY = picture(1)
NAMES = [
    "Content-Type", "Content-Length", "Content-Encoding", "Content-Disposition", "Content-Range", "Transfer-Encoding", "Connection", "Retry-After",
    "ETag", "Last-Modified", "X-Robots-Tag", "TDM-Reservation", "TDM-Policy", "Cache-Control", "Set-Cookie", "Alt-Svc", "Upgrade", "Trailer", "Date",
]  # fmt: skip
WORDS = [
    "0", "1", "-1", "9" * 30, "9" * 5000, "1e9", "0x10", "\u0663", "\xb2", "image/jpeg", "gzip", "br", "chunked", "identity", "close", "keep-alive",
    'attachment; filename="../../x"', "filename*=UTF-8''%ff", "bytes 0-9/10", "Sat, 21 Nov 2026 10:00:00 GMT", "Sat, 99 Foo 9999999999 10:00:00",
    "noai", "none", "all:", "streamlearn:", "max-age=", "max-age=99999999999", "W/", '"', ";", ",", "=", " ", "\t", "\0", "\x7f", "\xff", "h2", "é",
]  # fmt: skip
VALUES = st.lists(st.sampled_from(WORDS), max_size=5).map(lambda words: "".join(words).encode("utf-8")) | st.binary(max_size=60)
LINES = st.lists(st.tuples(st.sampled_from(NAMES).map(str.encode) | st.binary(max_size=12), VALUES), max_size=8)
STATUS = st.sampled_from(
    [b"200", b"200 OK", b"200", b"200", b"206", b"304", b"404", b"429", b"503", b"999", b"099", b"1", b"", b"200" * 2000]
)


class Server:
    """Answers with what it is told, and a picture; in a loop of its own, with the client beside it."""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.call(self._start())
        return self

    def __exit__(self, *_):
        self.call(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(60)
        self.loop.close()

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(120)

    async def _start(self):
        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            self.asked = True
            writer.write(self.said)
            writer.close()

        self.server = await asyncio.start_server(answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/x.jpg"
        self.client = await Client(CONFIG).__aenter__()

    async def _stop(self):
        await self.client.__aexit__(None, None, None)
        self.server.close()

    def fetch(self, said, **more):
        self.said, self.asked = said, False
        self.client.hosts = hosts.Hosts(CONFIG)  # one that names a time is not asked again before it
        told = Candidate(url=self.url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z", **more)
        found = self.call(self.client.fetch(told))
        assert self.asked
        return found


@pytest.fixture(scope="module")
def server():
    with Server() as made:
        yield made


@given(status=STATUS, lines=LINES, end=st.sampled_from([b"\r\n", b"\n", b"\r"]), refresh=st.booleans())
@example(status=b"9" * 5000, lines=[], end=b"\r\n", refresh=False)
@example(status=b"200", lines=[(b"Content-Length", b"9" * 5000)], end=b"\r\n", refresh=False)
@example(status=b"429", lines=[(b"Retry-After", b"9" * 5000)], end=b"\r\n", refresh=False)
@example(status=b"200", lines=[(b"Transfer-Encoding", b"\x80!")], end=b"\r\n", refresh=False)  # libcurl quotes it
def test_whatever_the_headers_say_there_is_a_verdict_that_can_be_written_down(server, status, lines, end, refresh):
    head = b"HTTP/1.1 " + status + end + b"".join(name + b": " + value + end for name, value in lines)
    more = {"purpose": REFRESH, "etag": '"1"', "last_modified": "x"} if refresh else {}
    found = server.fetch(head + end + BODY, **more)
    assert isinstance(found, Fetched | Refused | Unanswered | Unchanged)
    if isinstance(found, Fetched):
        assert found.body == BODY and len(found.etag) <= 256 and len(found.last_modified) <= 64
        json.dumps([found.etag, found.last_modified, found.final_url], ensure_ascii=False).encode()
    if isinstance(found, Refused | Unanswered):
        json.dumps(found.detail, ensure_ascii=False).encode()
    if isinstance(found, Unanswered):
        assert 0 <= found.after_s <= hosts.DAY_S
    if isinstance(found, Unchanged):
        assert refresh


@pytest.mark.parametrize("header", [b"X-Robots-Tag: noai", b"TDM-Reservation: 1"])
def test_an_image_that_is_unchanged_may_have_been_reserved_since(server, header):
    asked = {"purpose": REFRESH, "etag": '"1"'}
    assert isinstance(server.fetch(b"HTTP/1.1 304 X\r\n\r\n", **asked), Unchanged)
    found = server.fetch(b"HTTP/1.1 304 X\r\n" + header + b"\r\n\r\n", **asked)
    assert isinstance(found, Refused) and found.reason == Reason.OPT_OUT and found.http_status == 304


@pytest.mark.parametrize("status", [b"9" * 6000, b"2000", b"", b"\xb2\xb2\xb2", b"-20"])
def test_a_status_that_is_none_is_no_answer_and_fills_no_log(server, status, capfd):
    """What a callback of libcurl raises is printed there, as often as a server likes."""
    found = server.fetch(b"HTTP/1.1 " + status + b"\r\n\r\n" + BODY)
    assert isinstance(found, Refused | Unanswered) and capfd.readouterr().err == ""


@given(value=st.text(max_size=40) | st.lists(st.sampled_from(WORDS)).map("".join))
def test_a_time_to_come_back_is_between_now_and_tomorrow(value):
    assert 0 <= hosts.retry_after_s(value, time.time()) <= hosts.DAY_S
    later = http.retry_after_s({"Retry-After": value})
    assert later is None or 0 <= later <= http.MAX_WAIT_S


PARTS = ["http:", "https:", "HTTP:", "file:", "//", "/", "\\", "@", ":", "[", "]", "%", "%00", "?", "#", ".", "..", "127.0.0.1", "::1", "a.example", "é", "\0",
         " ", "\t", "\ud800", "\uff0f", "99999", "user", "xn--"]  # fmt: skip


@given(st.text(max_size=30) | st.lists(st.sampled_from(PARTS), max_size=9).map("".join))
def test_where_a_redirect_leads_is_an_address_that_is_judged_or_a_reason(target):
    found = _address(target, URL("http://a.example/x"))
    if isinstance(found, str):
        found.encode()
        return
    assert found.scheme in ("http", "https") and found.raw_host and found.user is None and found.password is None
    assert complaint(str(found)) == "" and str(found).isascii()  # what is asked for is what was judged


@given(LINES)
def test_any_lines_are_headers_and_a_robots_txt(lines):
    answer = Answer(status=200, headers=Headers())
    for name, value in lines:
        answer.headers.add(name + b": " + value + b"\r\n")
        answer.headers.add(b"\t" + value)
    assert 0 <= answer.length < 10**19
    page = _page(answer)
    assert isinstance(page, str) or page.max_age_s is None or page.max_age_s >= 0
