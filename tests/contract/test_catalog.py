"""The suite every catalog passes, in a folder and on S3 as moto plays it: positions and rows move together, exactly once."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract import catalog as module
from streamlearn.contract.catalog import Advance, DeltaCatalog, ShardRow
from streamlearn.contract.errors import Conflict, Corrupt, Fenced
from tests.contract.test_durable import tiny_disk  # noqa: F401  a fixture


def row(first, end, partition=0, **more):
    stamp = "2026-11-21T00:00:00.000Z"
    fields = dict(key=f"shards/{partition}/{first}-{end}", sha256="a" * 64, bytes=10, num_samples=end - first, topic="candidates")
    return ShardRow(
        **fields | more,
        partition=partition,
        first_offset=first,
        end_offset=end,
        first_fetched_at=stamp,
        last_fetched_at=stamp,
        day="2026-11-21",
    )


def advance(start, end, partition=0):
    return Advance("candidates", partition, start, end)


@dataclass(frozen=True)
class Where:
    """A place for a table, and all that another process needs to open it."""

    uri: str
    options: dict[str, str] | None = None

    def catalog(self, log_id="log", **more):
        return DeltaCatalog(self.uri, log_id=log_id, storage_options=self.options, **more)


@pytest.fixture(params=["folder", "s3"])
def where(request, tmp_path):
    if request.param == "folder":
        return Where(str(tmp_path / "catalog"))
    return on_s3(request.getfixturevalue("bucket").config())


def on_s3(config):
    return Where(S3Store(config).uri("catalog/shards"), delta_options(config))


@pytest.fixture
def catalog(where):
    return where.catalog()


def test_nothing_is_committed_at_first(catalog):
    assert catalog.position("candidates", 0) == 0 and catalog.version() == -1
    assert catalog.follow(-1) == (-1, []) and catalog.rows() == []


def test_rows_come_back_in_commit_order_and_only_the_new_ones(catalog):
    catalog.commit([row(0, 5)], [advance(0, 5)])
    seen, _ = catalog.follow(-1)
    catalog.commit([row(0, 3, 1), row(5, 9)], [advance(0, 3, 1), advance(5, 9)])
    assert [r.key for r in catalog.follow(seen)[1]] == ["shards/1/0-3", "shards/0/5-9"]
    assert [r.key for r in catalog.rows()] == ["shards/0/0-5", "shards/1/0-3", "shards/0/5-9"]
    assert catalog.follow(catalog.version())[1] == []


def test_history_holds_what_is_no_longer_live_and_says_when_it_came(catalog):
    assert catalog.history() == []
    catalog.commit([row(0, 5, status="replaced")], [advance(0, 5)])
    catalog.commit([row(5, 9), row(0, 3, 1)], [advance(5, 9), advance(0, 3, 1)])
    assert [(r.committed, r.key, r.status) for r in catalog.history()] == [
        (1, "shards/0/0-5", "replaced"),
        (2, "shards/0/5-9", "live"),
        (2, "shards/1/0-3", "live"),
    ]
    assert catalog.rows() == [r for r in catalog.history() if r.status == "live"]


def test_a_zombie_is_fenced_and_publishes_nothing(catalog, where):
    zombie = where.catalog()
    assert zombie.position("candidates", 0) == 0
    catalog.commit([row(0, 5)], [advance(0, 5)])
    with pytest.raises(Fenced, match=r"candidates/0 is at 5, not 0"):
        zombie.commit([row(0, 7, key="late")], [advance(0, 7)])
    assert [r.key for r in catalog.rows()] == ["shards/0/0-5"]


def test_a_zombie_that_read_just_before_is_fenced_by_the_table_itself(catalog, where, monkeypatch):
    """Its look at the positions is stale: only the conflict of application transactions can stop it."""
    catalog.commit([row(0, 5)], [advance(0, 5)])
    zombie = where.catalog(attempts=1)
    stale = zombie._open()
    catalog.commit([row(5, 9)], [advance(5, 9)])
    monkeypatch.setattr(zombie, "_open", lambda: stale)
    with pytest.raises(module.Retryable):
        zombie.commit([row(5, 8, key="late")], [advance(5, 8)])
    assert [r.key for r in catalog.rows()] == ["shards/0/0-5", "shards/0/5-9"]


def test_a_lost_reply_is_resolved_by_reading_back(catalog, monkeypatch):
    """The commit lands, the answer does not: the caller must hear of success, and the rows stand once."""
    write = catalog._write
    calls = []

    def lands_then_breaks(*args):
        write(*args)
        calls.append(1)
        raise OSError("connection reset by peer")

    monkeypatch.setattr(catalog, "_write", lands_then_breaks)
    version = catalog.commit([row(0, 5)], [advance(0, 5)])
    assert version == catalog.version() and len(calls) == 1 and len(catalog.rows()) == 1


def test_a_unit_without_images_still_moves_the_position(catalog):
    catalog.commit([row(0, 5, num_samples=0)], [advance(0, 5)])
    assert catalog.position("candidates", 0) == 5


@pytest.mark.slow
def test_writers_of_different_partitions_do_not_disturb_each_other(catalog, where):
    code = (
        "import json, sys; from tests.contract.test_catalog import *\n"
        "p = int(sys.argv[2]); c = Where(**json.loads(sys.argv[1])).catalog()\n"
        "for i in range(0, 20, 2): c.commit([row(i, i + 2, p)], [advance(i, i + 2, p)])"
    )
    catalog.commit([row(0, 1, 9)], [advance(0, 1, 9)])
    children = [subprocess.Popen([sys.executable, "-c", code, json.dumps(asdict(where)), str(p)]) for p in range(3)]
    assert [c.wait() for c in children] == [0, 0, 0]
    keys = [r.key for r in catalog.rows()]
    assert len(keys) == len(set(keys)) == 31 and [catalog.position("candidates", p) for p in range(3)] == [20] * 3


def test_following_by_version_misses_nothing_while_others_write(catalog, where):
    """`committed` is the very version that added the row, so a follower can never step over one."""
    for i in range(6):
        catalog.commit([row(i, i + 1)], [advance(i, i + 1)])
    table = DeltaTable(where.uri, storage_options=where.options)
    for version in range(1, table.version() + 1):
        at = QueryBuilder().register("t", DeltaTable(where.uri, version=version, storage_options=where.options))
        found = pa.RecordBatchReader.from_stream(at.execute("SELECT max(committed) AS m FROM t")).read_all()
        assert found.to_pylist() == [{"m": version}]


def test_another_log_starts_at_zero(catalog, where):
    catalog.commit([row(0, 5)], [advance(0, 5)])
    assert where.catalog("recreated").position("candidates", 0) == 0


def test_a_damaged_log_is_named_with_the_remedy(tmp_path):
    where = Where(str(tmp_path / "catalog"))
    where.catalog().commit([row(0, 5)], [advance(0, 5)])
    for entry in (tmp_path / "catalog" / "_delta_log").glob("*.json"):
        entry.write_text('{"garbage')
    with pytest.raises(Corrupt, match="catalog.*backup"):
        where.catalog().rows()


def merged(*rows, key="merged", **more):
    """A row that covers these."""
    return row(
        rows[0].first_offset, rows[-1].end_offset, rows[0].partition, key=key, replaces=",".join(r.key for r in rows),
        num_samples=sum(r.num_samples for r in rows), **more,
    )  # fmt: skip


@pytest.fixture
def three(catalog):
    """Two neighbours and, between them in time, another partition's row."""
    rows = row(0, 5), row(0, 3, 1), row(5, 9)
    for r in rows:
        catalog.commit([r], [advance(r.first_offset, r.end_offset, r.partition)])
    return rows


