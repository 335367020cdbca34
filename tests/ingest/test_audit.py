"""The gap auditor: every kind of damage done to real files is named exactly, and nothing else is."""

import dataclasses
import re
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest import audit, audit_shard
from ingest.pack import group_of
from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract.catalog import Advance, DeltaCatalog
from streamlearn.contract.errors import Fenced
from streamlearn.contract.event_log import CANDIDATES, NewRecord
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import STORED, Outcome, read_sidecar, sidecar_key, write_sidecar
from tests.crash.sealing import PARTITIONS
from tests.ingest.dataset import crafted, found, largest, path_of, put, verify
from tests.ingest.server import Place

DAY = 86400.0


def stored_of(place, row):
    return [o for o in read_sidecar(path_of(place, sidecar_key(row.key))).to_pylist() if o["outcome"] == STORED]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rewrite(place, row, change):
    """A readable sidecar that says something else."""
    path = path_of(place, sidecar_key(row.key))
    table = read_sidecar(path)
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema), path, compression="zstd")


def test_a_sound_dataset_is_found_sound(place):
    report = verify(place)
    rows = place.catalog.rows()
    assert report.good and report.orphans == []
    assert report.shards == report.read == len(rows) > 4 and report.bytes_read == sum(r.bytes for r in rows)
    ends = {(p.topic, p.partition): (p.position, p.log_end, p.done, p.lag, p.owed) for p in report.partitions}
    assert ends[CANDIDATES, 0] == (14, 14, 14, 0, 0) == ends[CANDIDATES, 1]
    assert len(ends) == 3 * PARTITIONS and sum(p.samples for p in report.partitions) == 24
    assert report.as_dict()["good"] is True


def test_no_dataset_at_all_is_sound(tmp_path):
    report = verify(Place(tmp_path))
    assert report.good and report.partitions == [] and report.shards == 0


@pytest.mark.parametrize("where", ["image", "its header", "description", "header of the description", "end"])
def test_a_flipped_bit_in_a_tar(place, where):
    row = largest(place)
    sample = stored_of(place, row)[1]
    at = {
        "image": sample["member_offset"] + 17,
        "its header": sample["member_offset"] - 512,
        "description": sample["member_offset"] + -(-sample["member_size"] // 512) * 512 + 512 + 40,
        "header of the description": sample["member_offset"] + -(-sample["member_size"] // 512) * 512 + 130,
        "end": row.bytes - 1,
    }[where]
    flip(path_of(place, row.key), at)
    (finding,) = verify(place).findings
    assert (finding.kind, finding.where) == ("tar", row.key) and row.sha256 in finding.what and finding.remedy
    name = f"candidates/0/{sample['offset']}"
    assert (name in finding.what) == (where != "end")
    others = {f"candidates/0/{other['offset']}" for other in stored_of(place, row)} - {name}
    assert not others & {*re.findall(r"candidates/0/\d+(?=[: ])", finding.what)}
    assert found(place, deep=False) == []  # only reading finds this


def test_without_deep_a_sample_is_read(place):
    row = largest(place)
    flip(path_of(place, row.key), stored_of(place, row)[0]["member_offset"])
    assert found(place, deep=False, sample=0) == [] and found(place, deep=False, sample=10**6) == [("tar", row.key)]
    report = verify(place, deep=False, sample=2)
    assert report.read == 2 and report.shards == len(place.catalog.rows())


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    "damage, kind",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-512]), "size"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "size"),
        (lambda path: path.write_bytes(b""), "size"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_a_tar_cut_short_grown_or_gone(place, damage, kind, deep):
    row = largest(place)
    damage(path_of(place, row.key))
    assert found(place, deep=deep) == [(kind, row.key)]


@pytest.mark.parametrize(
    "damage, kind",
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"garbage"), "sidecar"),
        (lambda path: path.write_bytes(b""), "sidecar"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "sidecar"),
    ],
)
def test_a_sidecar_gone_cut_short_or_garbage(place, damage, kind):
    side = sidecar_key(largest(place).key)
    damage(path_of(place, side))
    assert found(place, deep=False) == found(place) == [(kind, side)]


def test_a_damaged_tar_is_found_though_its_sidecar_is_gone_and_both_when_both_are_damaged(place):
    row = largest(place)
    side = path_of(place, sidecar_key(row.key))
    rewrite(place, row, lambda rows: rows[1:])
    flip(path_of(place, row.key), stored_of(place, row)[0]["member_offset"])
    assert found(place) == [("tar", row.key), ("sidecar", sidecar_key(row.key))]
    side.unlink()
    assert found(place) == [("missing", sidecar_key(row.key)), ("tar", row.key)]


