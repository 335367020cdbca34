"""A backup is consistent by the order in which it is taken, and whole by what it compares."""

import dataclasses
import sqlite3
from contextlib import closing

import pytest

from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.event_log import CANDIDATES, SqliteLog
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.registry import OciLayout
from streamlearn.operate.backup import back_up
from streamlearn.operate.backup_set import BackupSet, Entry, blob_key
from tests.ingest.dataset import crafted, put
from tests.ingest.server import Place
from tests.operate.homes import backed_up, restored, running


def test_what_depends_on_other_things_is_copied_before_them(home, tmp_path):
    """Checkpoint <= rounds <= catalog <= shards, log (the protocol at the top of backup.py)."""
    done = []

    class Store(FolderStore):
        def get(self, key):
            done.append("list of checkpoints" if key.startswith("checkpoints/") else "")
            return super().get(key)

        def get_file(self, key, path):
            done.append(key.partition("/")[0])
            super().get_file(key, path)

    class Table(DeltaCatalog):
        def listing(self):
            done.append("version")
            return super().listing()

    class Log(SqliteLog):
        def copy_to(self, path):
            done.append("log")
            super().copy_to(path)

    class Layout(OciLayout):
        def read_blob(self, digest):
            done.append("registry")
            return super().read_blob(digest)

    at = running(home)
    log, catalog = Log(home / "log.sqlite"), Table(at.catalog.uri, log_id=at.log.log_id)
    watched = dataclasses.replace(at, log=log, store=Store(home / "store"), catalog=catalog, registry=Layout(home / "registry"))
    back_up(watched, BackupSet(FolderStore(tmp_path / "b"), "b"), by_name=False)
    first = [step for step in dict.fromkeys(done) if step]
    assert first == ["list of checkpoints", "checkpoints", "registry", "rounds", "version", "catalog", "shards", "log"]


def test_a_file_that_has_changed_and_is_as_long_as_before_is_copied_again(home, tmp_path):
    own, store = home / "history" / "train.jsonl", running(home).store
    for step in (1, 2):
        own.write_text(f'{{"step": {step}}}\n')
        store.put("train/told.json", b"%d" % step)
        backed_up(home, tmp_path / "b")
    restored(tmp_path / "b", tmp_path / "again")
    assert (tmp_path / "again" / "history" / "train.jsonl").read_text() == '{"step": 2}\n'
    assert running(tmp_path / "again").store.get("train/told.json") == b"2"


def test_a_log_that_ends_before_the_catalog_does_is_never_backed_up(home, tmp_path):
    position = running(home).catalog.position(CANDIDATES, 0)
    with closing(sqlite3.connect(home / "log.sqlite")) as db, db:
        db.execute("UPDATE ends SET end = ? WHERE topic = ? AND part = 0", (position - 1, CANDIDATES))
    with pytest.raises(Corrupt, match=f"{CANDIDATES}/0: covered up to {position}, but the log ends at {position - 1}: not backed up"):
        backed_up(home, tmp_path / "b")


def test_the_objects_of_a_shard_that_has_ended_are_not_asked_for(home, tmp_path):
    place = Place(home)
    at = place.catalog.position(CANDIDATES, 0)
    put(place, crafted(at - 1, at, status="expired", num_samples=1))
    assert backed_up(home, tmp_path / "b")[0].number == 1


def test_what_a_start_makes_anew_and_what_is_half_written_is_left_out(home, tmp_path):
    for name in ("spool/x", "cache/x", "logs/train.log", "history/x.tmp", "history/.x", "claims/x"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text("x")
    backup, _ = backed_up(home, tmp_path / "b")
    tops = {e.path.partition("/")[0] for e in backup.entries if e.room == "home"}
    assert not tops & {"spool", "cache", "logs", "claims", "status"} and "history" in tops
    assert not [e.path for e in backup.entries if e.path.endswith(("x.tmp", ".x"))]


def test_a_blob_that_is_not_whole_is_put_again(home, tmp_path):
    """As a store leaves it that is no store of ours: cut off, under the right name."""
    backup, _ = backed_up(home, tmp_path / "b")
    entry: Entry = next(e for e in backup.entries if e.path.endswith(".tar"))
    file = tmp_path / "b" / blob_key(entry.sha256)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    _, done = backed_up(home, tmp_path / "b")
    assert file.read_bytes() == whole and done.new >= 1