def test_a_replacement_ends_rows_and_puts_another_in_their_place_of_the_order(catalog, three):
    a, other, b = three
    seen = catalog.version()
    version = catalog.replace([a.key, b.key], [merged(a, b)], note="small")
    assert [r.key for r in catalog.rows()] == ["merged", other.key]  # where `a` stood
    assert [(r.key, r.status, r.note) for r in catalog.history()] == [
        (a.key, "replaced", "small"), ("merged", "live", ""), (other.key, "live", ""), (b.key, "replaced", "small"),
    ]  # fmt: skip
    changes = catalog.changes(seen)
    assert changes.version == version == catalog.version() and catalog.position("candidates", 0) == 9
    assert [r.key for r in changes.live] == ["merged"] and [r.key for r in changes.ended] == [a.key, b.key]
    assert all(r.ended_at for r in changes.ended) and catalog.changes(version).ended == []
    assert [r.key for r in catalog.follow(seen)[1]] == ["merged"]


def test_rows_end_without_successor_and_stay_in_the_history(catalog, three):
    catalog.replace([three[0].key], [], status="expired")
    assert [r.key for r in catalog.rows()] == [three[1].key, three[2].key]
    assert [r.status for r in catalog.history()] == ["expired", "live", "live"]


def test_what_was_removed_is_told(catalog, three):
    a = three[0]
    less = row(0, 5, key="less", num_samples=3, replaces=a.key)
    catalog.replace([a.key], [less], removed={a.key: [4, 1]})
    assert next(r for r in catalog.history() if r.key == a.key).gone == {1, 4}