def test_a_flipped_bit_anywhere_in_a_sidecar(place):
    side = sidecar_key(largest(place).key)
    whole = path_of(place, side).read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        path_of(place, side).write_bytes(whole)
        flip(path_of(place, side), at)
        kinds = found(place)
        # the statistics of a footer may change without any row changing
        assert kinds == [("sidecar", side)] or (kinds == [] and read_sidecar(path_of(place, side)) == read_sidecar(whole)), at


def test_a_flipped_bit_in_a_refusal_that_no_image_confirms(place):
    """Only the checksums of the parquet's pages know."""
    row = largest(place)
    path = path_of(place, sidecar_key(row.key))
    outcomes = [
        Outcome(offset=n, outcome="rejected", reason="gone", url="http://some.where/") for n in range(row.first_offset, row.end_offset)
    ]
    empty = dataclasses.replace(row, num_samples=0)
    write_sidecar(path, outcomes)
    whole = path.read_bytes()
    assert not [f for f in audit_shard.check_contents(place.store, empty) if "parquet" in f.what]
    flip(path, whole.index(b"some.where"))
    (finding,) = audit_shard.check_contents(place.store, empty)
    assert finding.kind == "sidecar" and "not a readable parquet" in finding.what


def change_one(offset, **fields):
    return lambda rows: [o | fields if o["offset"] == offset else o for o in rows]


def test_what_a_sidecar_gets_wrong(place):
    row = largest(place)
    first, *_, last = stored_of(place, row)
    third = row.first_offset + 2

    def told(change):
        whole = path_of(place, sidecar_key(row.key)).read_bytes()
        rewrite(place, row, change)
        (finding,) = verify(place).findings
        path_of(place, sidecar_key(row.key)).write_bytes(whole)
        assert (finding.kind, finding.where) == ("sidecar", sidecar_key(row.key))
        return finding.what

    assert told(lambda rows: [o for o in rows if o["offset"] != third]) == f"offset {third} is missing"
    assert told(lambda rows: [*rows[:1], *rows[3:]]) == f"offsets {third - 1} to {third} are missing"
    assert told(lambda rows: rows[:-2]) == f"offsets {row.end_offset - 2} to {row.end_offset - 1} are missing"
    assert told(lambda rows: []).startswith(f"offsets {row.first_offset} to {row.end_offset - 1}")
    twice = told(lambda rows: [*rows, rows[-1]])
    assert twice.startswith(f"offset {row.end_offset - 1} stands twice")
    assert told(lambda rows: [*rows, rows[-1] | {"offset": row.end_offset}]).startswith(f"offset {row.end_offset} is not of this shard")
    assert "is no outcome" in told(change_one(third, outcome="lost"))
    name = f"candidates/0/{first['offset']}"
    assert told(change_one(first["offset"], sha256="0" * 64)).startswith(f"{name}: the image has another sha256")
    assert f"{name}: the description has another url" in told(change_one(first["offset"], url="http://else.where/"))
    cut = told(change_one(first["offset"], member_size=first["member_size"] - 1))
    assert cut.startswith(f"{name}: member {first['offset']:020d}.jpg of {first['member_size']} bytes instead of")
    assert name in told(change_one(first["offset"], ext="png"))
    assert f"{name} should begin at byte 512 of the tar" in told(change_one(first["offset"], member_offset=first["member_offset"] + 512))
    assert "should begin" in told(change_one(last["offset"], member_offset=0))
    assert "stored, the catalog's row says" in told(change_one(last["offset"], outcome="dead"))


def test_members_that_no_row_names(place):
    """The catalog counts them as stored no more either: only the tar knows."""
    row = largest(place)
    (last,) = stored_of(place, row)[-1:]
    fewer = dataclasses.replace(row, num_samples=row.num_samples - 1)
    rewrite(place, row, change_one(last["offset"], outcome="rejected"))
    (finding,) = audit_shard.check_contents(place.store, fewer)
    assert "holds members before byte" in finding.what


def test_a_sidecar_without_a_column(place):
    row = largest(place)
    path = path_of(place, sidecar_key(row.key))
    pq.write_table(read_sidecar(path).drop_columns(["member_offset"]), path)
    (finding,) = verify(place).findings
    assert finding.kind == "sidecar" and finding.what == "no column member_offset"


