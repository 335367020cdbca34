"""Sources that are broken in places: what is bad is counted and dead-lettered with where it was, and the rest is told."""

import json
import os
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from ingest.connectors import urls as urls_module
from ingest.connectors.run import Source, build
from streamlearn.contract.config import ConnectorConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.event_log import DEAD_LETTERS
from streamlearn.contract.metrics import ConnectMetrics
from tests.ingest.connecting import make_log, records, urls
from tests.ingest.server import picture


def go(log, path, kind="urls", **more):
    """One poll of a process that has just started; the refused that it counted."""
    config = ConnectorConfig.of("c", kind, path=str(path), **more)
    registry = CollectorRegistry()
    source = Source("c", build(config), log, ConnectMetrics(registry), errors=config)
    source.connector.check()
    source.poll(threading.Event())
    return int(registry.get_sample_value("connect_refused_total"))


def letters(log):
    return sorted((json.loads(r.value)["origin"], json.loads(r.value)["detail"]) for r in records(log, DEAD_LETTERS))


BAD_LINES = {
    "a return within it": (b"http://x/2.jpg,a\rb", "no line of CSV: new-line character"),
    "a field of a megabyte": (b"http://x/2.jpg," + b"y" * 2**20, "a line over 131072 bytes"),
    "no UTF-8 in its URL": (b"http://\xff\xfe/2.jpg,a", None),
    "no URL": (b",a", "not an http or https URL"),
    "too few fields": (b"nonsense", "not an http or https URL"),
    "a quote that does not end": (b'"http://x/2.jpg,a', None),
    "a URL over the cap": (b"http://x/" + b"y" * 9000 + b",a", "8192"),
    "NUL": (b"http://x\0/,a", None),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_of_a_csv_is_dead_lettered_with_its_place_and_the_next_one_read(tmp_path, name):
    line, why = BAD_LINES[name]
    log, path = make_log(tmp_path), tmp_path / "u.csv"
    path.write_bytes(b"url,alt\nhttp://x/1.jpg,a\n" + line + b"\nhttp://x/3.jpg,c\n")
    refused = go(log, path)
    assert {"http://x/1.jpg", "http://x/3.jpg"} <= set(urls(log)) and len(urls(log)) + refused == 3
    assert refused == len(letters(log)) and (why is None or (letters(log)[0][0] == "c: byte 25" and why in letters(log)[0][1]))
    assert go(log, path) == 0 and len(records(log)) + len(letters(log)) == 3  # it is behind us
    if refused:
        (tmp_path / "strict").mkdir()
        strict = make_log(tmp_path / "strict")
        with pytest.raises(ConfigError, match="byte 25.*errors_tolerance = 'none'"):
            go(strict, path, errors_tolerance="none")
        assert urls(strict) == []


@given(
    st.lists(st.binary(max_size=12) | st.sampled_from([b'"', b"\r", b"\0", b",", b"http://x/9.jpg", b"x" * 40]), max_size=8), st.booleans()
)
@example([b"x" * 41, b""], True)
def test_whatever_stands_in_a_list_its_good_lines_are_told_and_nothing_raises(tmp_path_factory, pieces, as_csv):
    path = tmp_path_factory.mktemp("u") / ("u.csv" if as_csv else "u.txt")
    noise = b"".join(pieces).replace(b"\n", b"")
    path.write_bytes((b"url\n" if as_csv else b"") + b"http://x/1.jpg\n" + noise + b"\nhttp://x/2.jpg\n" + noise)
    source = build(ConnectorConfig.of("c", "urls", path=str(path)))
    source.check()
    original, urls_module.MAX_LINE = urls_module.MAX_LINE, 40
    try:
        found = list(source.discover(None))
        told = [c.url for one in found for c in one.candidates]
        assert told[0] == "http://x/1.jpg" and told[-1] == "http://x/2.jpg" and len(told) + sum(len(one.refused) for one in found) <= 3
        assert list(source.discover(found[-1].cursor)) == []
    finally:
        urls_module.MAX_LINE = original


def test_a_header_that_is_no_csv_is_a_complaint(tmp_path):
    (tmp_path / "u.csv").write_bytes(b"y" * 200_000 + b"\n")
    with pytest.raises(ConfigError, match=r"u\.csv: cannot be read: field larger"):
        go(make_log(tmp_path), tmp_path / "u.csv")


def parquet(path, rows=12, column=None):
    data = column or pa.array([f"http://x/{i:02}.jpg" for i in range(rows)])
    pq.write_table(pa.table({"url": data}), path, row_group_size=4, compression="gzip", use_dictionary=False)
    return pq.ParquetFile(path).metadata


@pytest.mark.parametrize("folder", [False, True])
def test_rows_that_cannot_be_unpacked_are_dead_lettered_as_a_group_and_the_next_group_read(tmp_path, folder):
    log, path = make_log(tmp_path), tmp_path / "parts" / "u.parquet"
    path.parent.mkdir()
    chunk = parquet(path).row_group(1).column(0)
    body = bytearray(path.read_bytes())
    end = chunk.data_page_offset + chunk.total_compressed_size
    body[end - 30 : end] = b"\xff" * 30
    path.write_bytes(body)
    where = path.parent if folder else path
    assert go(log, where) == 1 and urls(log) == [f"http://x/{i:02}.jpg" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    ((origin, why),) = letters(log)
    assert origin == ("c: u.parquet row 4" if folder else "c: row 4") and why.startswith("group 1 cannot be read: ")
    assert json.loads(records(log, DEAD_LETTERS)[0].value)["url"] == "4 rows, to 7"
    assert go(log, where) == 0 and len(urls(log)) == 8


def test_a_text_that_is_none_is_one_rows_trouble(tmp_path):
    log = make_log(tmp_path)
    values = pa.array([b"http://x/00.jpg", b"\xff\xfe", b"http://x/02.jpg", None])
    raw = pa.Array.from_buffers(pa.string(), 4, values.buffers(), values.null_count)  # a writer that does not look
    parquet(tmp_path / "u.parquet", column=raw)
    assert go(log, tmp_path / "u.parquet") == 2 and urls(log) == ["http://x/00.jpg", "http://x/02.jpg"]
    assert [origin for origin, _ in letters(log)] == ["c: row 1", "c: row 3"]
    pq.write_table(pa.table({"url": pa.array([b"http://x/04.jpg"])}), tmp_path / "b.parquet")  # some have their URLs as bytes
    (tmp_path / "b").mkdir()
    other = make_log(tmp_path / "b")
    assert go(other, tmp_path / "b.parquet") == 0 and urls(other) == ["http://x/04.jpg"]


def test_files_that_cannot_be_looked_at_or_named_hold_up_no_others(tmp_path):
    log, folder = make_log(tmp_path), tmp_path / "images"
    folder.mkdir()
    then = time.time() - 10
    for name in (b"a.jpg", b"\xff\xfe.jpg", b"z.jpg"):
        path = os.fsencode(folder) + b"/" + name
        with open(path, "wb") as f:  # noqa: PTH123  a name of bytes
            f.write(picture(1))
        os.utime(path, (then, then))
    (folder / "round.jpg").symlink_to("round.jpg")
    (folder / "nowhere.jpg").symlink_to("gone")
    (folder / "deep").symlink_to(folder)  # a folder within itself
    refused = go(log, folder, kind="folder")
    assert len(urls(log)) + refused == 3 and len(urls(log)) >= 2 and refused == len(letters(log))
    assert go(log, folder, kind="folder") == 0 and len(urls(log)) + len(letters(log)) == 3