def test_the_same_replacement_again_is_done_already(catalog, three, where):
    a, _, b = three
    version = catalog.replace([a.key, b.key], [merged(a, b)])
    assert where.catalog().replace([a.key, b.key], [merged(a, b)]) == version
    assert len(catalog.history()) == 4


def test_a_row_that_has_ended_otherwise_is_a_conflict_and_nothing_changes(catalog, three, where):
    a, _, b = three
    catalog.replace([b.key], [], status="expired")
    with pytest.raises(Conflict, match=f"{b.key} is expired"):
        where.catalog().replace([a.key, b.key], [merged(a, b)])
    with pytest.raises(Conflict, match="nothing is unknown"):
        catalog.replace(["nothing"], [])
    assert [r.status for r in catalog.history()] == ["live", "live", "expired"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 8},  # a sample is lost
        {"end_offset": 10},
        {"first_offset": 1},
        {"partition": 1},
        {"replaces": "shards/0/0-5"},
    ],
)
def test_a_replacement_that_loses_offsets_or_samples_is_refused(catalog, three, wrong):
    a, _, b = three
    with pytest.raises(ValueError, match="replace"):
        catalog.replace([a.key, b.key], [replace(merged(a, b), **wrong)])
    assert catalog.history() == list(catalog.rows())


def test_a_lost_reply_to_a_replacement_is_resolved_by_reading_back(catalog, three, monkeypatch):
    swap, calls = catalog._swap, []

    def lands_then_breaks(*args):
        swap(*args)
        calls.append(1)
        raise OSError("connection reset by peer")

    monkeypatch.setattr(catalog, "_swap", lands_then_breaks)
    a, _, b = three
    catalog.replace([a.key, b.key], [merged(a, b)])
    assert len(calls) == 1 and len(catalog.history()) == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_commit_of_a_replacement_the_next_run_ends_it_once(catalog, three, where, monkeypatch, when):
    class Killed(BaseException): ...

    swap = catalog._swap

    def dies(*args):
        if when == "after":
            swap(*args)
        raise Killed

    monkeypatch.setattr(catalog, "_swap", dies)
    a, _, b = three
    with pytest.raises(Killed):
        catalog.replace([a.key, b.key], [merged(a, b)])
    again = where.catalog()
    assert [r.key for r in again.rows()] == (["merged", three[1].key] if when == "after" else [r.key for r in three])
    again.replace([a.key, b.key], [merged(a, b)])
    assert [r.key for r in again.rows()] == ["merged", three[1].key] and len(again.history()) == 4