def test_a_gap_an_overlap_and_a_position_without_rows(place):
    end = place.catalog.position(CANDIDATES, 0)
    source = largest(place)
    objects = dict(sha256=source.sha256, bytes=source.bytes, num_samples=source.num_samples)
    put(place, crafted(end + 3, end + 5, **objects), objects_of=source)
    report = verify(place, deep=False)
    gap, log = report.findings
    assert (gap.kind, gap.where, gap.what) == ("gap", "candidates/0", f"no row covers offsets {end} to {end + 2}")
    assert log.kind == "log" and "would be skipped" in log.remedy  # the crafted row reaches beyond the log, too
    other = place.catalog.position(CANDIDATES, 1)
    put(place, crafted(other - 2, other, partition=1, **objects), objects_of=largest(place, 1))
    overlap = next(f for f in verify(place, deep=False).findings if f.where == "candidates/1")
    assert overlap.kind == "overlap" and f"offsets {other - 2} to {other - 1} stand in two rows" in overlap.what
    retry = place.catalog.position("retry.0", 0)
    place.catalog.commit([], [Advance("retry.0", 0, retry, retry + 1)])
    assert ("gap", f"no row covers offset {retry}") in [(f.kind, f.what) for f in verify(place, deep=False).findings]


def test_a_row_lost_from_the_beginning_is_a_gap():
    rows = [crafted(5, 9), crafted(9, 12)]
    assert [f.what for f in audit.check_coverage((CANDIDATES, 0), rows, 12, 12)] == ["no row covers offsets 0 to 4"]


def test_a_row_within_another_is_one_overlap_and_no_gap():
    (finding,) = audit.check_coverage((CANDIDATES, 0), [crafted(0, 9), crafted(2, 4)], 9, 9)
    assert finding.kind == "overlap" and "offsets 2 to 3 stand in two rows" in finding.what


def test_rows_beyond_the_position():
    (finding,) = audit.check_coverage((CANDIDATES, 0), [crafted(0, 9)], 5, 5)
    assert finding.kind == "position" and "offsets 5 to 8 would be fetched again" in finding.what


def test_positions_that_move_during_the_look_are_no_findings():
    assert audit.check_coverage((CANDIDATES, 0), [crafted(0, 9)], 5, 12) == []
    assert len(audit.check_coverage((CANDIDATES, 0), [crafted(0, 9)], 10, 12)) == 1


def test_what_was_replaced_expired_or_taken_down_still_covers_its_offsets():
    old_rows = [crafted(0, 5, status="replaced"), crafted(5, 9, status="replaced", sha256="d" * 64)]
    joined = crafted(0, 9, sha256="e" * 64, replaces=",".join(r.key for r in old_rows))
    again = crafted(0, 9, sha256="f" * 64, replaces=joined.key)
    place, expired = (CANDIDATES, 0), crafted(9, 12, status="expired")
    assert audit.check_coverage(place, [*old_rows, joined, expired], 12, 12) == []
    assert audit.check_coverage(place, [*old_rows, dataclasses.replace(joined, status="replaced"), again, expired], 12, 12) == []
    short = dataclasses.replace(joined, end_offset=8)
    assert [f.what for f in audit.check_coverage(place, [*old_rows, short, expired], 12, 12)] == ["no row covers offset 8"]
    alive = [dataclasses.replace(old_rows[0], status="live"), old_rows[1]]
    assert [f.kind for f in audit.check_coverage(place, [*alive, joined, expired], 12, 12)] == ["overlap"]


def test_rows_that_are_not_live_need_no_objects(place):
    end = place.catalog.position("retry.0", 0)
    place.log.append([NewRecord("retry.0", b"", b"{}", 0)] * 4)
    put(place, crafted(end, end + 4, topic="retry.0", status="expired"))
    assert found(place) == [] and verify(place).shards == len(place.catalog.rows()) < len(place.catalog.history())
    put(place, crafted(end + 4, end + 5, topic="retry.0"))
    assert ("missing", crafted(end + 4, end + 5, topic="retry.0").key) in found(place)


def test_what_is_replaced_while_it_is_read_is_not_held_against_it(place):
    row = largest(place)
    whole = path_of(place, row.key).read_bytes()

    class Purging(FolderStore):
        def size(self, key):
            path_of(place, row.key).unlink(missing_ok=True)
            return super().size(key)

    class Replaced(DeltaCatalog):
        def rows(self):
            return [r for r in super().rows() if r.key != row.key]

    assert audit.verify(
        place.log, Purging(place.store.root), Replaced(place.catalog.uri, log_id=place.log.log_id), deep=True, sample=0
    ).good
    assert {kind for kind, _ in found(place)} == {"missing"} and whole


