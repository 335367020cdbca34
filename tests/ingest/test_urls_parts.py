"""Lists of URLs as the web has them: parquet in parts, and columns by the names of img2dataset, LAION, COYO and DataComp."""

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry

from ingest.connectors.configure import build
from ingest.connectors.run import Source
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import ConnectorConfig
from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.metrics import ConnectMetrics
from tests.ingest.connecting import make_log, records, urls
from tests.ingest.test_connectors import DyingLog, Killed


def source(log, path, **more):
    connector = build(ConnectorConfig.of("c", "urls", path=str(path), **more))
    return Source("c", connector, log, ConnectMetrics(CollectorRegistry()))


def go(log, path, **more):
    """As a process that has just started: only the cursor is left."""
    one = source(log, path, **more)
    one.connector.check()
    return one.poll(threading.Event())


def part(path, first, count, rows=3, column="url"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: [f"http://x/{i}.jpg" for i in range(first, first + count)]}), path, row_group_size=rows)


def numbers(log):
    return sorted(int(u.rsplit("/", 1)[1][:-4]) for u in urls(log))


COLUMNS = {
    "img2dataset": ({"url": "http://x/1.jpg", "caption": "a"}, "a", None),
    "LAION": ({"SAMPLE_ID": "1", "URL": "http://x/1.jpg", "TEXT": "a", "LICENSE": "CC0", "NSFW": "UNLIKELY"}, "a", "CC0"),
    "LAION, unknown licence": ({"URL": "http://x/1.jpg", "TEXT": "a", "LICENSE": "?"}, "a", None),
    "COYO": ({"id": "1", "url": "http://x/1.jpg", "text": "a", "width": "3"}, "a", None),
    "DataComp": ({"uid": "1", "url": "http://x/1.jpg", "text": "a", "sha256": "x"}, "a", None),
    "image_url": ({"image_url": "http://x/1.jpg", "alt": "a", "license": "CC-BY"}, "a", "CC-BY"),
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("name", COLUMNS)
def test_the_columns_of_the_usual_lists_are_known(tmp_path, name, kind):
    fields, alt, license_ = COLUMNS[name]
    log, path = make_log(tmp_path), tmp_path / f"list.{kind}"
    if kind == "csv":
        path.write_text(",".join(fields) + "\n" + ",".join(fields.values()) + "\n")
    else:
        pq.write_table(pa.table({k: [v] for k, v in fields.items()}), path)
    assert go(log, path) == 1
    found = Candidate.from_json(records(log)[0].value)
    assert (found.url, found.alt, found.license) == ("http://x/1.jpg", alt, license_)


def test_a_column_that_is_named_wins_over_the_usual_ones(tmp_path):
    log = make_log(tmp_path)
    (tmp_path / "u.csv").write_text("url,link\nhttp://x/1.jpg,http://x/2.jpg\n")
    assert go(log, tmp_path / "u.csv", url_column="link") == 1 and numbers(log) == [2]
    with pytest.raises(ConfigError, match="no column 'lnk'; there are url, link; set url_column"):
        source(log, tmp_path / "u.csv", url_column="lnk").connector.check()


@pytest.mark.parametrize("path", ["parts", "parts/*.parquet", "parts/**/*.parquet"])
def test_parts_are_read_in_order_and_one_that_is_added_later_too(tmp_path, path):
    log = make_log(tmp_path)
    part(tmp_path / "parts" / "part-1.parquet", 10, 7)
    part(tmp_path / "parts" / "part-3.parquet", 30, 5)
    order = [c.url for found in source(log, tmp_path / path).connector.discover(None) for c in found.candidates]
    assert order == [f"http://x/{i}.jpg" for i in [*range(10, 17), *range(30, 35)]]
    assert go(log, tmp_path / path) == 12 and go(log, tmp_path / path) == 0
    part(tmp_path / "parts" / "part-2.parquet", 20, 2)  # between the two
    part(tmp_path / "parts" / "part-0.parquet", 0, 0)
    assert go(log, tmp_path / path) == 2 and go(log, tmp_path / path) == 0
    assert numbers(log) == [*range(10, 17), 20, 21, *range(30, 35)]


def test_what_spark_has_not_finished_is_no_part(tmp_path):
    for name in ("a.parquet", "_temporary/0/b.parquet", ".c.parquet"):
        part(tmp_path / "parts" / name, 0, 1)
    assert go(make_log(tmp_path), tmp_path / "parts") == 1


@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize("nth", range(1, 10))
def test_killed_anywhere_in_the_parts_with_a_part_added_meanwhile_every_row_is_told_once(tmp_path, monkeypatch, nth, when):
    monkeypatch.setattr("ingest.connectors.urls.BATCH", 2)
    log = make_log(tmp_path, DyingLog)
    part(tmp_path / "parts" / "b.parquet", 10, 5)
    part(tmp_path / "parts" / "c.parquet", 20, 3)
    log.countdown, log.when = nth, when
    with pytest.raises(Killed):
        go(log, tmp_path / "parts")
    log.countdown = -1
    part(tmp_path / "parts" / "a.parquet", 0, 3)  # before the one that was being read
    go(log, tmp_path / "parts")
    assert numbers(log) == [0, 1, 2, 10, 11, 12, 13, 14, 20, 21, 22]


def test_the_part_that_was_begun_comes_first_or_its_row_would_be_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.connectors.urls.BATCH", 2)
    log = make_log(tmp_path, DyingLog)
    part(tmp_path / "parts" / "b.parquet", 10, 6)
    for nth in (5, 4):  # in the midst of b; then, with a there too, once more
        log.countdown, log.when = nth, "after"
        with pytest.raises(Killed):
            go(log, tmp_path / "parts")
        part(tmp_path / "parts" / "a.parquet", 0, 6)
    log.countdown = -1
    go(log, tmp_path / "parts")
    assert numbers(log) == [*range(6), *range(10, 16)]


def test_a_part_that_cannot_be_read_holds_up_no_other_and_is_tried_again(tmp_path):
    log = make_log(tmp_path)
    part(tmp_path / "parts" / "a.parquet", 0, 2)
    (tmp_path / "parts" / "b.parquet").write_bytes(b"PAR1 half a part")
    part(tmp_path / "parts" / "c.parquet", 20, 2, column="nothing")
    part(tmp_path / "parts" / "d.parquet", 30, 2)
    with pytest.raises(Retryable, match=r"(?s)b\.parquet: .*c\.parquet: no column of URLs; there are nothing"):
        go(log, tmp_path / "parts")
    assert numbers(log) == [0, 1, 30, 31]
    part(tmp_path / "parts" / "b.parquet", 10, 2)
    part(tmp_path / "parts" / "c.parquet", 20, 2)
    assert go(log, tmp_path / "parts") == 4 and go(log, tmp_path / "parts") == 0


def test_one_parquet_file_has_the_cursor_it_always_had(tmp_path):
    log = make_log(tmp_path)
    part(tmp_path / "u.parquet", 0, 7)
    one = source(log, tmp_path / "u.parquet")
    assert [f.cursor for f in one.connector.discover({"row": 4})] == [{"row": 6}, {"row": 7}]
    assert [c.source_ref for f in one.connector.discover({"row": 4}) for c in f.candidates] == ["row 4", "row 5", "row 6"]


def test_a_folder_that_is_still_empty_is_waited_for_and_a_glob_of_nothing_is_refused(tmp_path):
    (tmp_path / "parts").mkdir()
    log = make_log(tmp_path)
    assert go(log, tmp_path / "parts") == 0
    with pytest.raises(ConfigError, match="no such file"):
        go(log, tmp_path / "parts" / "*.parquet")
    part(tmp_path / "parts" / "a.parquet", 0, 2)
    assert go(log, tmp_path / "parts") == 2


def test_more_parts_than_a_cursor_can_name_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.connectors.urls.MAX_PARTS", 2)
    for i in range(3):
        part(tmp_path / "parts" / f"{i}.parquet", i, 1)
    with pytest.raises(ConfigError, match="3 parts, over 2: give them to several connectors"):
        go(make_log(tmp_path), tmp_path / "parts")
