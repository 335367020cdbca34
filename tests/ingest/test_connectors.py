"""Connectors: nothing of a source missed, nothing announced twice, whenever they are killed."""

import os
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from ingest.connectors import base
from ingest.connectors.run import Source, build, run_connect
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, SOURCE_STATE, NewRecord, SqliteLog
from streamlearn.contract.metrics import ConnectMetrics
from streamlearn.contract.status import Heartbeat
from tests.ingest.server import picture


class Killed(BaseException): ...


class DyingLog(SqliteLog):
    """Dies before the n-th append, after it, or half way through it, as one on Kafka may."""

    countdown, when = -1, "before"

    def append(self, records):
        self.countdown -= 1
        if self.countdown == 0 and self.when == "before":
            raise Killed
        if self.countdown == 0 and self.when == "half way":
            records = records[: len(records) // 2]
        done = super().append(records)
        if self.countdown == 0:
            raise Killed
        return done


@pytest.fixture
def log(tmp_path):
    return make_log(tmp_path)


def make_log(folder):
    log = DyingLog(folder / "log.sqlite")
    for topic in (CANDIDATES, DEAD_LETTERS, SOURCE_STATE):
        log.ensure_topic(topic, 2)
    return log


def connector(path, kind="urls", name="c", **more):
    return build(ConnectorConfig.of(name, kind, path=str(path), **more))


def go(log, source):
    return Source("c", source, log, ConnectMetrics(CollectorRegistry())).poll(threading.Event())


def announced(log, topic=CANDIDATES):
    return [r for p in range(2) for r in log.read(topic, p, 0, 10**6)]


def urls(log):
    return sorted(Candidate.from_json(r.value).url for r in announced(log))


@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(1, 8))
@pytest.mark.parametrize("kind", ["txt", "csv", "parquet"])
def test_killed_at_any_append_every_line_is_announced_exactly_once(log, tmp_path, monkeypatch, when, nth, kind):
    monkeypatch.setattr("ingest.connectors.urls.BATCH", 4)
    lines, path = [f"http://x/{i}.jpg" for i in range(11)], tmp_path / f"u.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"url": lines}), path, row_group_size=5)  # the batches of four end at 4, 5, 9, 10, 11
    else:
        path.write_text("".join(f"{line}\n" for line in (["url"] if kind == "csv" else []) + lines))
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go(log, connector(path))
    log.countdown = -1
    go(log, connector(path))
    assert urls(log) == sorted(lines) and go(log, connector(path)) == 0


def test_what_others_announce_is_not_taken_for_its_own(log, tmp_path):
    """Two connectors find the same URL: both announce it, also where one of them has died in between."""
    (tmp_path / "u.txt").write_text("http://x/1.jpg\nhttp://x/2.jpg\n")
    log.countdown, log.when = 3, "before"  # its candidates are told, its cursor is not
    with pytest.raises(Killed):
        go(log, connector(tmp_path / "u.txt"))
    log.countdown = -1
    metrics = ConnectMetrics(CollectorRegistry())
    assert Source("other", connector(tmp_path / "u.txt", name="other"), log, metrics).poll(threading.Event()) == 2
    assert go(log, connector(tmp_path / "u.txt")) == 0
    assert urls(log) == ["http://x/1.jpg"] * 2 + ["http://x/2.jpg"] * 2


def test_after_a_fault_the_log_is_looked_at_again(log, tmp_path, monkeypatch):
    (tmp_path / "u.txt").write_text("http://x/1.jpg\nhttp://x/2.jpg\n")
    source = Source("c", connector(tmp_path / "u.txt"), log, ConnectMetrics(CollectorRegistry()))
    append, calls = log.append, []

    def fail_once_after(records):
        done = append(records)
        calls.append(records)
        if len(calls) == 2:
            raise Retryable("the acknowledgement was lost")
        return done

    monkeypatch.setattr(log, "append", fail_once_after)
    with pytest.raises(Retryable):
        source.poll(threading.Event())
    assert source.poll(threading.Event()) == 0 and source.poll(threading.Event()) == 0
    assert urls(log) == ["http://x/1.jpg", "http://x/2.jpg"]


@pytest.mark.parametrize(
    "state", [b'{"line": 3}', b'{"cursor": {}}', b'{"cursor": 7, "ends": {}}', b'{"cursor": {}, "ends": [1]}', b"[]", b"\xff"]
)
def test_a_cursor_of_another_form_is_named_with_the_remedy_and_nothing_is_announced(log, tmp_path, state):
    log.append([NewRecord(SOURCE_STATE, b"c", state)])
    (tmp_path / "list.txt").write_text("http://a/1.jpg\n")
    with pytest.raises(
        ConfigError, match=r"connector c: the topic source-state holds b.*, which is no cursor.*DELETE /connectors/c/offsets"
    ):
        go(log, connector(tmp_path / "list.txt"))
    assert announced(log) == [] and log.latest(SOURCE_STATE, b"c") == state