def test_an_append_between_look_and_commit_of_a_replacement_is_not_lost(catalog, three, where, monkeypatch):
    """The swap is built on a version that is no longer the newest: it must look again, and `changed` must be its own version."""
    swap, calls = catalog._swap, []

    def late(*args):
        if not calls:
            where.catalog().commit([row(9, 12)], [advance(9, 12)])
        calls.append(1)
        swap(*args)

    monkeypatch.setattr(catalog, "_swap", late)
    a, _, b = three
    version = catalog.replace([a.key, b.key], [merged(a, b)])
    assert len(calls) == 2 and [r.key for r in catalog.changes(version - 1).live] == ["merged"]
    assert [r.key for r in catalog.rows()] == ["merged", three[1].key, "shards/0/9-12"] and catalog.position("candidates", 0) == 12


def test_an_appender_that_meets_a_replacement_is_not_fenced_by_it(catalog, three, where, monkeypatch):
    other, write, calls = where.catalog(), catalog._write, []

    def late(*args):
        if not calls:
            other.replace([three[0].key], [], status="expired")
        calls.append(1)
        write(*args)

    monkeypatch.setattr(catalog, "_write", late)
    catalog.commit([row(9, 12)], [advance(9, 12)])
    assert len(calls) == 2 and [r.key for r in catalog.rows()] == [three[1].key, three[2].key, "shards/0/9-12"]


def test_replacing_and_appending_processes_do_not_disturb_each_other(catalog, where):
    for i in range(8):
        catalog.commit([row(i, i + 1)], [advance(i, i + 1)])
    code = (
        "import json, sys; from tests.contract.test_catalog import *\n"
        "c = Where(**json.loads(sys.argv[1])).catalog(attempts=60)\n"
        "if sys.argv[2] == 'a':\n"
        "  for i in range(8, 18): c.commit([row(i, i + 1)], [advance(i, i + 1)])\n"
        "else:\n"
        "  for i in range(0, 8, 2): c.replace([row(i, i + 1).key, row(i + 1, i + 2).key], [merged(row(i, i + 1), row(i + 1, i + 2), key=str(i))])"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, json.dumps(asdict(where)), k]) for k in "abb"]  # two do the same
    assert [c.wait() for c in children] == [0, 0, 0]
    live = catalog.rows()
    assert [r.key for r in live] == [*"0246", *(row(i, i + 1).key for i in range(8, 18))]
    assert len(catalog.history()) == 22 and catalog.position("candidates", 0) == 18


def test_a_table_of_an_earlier_version_is_read_and_written_on(where):
    early = pa.schema([f for f in module.SCHEMA if f.name not in ("removed", "ended_at", "note", "changed")])
    options = {"storage_options": where.options}
    columns = asdict(row(0, 5, committed=1)) | {"committed": 1, "place": 0}
    DeltaTable.create(where.uri, schema=early, configuration={"delta.setTransactionRetentionDuration": "interval 100000 days"}, **options)
    write_deltalake(where.uri, pa.table({n: [columns[n]] for n in early.names}, schema=early), mode="append", **options)
    catalog = where.catalog()
    assert [r.key for r in catalog.rows()] == ["shards/0/0-5"] and catalog.changes(0).ended == []
    catalog.replace(["shards/0/0-5"], [], status="expired")
    catalog.commit([row(0, 3, 1)], [advance(0, 3, 1)])
    assert [(r.status, r.committed) for r in where.catalog().history()] == [("expired", 1), ("live", 3)]


def test_a_full_disk_at_the_commit_is_a_fault_that_passes(tiny_disk):  # noqa: F811
    catalog = DeltaCatalog(str(tiny_disk / "catalog"), log_id="log", attempts=2)
    catalog.commit([row(0, 5)], [advance(0, 5)])
    filler = tiny_disk / "filler"
    with pytest.raises(OSError, match="space"):
        filler.write_bytes(bytes(2**20))
    with pytest.raises(module.Retryable):
        catalog.commit([row(5, 9)], [advance(5, 9)])
    filler.unlink()
    catalog.commit([row(5, 9)], [advance(5, 9)])
    assert [r.key for r in catalog.rows()] == ["shards/0/0-5", "shards/0/5-9"] and catalog.position("candidates", 0) == 9