def test_a_row_whose_key_is_not_of_its_fields(place):
    end = place.catalog.position(CANDIDATES, 0)
    place.log.append([NewRecord(CANDIDATES, b"", b"{}", 0)] * 2)
    row = dataclasses.replace(crafted(end, end + 2), sha256="d" * 64)
    place.store.put(row.key, bytes(10240))
    place.store.put(sidecar_key(row.key), b"PAR1")
    put(place, row)
    assert found(place, deep=False) == [("row", row.key)]


def test_lag_and_owed_retries_are_told_and_are_no_findings(place):
    place.log.append([NewRecord(CANDIDATES, b"", b"{}", 0)] * 3)
    place.log.commit(group_of(place.log), {(CANDIDATES, 1): 5})
    report = verify(place, deep=False)
    by_place = {(p.topic, p.partition): p for p in report.partitions}
    assert report.good and by_place[CANDIDATES, 0].lag == 3 and by_place[CANDIDATES, 1].owed == 9


def test_a_log_that_knows_less_or_more_than_the_catalog(place):
    place.log.commit(group_of(place.log), {(CANDIDATES, 1): 15})
    (finding,) = verify(place, deep=False).findings
    assert (finding.kind, finding.where) == ("log", "candidates/1") and "15" in finding.what
    place.log._db.execute("UPDATE ends SET end = 13 WHERE topic = 'candidates' AND part = 1")
    (finding,) = verify(place, deep=False).findings
    assert finding.kind == "log" and "ends at offset 13" in finding.what


def test_memory_stays_flat_whatever_a_tar_holds(place, monkeypatch):
    """Reads never ask for more than a chunk, however large the tar or what its sidecar claims."""
    monkeypatch.setattr(audit_shard, "CHUNK_BYTES", 700)
    asked = []

    class Counting(FolderStore):
        def get_range(self, key, start, length):
            asked.append(length)
            return super().get_range(key, start, length)

        def get(self, key):
            raise AssertionError("whole objects are not for the auditor")

    row = largest(place)
    rewrite(place, row, change_one(stored_of(place, row)[0]["offset"], member_size=2**40))
    report = audit.verify(place.log, Counting(place.store.root), place.catalog, deep=True, sample=0)
    assert [f.kind for f in report.findings] == ["sidecar"] and max(asked) == 700


def test_a_fault_of_the_store_is_raised_and_no_finding(place):
    class Broken(FolderStore):
        def size(self, key):
            raise Fenced("as good as any")

    with pytest.raises(Fenced):
        audit.verify(place.log, Broken(place.store.root), place.catalog, deep=True, sample=0)
    assert not [t for t in threading.enumerate() if t.name.startswith("audit") and t.is_alive() and time.sleep(0.2)]


def test_on_s3(place, bucket):
    config = bucket.config()
    store = S3Store(config)
    catalog = DeltaCatalog(store.uri("catalog/shards"), log_id=place.log.log_id, storage_options=delta_options(config))
    for key in place.store.list("shards/"):
        store.put_file(key, path_of(place, key))
    for row in place.catalog.rows():
        catalog.commit([row], [Advance(row.topic, row.partition, row.first_offset, row.end_offset)])
    assert audit.verify(place.log, store, catalog, deep=True, sample=0).as_dict() == verify(place).as_dict()
    row = largest(place)
    data = bytearray(store.get(row.key))
    data[stored_of(place, row)[0]["member_offset"]] ^= 1
    store.put(row.key, bytes(data))
    store.delete(sidecar_key(largest(place, 1).key))
    store.put("shards/lost.tar", b"x")
    report = audit.verify(place.log, store, catalog, deep=True, sample=0)
    assert {(f.kind, f.where) for f in report.findings} == {("tar", row.key), ("missing", sidecar_key(largest(place, 1).key))}
    assert [o.key for o in report.orphans] == ["shards/lost.tar"] and report.orphans[0].age_s < 60
    assert audit.sweep(store, catalog, dry_run=False).deleted == ()
    later = audit.sweep(store, catalog, dry_run=False, clock=lambda: time.time() + 2 * DAY)
    assert [o.key for o in later.deleted] == ["shards/lost.tar"] and store.get(row.key)