def test_a_quiet_connector_renews_its_ends(log, tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.connectors.run.RENEW_S", 0.0)
    (tmp_path / "u.txt").write_text("http://x/1.jpg\n")
    source = Source("c", connector(tmp_path / "u.txt"), log, ConnectMetrics(CollectorRegistry()))
    source.poll(threading.Event())
    (tmp_path / "v.txt").write_text("".join(f"http://h{i}/v.jpg\n" for i in range(50)))
    Source("v", connector(tmp_path / "v.txt", name="v"), log, ConnectMetrics(CollectorRegistry())).poll(threading.Event())
    source.poll(threading.Event())
    ends = base.load("c", log.latest(SOURCE_STATE, b"c"))[1]
    assert sum(ends.values()) == 51


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_growing_list_is_read_on_by_whole_lines(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("u")
    log, path = make_log(folder), folder / "u.txt"
    data = "".join(f"http://x/{i}.jpg\n" for i in range(5)).encode()
    at = 0
    for cut in [*cuts, 10**6]:
        with path.open("ab") as f:
            f.write(data[at : at + cut])
        at = min(len(data), at + cut)
        go(log, connector(path))
    assert urls(log) == sorted(f"http://x/{i}.jpg" for i in range(5))


def test_what_is_no_url_is_dead_lettered_with_its_place(log, tmp_path):
    (tmp_path / "u.txt").write_text("# a comment\n\nhttp://x/1.jpg\nnot a url\nftp://x/2.jpg\nhttp://x/" + "y" * 9000 + "\n")
    assert go(log, connector(tmp_path / "u.txt")) == 1
    letters = [r.value.decode() for r in announced(log, DEAD_LETTERS)]
    assert len(letters) == 3 and sum("not an http or https URL" in x for x in letters) == 2 and sum("8192" in x for x in letters) == 1


def test_csv_and_parquet_bring_their_columns_along(log, tmp_path):
    (tmp_path / "u.csv").write_text('link,license,caption\nhttp://x/1.jpg,CC0,"a, b"\n')
    pq.write_table(
        pa.table({"url": [f"http://x/{i}.jpg" for i in range(2, 9)], "license": ["CC-BY"] * 7}), tmp_path / "u.parquet", row_group_size=3
    )
    go(log, connector(tmp_path / "u.csv", url_column="link"))
    Source("p", connector(tmp_path / "u.parquet"), log, ConnectMetrics(CollectorRegistry())).poll(threading.Event())
    found = {c.url: c for c in (Candidate.from_json(r.value) for r in announced(log))}
    assert len(found) == 8 and found["http://x/1.jpg"].alt == "a, b" and found["http://x/5.jpg"].license == "CC-BY"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("u.json", b"[]", "is .txt, .csv or .parquet"),
        ("u.csv", b"link\nhttp://x/1.jpg\n", r"no column of URLs \(url, URL, .*\); there are link; set url_column"),
        ("u.parquet", b"garbage", "cannot be read"),
    ],
)
def test_a_bad_list_is_refused_before_anything_starts(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        connector(tmp_path / name).check()


def test_a_missing_folder_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        connector(tmp_path / "nowhere", kind="folder").check()


def put(path, seed, age_s=10.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed))
    then = time.time() - age_s
    os.utime(path, (then, then))


def test_a_folder_is_watched_with_its_sub_folders(log, tmp_path):
    folder = tmp_path / "images"
    put(folder / "a.jpg", 1)
    put(folder / "sub" / "b c.PNG", 2)
    put(folder / ".hidden" / "d.jpg", 3)
    put(folder / "readme.txt", 4)
    source = connector(folder, kind="folder")
    assert go(log, source) == 2 and go(log, source) == 0
    put(folder / "later.jpg", 5, age_s=5)
    assert go(log, source) == 1
    put(folder / "a.jpg", 6, age_s=4)  # changed: announced again, with its new bytes
    assert go(log, source) == 1 and len(urls(log)) == 4


def test_a_file_that_is_still_being_written_waits(log, tmp_path):
    put(tmp_path / "images" / "a.jpg", 1, age_s=0)
    assert go(log, connector(tmp_path / "images", kind="folder")) == 0


@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(1, 10))
def test_a_folder_connector_killed_at_any_append_misses_nothing_and_repeats_nothing(log, tmp_path, monkeypatch, when, nth):
    monkeypatch.setattr("ingest.connectors.folder.BATCH", 3)
    for i in range(10):
        put(tmp_path / "images" / f"{i}.jpg", i)
        os.utime(tmp_path / "images" / f"{i}.jpg", ns=(0, (1_700_000_000 + i // 4) * 10**9))  # several share a time of change
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go(log, connector(tmp_path / "images", kind="folder"))
    log.countdown = -1
    go(log, connector(tmp_path / "images", kind="folder"))
    assert len(urls(log)) == 10 == len(set(urls(log)))


def test_the_role_goes_round_until_it_is_stopped(tmp_path):
    (tmp_path / "u.txt").write_text("http://x/1.jpg\n")
    log, stop = make_log(tmp_path), threading.Event()
    config = Config(connectors=(ConnectorConfig.of("c", "urls", path=str(tmp_path / "u.txt"), poll_s=0.05),))
    thread = threading.Thread(
        target=run_connect,
        args=(config, log, ConnectMetrics(CollectorRegistry()), Heartbeat(tmp_path, "connect"), stop),
        daemon=True,
    )
    thread.start()
    try:
        with (tmp_path / "u.txt").open("a") as f:
            f.write("http://x/2.jpg\n")
        deadline = time.monotonic() + 120
        while len(urls(log)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        stop.set()
        thread.join(60)
    assert urls(log) == ["http://x/1.jpg", "http://x/2.jpg"] and base.load("c", log.latest(SOURCE_STATE, b"c"))[0] == {"byte": 30}
