"""The stream of Wikimedia's changes, from a server that speaks server-sent events."""

import asyncio
import json
import time

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from ingest.connectors import wikimedia
from ingest.connectors.sse import Event, Events
from ingest.connectors.wikimedia import WikimediaConnector, WikimediaOptions, file_url
from streamlearn.contract.errors import ConfigError, Retryable
from tests.ingest.connectors.harness import Killed, candidates, cursor, go, go_until, letters, make_log, urls, wait_for
from tests.ingest.server import serving

FILES = "https://files.example/wikipedia/"


def upload(n, **more):
    fields = dict(wiki="commonswiki", type="log", log_type="upload", log_action="upload", namespace=6, title=f"File:Cat {n}.jpg", log_id=n)
    return json.dumps(fields | more)


def url(n):
    return file_url(FILES, "commonswiki", f"Cat {n}.jpg")


class Stream:
    """Event k has id [{"offset":k}]; begins behind Last-Event-ID, and then keeps the line open, or cuts it after `cut` events."""

    def __init__(self, events):
        self.events, self.asked, self.cut, self.status, self.overlap, self.open = events, [], None, 200, 0, 0

    def application(self):
        app = web.Application()
        app.router.add_get("/stream", self.answer)
        return app

    async def answer(self, request):
        last = request.headers.get("Last-Event-ID")
        self.asked.append(last)
        if self.status != 200:
            return web.Response(status=self.status, headers={"Retry-After": "1"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.open += 1
        try:
            await response.write(b"\xef\xbb\xbf:ok\n\nretry: 1\n\n")
            at = max(0, json.loads(last)[0]["offset"] + 1 - self.overlap) if last else 0
            sent = 0
            while self.cut is None or sent < self.cut:
                if at < len(self.events):
                    text = f'event: message\r\nid: [{{"offset":{at}}}]\r\ndata: {self.events[at]}\r\n\r\n'.encode()
                    await response.write(text[: len(text) // 2])
                    await response.write(text[len(text) // 2 :])
                    at, sent = at + 1, sent + 1
                else:
                    await asyncio.sleep(0.01)
                    if request.transport is None or request.transport.is_closing():
                        break
            if self.cut is not None:
                request.transport.abort()
        except ConnectionError:
            self.cut = self.cut  # hung up on
        finally:
            self.open -= 1
        return response


@pytest.fixture
def stream():
    made = Stream([])
    with serving(made) as base:
        made.url = f"{base}/stream"
        yield made


@pytest.fixture
def make(stream):
    all_ = []

    def one(**more):
        all_.append(WikimediaConnector("c", WikimediaOptions(**dict(stream=stream.url, files=FILES, read_s=0.3) | more)))
        all_[-1].check()
        return all_[-1]

    yield one
    for made in all_:
        made.close()


def test_uploads_of_images_are_told_and_nothing_else(stream, make, tmp_path):
    log = make_log(tmp_path)
    stream.events = [
        upload(1),
        upload(2, wiki="enwiki"),
        upload(3, type="edit"),
        upload(4, log_type="delete"),
        upload(5, namespace=0),
        upload(6, title="File:Song.ogg"),
        upload(7, title="File:Ä b?.JPG", log_action="overwrite"),
    ]
    go_until(log, make(), lambda: len(urls(log)) == 2)
    assert set(urls(log)) == {url(1), file_url(FILES, "commonswiki", "Ä_b?.JPG")}
    first = next(c for c in candidates(log) if c.url == url(1))
    assert (first.source_ref, first.alt) == ("commonswiki upload 1", "Cat 1") and not letters(log)


def test_the_address_is_the_one_that_mediawiki_documents():
    # the manual's own example of a hashed directory
    assert file_url("https://u/wikipedia/", "commonswiki", "Example.jpg") == "https://u/wikipedia/commons/a/a9/Example.jpg"
    assert file_url("https://u/", "zh_min_nanwiki", "A b.png").startswith("https://u/zh-min-nan/")


@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(1, 7))
def test_killed_at_any_append_every_upload_is_announced_exactly_once(stream, make, tmp_path, monkeypatch, when, nth):
    monkeypatch.setattr(wikimedia, "BATCH", 4)
    stream.events = [upload(n) for n in range(11)]
    log = make_log(tmp_path)
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go_until(log, make(), lambda: False)
    log.countdown = -1
    go_until(log, make(), lambda: len(urls(log)) >= 11)
    assert urls(log) == sorted(url(n) for n in range(11))


def test_after_an_append_that_failed_the_same_connector_reads_again_from_its_cursor(stream, make, tmp_path, monkeypatch):
    monkeypatch.setattr(wikimedia, "BATCH", 3)
    stream.events = [upload(n) for n in range(8)]
    log, made = make_log(tmp_path), make()
    log.countdown, log.when = 4, "before"
    with pytest.raises(Killed):
        go_until(log, made, lambda: False)
    log.countdown = -1
    go_until(log, made, lambda: len(urls(log)) >= 8)
    assert urls(log) == sorted(url(n) for n in range(8)) and len(stream.asked) == 2


def test_a_connection_that_is_cut_is_taken_up_again_and_what_comes_twice_is_told_once(stream, make, tmp_path):
    log = make_log(tmp_path)
    stream.events, stream.cut, stream.overlap = [upload(n) for n in range(9)], 4, 2
    go_until(log, make(), lambda: len(urls(log)) >= 9)
    assert urls(log) == sorted(url(n) for n in range(9)) and stream.asked[:2] == [None, '[{"offset":3}]']


def test_the_connection_stays_open_between_two_looks(stream, make, tmp_path):
    log, made = make_log(tmp_path), make()
    stream.events = [upload(1)]
    go_until(log, made, lambda: len(urls(log)) == 1)
    stream.events.append(upload(2))
    go_until(log, made, lambda: len(urls(log)) == 2)
    assert stream.asked == [None]
    made.close()
    wait_for(lambda: stream.open == 0)


def test_the_place_is_recorded_now_and_then_while_nothing_is_uploaded(stream, make, tmp_path, monkeypatch):
    log, made = make_log(tmp_path), make()
    stream.events = [upload(n, type="edit") for n in range(5)]
    made._recorded = time.monotonic()
    go(log, made)
    assert cursor(log) is None
    monkeypatch.setattr(wikimedia, "RECORD_S", 0.0)
    go_until(log, made, lambda: cursor(log) is not None and cursor(log)["id"] == '[{"offset":4}]')


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(stream, make, tmp_path):
    log, made = make_log(tmp_path), make(read_s=30.0)
    stream.status = 503
    with pytest.raises(Retryable) as error:
        go(log, made)
    assert error.value.after_s == 1.0 and go(log, made) == 0 and len(stream.asked) == 1
    stream.events, stream.status = [upload(1)], 200
    made.options = made.options.model_copy(update={"read_s": 0.3})
    go_until(log, made, lambda: len(urls(log)) == 1)


def test_garbage_is_refused_and_the_stream_read_on(stream, make, tmp_path):
    log = make_log(tmp_path)
    garbage = [
        "{",
        "[]",
        "7",
        "[" * 10**5,
        "x" * (2**20 + 1),
        upload(None, meta=3),
        upload({}, meta={"id": []}),
        upload("1" * 9000, title="File:.jpg"),
    ]
    stream.events = [*garbage, upload(1)]
    go_until(log, make(), lambda: url(1) in urls(log))
    assert len(letters(log)) >= 7


EVENTS = st.lists(
    st.sampled_from(
        [
            "data: a",
            "data:b",
            "data",
            "id: 1",
            "id: \0",
            "id",
            "event: x",
            "retry: 5",
            "retry: x",
            ":c",
            "",
            "x: y",
            "data:é€" * 4,
            "\ufeff",
            "data: " + "l" * 30,
        ]
    )
)


@given(EVENTS, st.sampled_from(["\n", "\r", "\r\n"]), st.booleans(), st.lists(st.integers(1, 9)), st.binary(max_size=20))
def test_however_the_bytes_are_cut_the_events_are_the_same(lines, end, bom, cuts, noise):
    whole = b"\xef\xbb\xbf" * bom + "".join(line + end for line in [*lines, "", "data: last", "", ""]).encode() + noise + b"\n\n"
    expected, at = Events(max_line=20, max_event=30), 0
    parser, found = Events(max_line=20, max_event=30), []
    for cut in [*cuts, *[1] * len(whole)]:
        found += parser.feed(whole[at : at + cut])
        at += cut
    assert found == expected.feed(whole) and (parser.id, parser.retry_ms) == (expected.id, expected.retry_ms)
    assert any(e.data == "last" for e in found)


def test_events_are_read_as_the_standard_says():
    text = (
        b"\xef\xbb\xbfdata: YHOO\ndata: +2\n\n: test\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\ndata\n\ndata\ndata\n\ndata:"
    )
    assert Events().feed(text) == [
        Event("YHOO\n+2", ""),
        Event("first", "1"),
        Event("second", ""),
        Event(" third", ""),
        Event("", ""),
        Event("\n", ""),
    ]
    assert Events().feed(b"id: 5\n\ndata: x\nevent: add\n\n") == [Event("x", "5", "add")]
    assert Events(max_line=8).feed(b"data: " + b"x" * 99 + b"\nid: 6\n\ndata:y\n\n") == [Event("", "6", spoilt=True), Event("y", "6")]
    assert Events(max_event=8).feed(b"data:1234\n" * 3 + b"id: 6\n\ndata:y\n\n") == [Event("", "6", spoilt=True), Event("y", "6")]


@pytest.mark.parametrize("more", [dict(stream="ftp://x/"), dict(files="nowhere"), dict(wikis=("commons",)), dict(wikis=("../wiki",))])
def test_bad_options_are_refused_before_anything_starts(more):
    with pytest.raises(ConfigError, match=f"connector c: {next(iter(more))} = "):
        WikimediaConnector("c", WikimediaOptions(**more)).check()


@pytest.mark.parametrize("end", [b"\r", b"\r\n"])
def test_every_end_of_line_ends_one_line(end):
    text = b"data: a\ndata: b\nid: 1\n\ndata: c\n\n"
    assert Events().feed(text.replace(b"\n", end)) == Events().feed(text) == [Event("a\nb", "1"), Event("c", "1")]


def test_a_line_that_never_ends_takes_no_memory():
    parser = Events(max_line=100)
    for _ in range(50):
        parser.feed(b"data: " + b"x" * 90)
    assert len(parser._line) <= 103
    assert parser.feed(b"\n\ndata: y\n\n") == [Event("", "", spoilt=True), Event("y", "")]
