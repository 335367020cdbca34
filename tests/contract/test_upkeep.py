"""The catalog's table stays small, quick and durable, and nobody who reads or writes notices how."""

import os
import threading
import time
from pathlib import Path

import pytest
from deltalake import DeltaTable

from streamlearn.contract import upkeep
from streamlearn.contract.catalog import DeltaCatalog
from tests.contract.test_catalog import advance, catalog, merged, on_s3, row, where  # noqa: F401  fixtures among them


def files(where):  # noqa: F811
    return DeltaTable(where.uri, storage_options=where.options).file_uris()


def test_small_files_are_merged_and_readers_see_what_they_saw(catalog, where, monkeypatch):  # noqa: F811
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 5)
    for i in range(18):
        catalog.commit([row(i, i + 1)], [advance(i, i + 1)])
    assert len(files(where)) < 8
    again = where.catalog()
    assert again.position("candidates", 0) == 18
    rows = again.rows()
    assert [r.first_offset for r in rows] == list(range(18))
    for r in rows:  # whoever had seen a version is told what came after it, and nothing else
        newer = where.catalog().follow(r.committed)[1]
        assert [n.first_offset for n in newer] == list(range(r.first_offset + 1, 18))
    assert (Path(where.uri) / "_delta_log" / "_last_checkpoint").exists() or where.options


def test_a_replacement_after_the_merging_stands(catalog, where, monkeypatch):  # noqa: F811
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 3)
    rows = [row(i, i + 1) for i in range(7)]
    for r in rows:
        catalog.commit([r], [advance(r.first_offset, r.end_offset)])
    catalog.replace([rows[1].key, rows[2].key], [merged(rows[1], rows[2])])
    for i in range(7, 12):
        catalog.commit([row(i, i + 1)], [advance(i, i + 1)])
    again = where.catalog()
    assert [r.first_offset for r in again.rows()] == [0, 1, *range(3, 12)] and len(again.history()) == 13


def test_writers_that_merge_while_others_commit_lose_nothing(catalog, where, monkeypatch):  # noqa: F811
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 2)
    catalog.commit([row(0, 1, 9)], [advance(0, 1, 9)])
    errors = []

    def write(partition):
        try:
            ours = where.catalog(attempts=200)
            for i in range(8):
                ours.commit([row(i, i + 1, partition)], [advance(i, i + 1, partition)])
        except Exception as e:  # told to the test
            errors.append(e)

    def replace():
        try:
            ours, old = where.catalog(attempts=200), row(0, 1, 9)
            for i in range(4):
                new = merged(old, key=f"again {i}")
                ours.replace([old.key], [new])
                old = new
        except Exception as e:  # told to the test
            errors.append(e)

    threads = [threading.Thread(target=write, args=(p,), daemon=True) for p in range(3)] + [threading.Thread(target=replace, daemon=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not errors
    again = where.catalog()
    assert [again.position("candidates", p) for p in range(3)] == [8, 8, 8]
    assert sorted((r.partition, r.first_offset) for r in again.rows()) == [*((p, i) for p in range(3) for i in range(8)), (9, 0)]
    assert [r.key for r in again.rows() if r.partition == 9] == ["again 3"] and len(again.history()) == 3 * 8 + 5


def test_what_no_version_of_the_last_week_names_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 2)
    monkeypatch.setattr(upkeep, "VACUUM_EVERY", 4)
    catalog = DeltaCatalog(str(tmp_path), log_id="log")  # noqa: F811
    old, young = tmp_path / "part-old.parquet", tmp_path / "part-young.parquet"
    for path in (old, young):
        path.write_bytes(b"left by a writer that was killed")
    eight_days_ago = time.time() - 8 * 86400
    os.utime(old, (eight_days_ago, eight_days_ago))
    for i in range(6):
        catalog.commit([row(i, i + 1)], [advance(i, i + 1)])
    assert not old.exists() and young.exists() and len(catalog.rows()) == 6


def test_a_commit_and_a_merging_are_on_the_disk_before_they_are_acknowledged(tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 3)
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(Path(f"/proc/self/fd/{fd}").readlink()), sync(fd))[1])
    catalog = DeltaCatalog(str(tmp_path), log_id="log")  # noqa: F811
    for i in range(4):
        catalog.commit([row(i, i + 1)], [advance(i, i + 1)])
        named = {Path(uri) for uri in DeltaTable(str(tmp_path)).file_uris()}
        assert named <= synced
        entries = sorted((tmp_path / "_delta_log").glob("*.json"))
        assert set(entries[1:]) <= synced  # but for the making of the table, which acknowledges nothing
    assert len(named) < 4  # a merging was among them


def test_the_rows_that_cover_offsets(catalog):  # noqa: F811
    assert catalog.covering("candidates", 0, 0, 99) == [] and catalog.totals() == (0, 0)
    for first, end, partition in [(0, 5, 0), (0, 3, 1), (5, 9, 0), (9, 12, 0)]:
        catalog.commit([row(first, end, partition)], [advance(first, end, partition)])

    def covering(start, end, topic="candidates"):
        return [(r.first_offset, r.end_offset) for r in catalog.covering(topic, 0, start, end)]

    assert covering(0, 12) == [(0, 5), (5, 9), (9, 12)]
    assert covering(4, 6) == [(0, 5), (5, 9)]
    assert covering(5, 9) == [(5, 9)] and covering(9, 9) == [] and covering(12, 99) == []
    assert covering(0, 12, topic="it's another") == []
    assert catalog.totals() == (4, 15)
    kept = catalog.rows()
    catalog.replace([kept[0].key], [], status="expired")
    assert covering(0, 6) == [(5, 9)] and catalog.totals() == (3, 10)


@pytest.mark.parametrize("step", ["write_deltalake", "vacuum", "create_checkpoint"])
def test_a_commit_stands_though_the_disk_is_full_for_the_upkeep(tmp_path, monkeypatch, caplog, step):
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 2)
    monkeypatch.setattr(upkeep, "VACUUM_EVERY", 2)
    catalog = DeltaCatalog(str(tmp_path), log_id="log")  # noqa: F811
    catalog.commit([row(0, 1)], [advance(0, 1)])
    kind = upkeep if step == "write_deltalake" else DeltaTable

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(kind, step, full)
        assert catalog.commit([row(1, 2)], [advance(1, 2)]) == 2
    assert "not tidied at version 2" in caplog.text
    catalog.commit([row(2, 3)], [advance(2, 3)])
    assert [r.first_offset for r in DeltaCatalog(str(tmp_path), log_id="log").rows()] == [0, 1, 2]
