"""`streamlearn dataset` over a real dataset: what it says equals what pyarrow counts."""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from click.testing import CliRunner

from ingest import look
from ingest import query as querying
from ingest.query import query, within
from streamlearn.__main__ import cli
from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract.catalog import Advance, DeltaCatalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from tests.ingest.dataset import crafted, largest, path_of, put
from tests.ingest.server import picture


def run(place, *words):
    result = CliRunner().invoke(cli, ["dataset", *words, "--home", str(place.home)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(place, *words):
    result = run(place, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def counted(place):
    """Every outcome with its shard, by pyarrow alone."""
    for row in place.catalog.rows():
        for outcome in read_sidecar(path_of(place, sidecar_key(row.key))).to_pylist():
            yield row, outcome


def sql(place, text, *parameters, rows=None):
    with query(place.store, place.catalog.rows() if rows is None else rows, text, parameters) as answer:
        return list(answer)


def test_sql_counts_what_pyarrow_counts(place):
    everything = list(counted(place))
    by_kind = Counter((row.topic, row.partition, o["outcome"], o["reason"]) for row, o in everything)
    assert {r[:4]: r[4] for r in sql(place, "SELECT topic, partition, outcome, reason, count(*) FROM outcomes GROUP BY ALL")} == by_kind
    assert sql(place, "SELECT count(*), sum(bytes) FROM shards") == [
        (len(place.catalog.rows()), sum(r.bytes for r in place.catalog.rows()))
    ]
    stored = {(row.key, o["offset"]): o["sha256"] for row, o in everything if o["outcome"] == STORED}
    assert {r[:2]: r[2] for r in sql(place, "SELECT shard, \"offset\", sha256 FROM outcomes WHERE outcome = 'stored'")} == stored
    joined = "SELECT s.key, count(*) FROM shards s JOIN outcomes o ON o.shard = s.key GROUP BY 1"
    assert dict(sql(place, joined)) == Counter(row.key for row, _ in everything)
    twice = 'SELECT count(*) FROM outcomes a JOIN outcomes b USING (shard, "offset")'  # a reader that can be read only once would say 0
    assert sql(place, twice) == [(len(everything),)]
    assert sql(place, "SELECT DISTINCT day FROM outcomes ORDER BY 1") == sorted({(row.day,) for row, _ in everything})


def test_rows_that_are_not_live_are_in_no_view(place):
    end = place.catalog.position("candidates", 0)
    before = sql(place, "SELECT count(*) FROM outcomes")
    put(place, crafted(end, end + 5, status="expired"))
    assert sql(place, "SELECT count(*) FROM outcomes") == before and sql(place, "SELECT count(*) FROM shards WHERE status <> 'live'") == [
        (0,)
    ]


def test_since_and_until_choose_days_both_included():
    rows = [crafted(n, n + 1, **{}) for n in range(3)]
    rows = [type(r)(**r.__dict__ | {"day": f"2026-11-2{n}"}) for n, r in enumerate(rows)]
    assert [r.day[-1] for r in within(rows, "2026-11-21")] == ["1", "2"] and [r.day[-1] for r in within(rows, "", "2026-11-21")] == [
        "0",
        "1",
    ]
    assert within(rows, "2026-11-21", "2026-11-21") == rows[1:2] and within(rows) == rows


def test_only_the_days_asked_for_are_read(place):
    end = place.catalog.position("candidates", 0)
    long_ago = type(crafted(0, 1))(**crafted(end, end + 5).__dict__ | {"day": "2020-01-01"})
    put(place, long_ago)  # without its objects: reading it would fail
    assert said(place, "query", "SELECT count(*) n FROM outcomes", "--since", "2020-01-02")[0]["n"] == len(
        list(counted_since(place, "2020-01-02"))
    )
    assert said(place, "query", "SELECT count(*) n FROM shards", "--until", "2020-01-01") == [{"n": 1}]
    with pytest.raises(Corrupt, match="dataset verify"):
        run(place, "query", "SELECT count(*) FROM outcomes")
    place.store.put(sidecar_key(long_ago.key), b"garbage")
    with pytest.raises(Corrupt, match=sidecar_key(long_ago.key)):
        run(place, "query", "SELECT count(*) FROM outcomes")
    assert said(place, "query", "SELECT max(end_offset) n FROM shards WHERE day < '2021'") == [{"n": end + 5}]  # needs no sidecar


def counted_since(place, day):
    for row in place.catalog.rows():
        if row.day >= day:
            yield from read_sidecar(path_of(place, sidecar_key(row.key))).to_pylist()


@pytest.mark.parametrize(
    "text, why",
    [
        ("SELEC 1", "syntax error"),
        ("SELECT 1; SELECT 2", "one statement that reads"),
        ("CREATE TABLE t (a INT)", "CREATE"),
        ("COPY shards TO 'stolen.csv'", "COPY"),
        ("SET threads = 99", "SET"),
        ("INSTALL httpfs", "one statement"),
        ("", "nothing"),
        ("SELECT * FROM read_csv('config.json')", "disabled"),
        ("SELECT * FROM read_text('config.json')", "disabled"),
        ("SELECT * FROM 'config.json'", "disabled|does not exist"),
        ("SELECT nothing FROM shards", "nothing"),
    ],
)
def test_a_query_that_is_wrong_or_does_more_than_read_is_refused(place, monkeypatch, text, why):
    monkeypatch.chdir(place.home)
    with pytest.raises(ConfigError, match=why):
        run(place, "query", text)
    assert not (place.home / "stolen.csv").exists()


def test_large_answers_come_piece_by_piece_and_large_sorts_spill(place, monkeypatch):
    monkeypatch.setattr(querying, "MEMORY", "64MB")
    with query(place.store, [], "SELECT hash(range)::VARCHAR || repeat('x', 20) h FROM range(2000000) ORDER BY h") as answer:
        assert sum(1 for _ in answer) == 2_000_000 and answer.columns == ["h"]


def test_output_as_table_json_and_csv(place):
    text = 'SELECT topic, partition, "offset", url, license FROM outcomes ORDER BY 1, 2, 3'
    rows = said(place, "query", text)
    parsed = list(csv.reader(io.StringIO(run(place, "query", text, "--csv").stdout)))
    assert parsed[0] == list(rows[0]) == ["topic", "partition", "offset", "url", "license"] and len(parsed) == len(rows) + 1 > 28
    assert [[str(v) for v in row.values()] for row in rows] == parsed[1:]
    assert "candidates" in run(place, "query", text).output
    assert said(place, "query", "SELECT 1 WHERE false") == []
    assert said(place, "query", "SELECT DATE '2026-11-21' AS d, 'ä' AS t, NULL AS n") == [{"d": "2026-11-21", "t": "ä", "n": None}]
    many = run(place, "query", "SELECT * FROM range(1000)")
    assert "999" not in many.stdout and "first 100 rows" in many.stderr
    assert run(place, "query", "SELECT 1", "--csv", "--json").exit_code == 2


def test_what_a_stranger_wrote_is_shown_and_not_obeyed(place):
    shown = run(place, "query", "SELECT '[/red]' AS \"[b]\", chr(27) || '[31mred' AS t").output
    assert "[/red]" in shown and "[b]" in shown and "\ufffd[31mred" in shown and "\x1b" not in shown


def test_status_in_numbers(place):
    everything, rows = list(counted(place)), place.catalog.rows()
    found = said(place, "status")
    assert (found["shards"], found["samples"], found["bytes"]) == (len(rows), 24, sum(r.bytes for r in rows))
    assert found["outcomes"] == Counter(o["outcome"] for _, o in everything) and found["outcomes"]["deferred"] >= 2
    assert found["rejected"] == Counter(o["reason"] for _, o in everything if o["outcome"] == "rejected")
    assert found["sources"] == {"t": 24}
    assert found["oldest"] == min(o["fetched_at"] for _, o in everything if o["fetched_at"])
    assert found["newest"] == max(o["fetched_at"] for _, o in everything) and 0 <= found["freshness_s"] < 3600
    positions = {(p["topic"], p["partition"]): (p["position"], p["lag"], p["owed"]) for p in found["partitions"]}
    assert positions["candidates", 0] == (14, 0, 0) and ("retry.0", 1) in positions
    text = run(place, "status").output
    assert "stored 24" in text and "candidates" in text
    assert said(place, "status", "--since", "2100-01-01")["outcomes"] == {}


def test_show_a_shard(place):
    row = largest(place)
    shown = said(place, "show", row.key)
    assert shown["outcomes"]["stored"] == row.num_samples and shown["sha256"] == row.sha256
    assert row.sha256 in run(place, "show", row.key).output
    with pytest.raises(NotFound, match="no such shard"):
        run(place, "show", "shards/none.tar")
    assert run(place, "show", row.key, "--out", str(place.home / "x")).exit_code == 2
    expired = crafted(14, 20, status="expired")
    put(place, expired)
    assert said(place, "show", expired.key)["status"] == "expired"


def test_show_a_sample_by_place_digest_or_url_and_take_it_out(place):
    row, outcome = next((r, o) for r, o in counted(place) if o["url"].endswith("/8.jpg") and o["outcome"] == STORED)
    name = f"{row.topic}/{row.partition}/{outcome['offset']}"
    for number, word in enumerate((name, outcome["sha256"], outcome["url"])):
        out = place.home / f"{number}.jpg"
        (shown,) = said(place, "show", word, "--out", str(out))
        assert (
            shown["name"] == name
            and shown["shard"] == row.key
            and shown["source"] == "t"
            and shown["member_offset"] == outcome["member_offset"]
        )
        assert out.read_bytes() == picture(8) and hashlib.sha256(picture(8)).hexdigest() == shown["sha256"]
    assert "fetched_at" in run(place, "show", name).output


def test_show_what_is_not_there_or_is_damaged(place):
    for word in ("candidates/0/999", "0" * 64, "http://nowhere/x.jpg", "nonsense"):
        with pytest.raises(NotFound, match="no live shard"):
            run(place, "show", word)
    row, refused = next((r, o) for r, o in counted(place) if o["outcome"] == "rejected")
    name, out = f"{row.topic}/{row.partition}/{refused['offset']}", place.home / "x.jpg"
    assert said(place, "show", name)[0]["reason"] == refused["reason"]
    with pytest.raises(NotFound, match="ended as rejected"):
        run(place, "show", name, "--out", str(out))
    row, stored = next((r, o) for r, o in counted(place) if o["outcome"] == STORED)
    data = bytearray(path_of(place, row.key).read_bytes())
    data[stored["member_offset"]] ^= 1
    path_of(place, row.key).write_bytes(data)
    with pytest.raises(Corrupt, match="another sha256"):
        run(place, "show", f"{row.topic}/{row.partition}/{stored['offset']}", "--out", str(out))
    assert not out.exists()


def test_an_image_that_was_deferred_first_is_taken_from_where_it_was_stored(place):
    url = next(o["url"] for _, o in counted(place) if o["url"].endswith("/3.jpg"))
    shown = said(place, "show", url, "--out", str(place.home / "3.jpg"))
    assert {s["outcome"] for s in shown} == {"stored", "deferred"} and shown[0]["outcome"] == "stored"
    assert (place.home / "3.jpg").read_bytes() == picture(3)


def test_generations(place):
    assert said(place, "generations") == [] and "generation" in run(place, "generations").output
    put(place, crafted(14, 16, generation="2026Q3", num_samples=2))
    put(place, crafted(16, 20, generation="2026Q3", num_samples=3, status="expired"))
    version = place.catalog.version()
    assert said(place, "generations") == [{"generation": "2026Q3", "version": version, "shards": 1, "samples": 2}]
    assert look.generations(place.catalog.history())[0]["version"] == version


def test_verify_exits_with_1_and_says_what_where_and_the_remedy(place):
    fine = run(place, "verify", "--deep")
    assert fine.exit_code == 0 and fine.output.startswith("ok ") and said(place, "verify")["good"]
    row = largest(place)
    path_of(place, row.key).unlink()
    wrong = run(place, "verify", "--sample", "0")
    assert wrong.exit_code == 1 and wrong.output.startswith(f"WRONG missing {row.key}: no tar: {row.num_samples} samples are gone; restore")
    assert len(wrong.output.splitlines()) == 2
    as_json = run(place, "verify", "--json")
    assert as_json.exit_code == 1 and [f["where"] for f in json.loads(as_json.stdout)["findings"]] == [row.key]


def test_sweep(place):
    key = "shards/dt=2026-11-01/lost.tar"
    place.store.put(key, b"x")
    assert "1 younger than 24 h let be" in run(place, "sweep").output
    os.utime(path_of(place, key), (time.time() - 7300,) * 2)
    assert f"would delete {key}" in run(place, "sweep", "--older-than", "2", "--dry-run").output and place.store.get(key)
    assert (
        f"deleted {key} (2.0 h old)" in run(place, "sweep", "--older-than", "2").output and place.store.list("shards/dt=2026-11-01") == []
    )
    assert run(place, "sweep", "--older-than", "0").exit_code == 2  # what is being sealed now must be safe


def test_where_no_loop_has_run(tmp_path, place):
    for words in (["status"], ["show", "x"], ["generations"], ["query", "SELECT 1"], ["verify"], ["sweep"]):
        with pytest.raises(ConfigError, match="no loop has run here"):
            CliRunner().invoke(cli, ["dataset", *words, "--home", str(tmp_path / "none")], catch_exceptions=False)
    place.log.close()
    (place.home / "log.sqlite").unlink()
    with pytest.raises(ConfigError, match="no event log"):
        run(place, "status")
    assert not (place.home / "log.sqlite").exists()


def test_an_empty_home_can_be_looked_at(tmp_path):
    from tests.ingest.server import Place

    place = Place(tmp_path)
    (tmp_path / "config.json").write_text(Config().model_dump_json())
    assert (
        said(place, "status")["shards"] == 0
        and said(place, "verify")["good"]
        and said(place, "query", "SELECT count(*) n FROM outcomes") == [{"n": 0}]
    )
    assert "none yet" in run(place, "status").output and run(place, "sweep").exit_code == 0


def test_the_process_ends_cleanly(place):
    """Libraries with threads of their own (delta-rs, arrow, DuckDB) must not abort at exit."""
    command = [sys.executable, "-m", "streamlearn", "dataset", "query", "SELECT count(*) FROM outcomes", "--csv", "--home", str(place.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, "count_star()", "")


def test_query_on_s3(place, bucket):
    config = bucket.config()
    store = S3Store(config)
    catalog = DeltaCatalog(store.uri("catalog/shards"), log_id=place.log.log_id, storage_options=delta_options(config))
    for key in place.store.list("shards/"):
        store.put_file(key, path_of(place, key))
    for row in place.catalog.rows():
        catalog.commit([row], [Advance(row.topic, row.partition, row.first_offset, row.end_offset)])
    text = 'SELECT topic, partition, "offset", outcome, sha256 FROM outcomes ORDER BY 1, 2, 3'
    here = said(place, "query", text)
    (place.home / "config.json").write_text(Config(store=config).model_dump_json())
    assert said(place, "query", text) == here and len(here) >= 30
    assert said(place, "verify", "--deep")["good"] and said(place, "status")["samples"] == 24
    store.delete(sidecar_key(largest(place).key))
    with pytest.raises(NotFound, match="no object"):
        run(place, "query", text)
    assert said(place, "query", "SELECT count(*) n FROM shards")[0]["n"] == len(place.catalog.rows())
