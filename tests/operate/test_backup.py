"""A backup taken while others write is consistent in itself; killed anywhere, the former one or the new one is whole."""

import json
import shutil

import pytest
import torch

from ingest import audit
from ingest.pack import GROUP
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, StoreFull
from streamlearn.contract.event_log import CANDIDATES
from streamlearn.contract.object_store import FolderStore
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.operate.backup import Running, back_up
from streamlearn.operate.backup_set import BackupSet
from streamlearn.operate.parts import unbroken
from streamlearn.operate.restore import verify
from tests.conftest import small_disk
from tests.ingest.dataset import crafted, put
from tests.ingest.server import Place
from tests.operate.homes import DyingStore, Killed, Knife, backed_up, learn, publish, records, restored, running, tree


def findings(folder):
    at = running(folder)
    return audit.verify(at.log, at.store, at.catalog, deep=True, sample=0).findings


def test_what_is_restored_is_what_was_there(home, tmp_path):
    before, logged = tree(home), records(home)
    backup, done = backed_up(home, tmp_path / "b")
    assert backup.step == 4 and done.same == 0 and backup.positions
    restored(tmp_path / "b", tmp_path / "again")
    after = tree(tmp_path / "again")
    gone = {name for name in before if name not in after}
    assert {name: after[name] for name in after} == {name: before[name] for name in after} and records(tmp_path / "again") == logged
    assert all(name.startswith("status/") or name.endswith(("_last_checkpoint", ".lock")) for name in gone), gone
    assert findings(tmp_path / "again") == [] and Checkpoints(running(tmp_path / "again").store, keep=2).load()["step"] == 4
    assert json.loads((tmp_path / "again" / "config.json").read_text())["home"] == str(tmp_path / "again")


def test_what_is_there_already_is_not_copied_again(home, tmp_path):
    _, first = backed_up(home, tmp_path / "b")
    learn(home, step=8)
    publish(home, "0.8.0")
    backup, second = backed_up(home, tmp_path / "b")
    new = {e.path for e in backup.entries if e.path.startswith(("checkpoints/000000000008", "rounds/00000001"))}
    assert backup.number == 2 and backup.step == 8 and len(new) == 2
    assert second.new < first.new / 3 and second.same > first.new / 2
    assert not [
        e
        for e in backup.entries
        if e.path.startswith("shards/") and e.path not in {x.path for x in BackupSet(FolderStore(tmp_path / "b"), "b").read(1).entries}
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_anywhere_the_former_backup_or_the_new_one_is_whole(home, tmp_path, when):
    backed_up(home, tmp_path / "b")
    learn(home, step=8)
    publish(home, "0.8.0")
    deaths, newest = 0, set()
    while True:
        place = tmp_path / f"b{deaths}"
        shutil.copytree(tmp_path / "b", place)
        store = DyingStore(place)
        store.knife = Knife(deaths + 1, when)
        try:
            back_up(running(home), BackupSet(store, "b"), by_name=False)
            BackupSet(store, "b").forget(1)
            break
        except Killed:
            deaths += 1
        found = BackupSet(FolderStore(place), "b")
        newest.add(found.read().number)
        verify(found, found.read(), tmp_path / "scratch")
        again, _ = backed_up(home, place)  # and whatever was left stands in nobody's way
        assert again.step == 8
        verify(found, again, tmp_path / "scratch")
        shutil.rmtree(place)
    assert deaths >= 7 and newest == {1, 2}


def test_a_checkpoint_that_is_replaced_while_it_is_copied_is_not_missed(home, tmp_path):
    class Moving(FolderStore):
        """The learner goes on: the checkpoint that the list named is gone when it is copied."""

        moved = 0

        def get_file(self, key, path):
            if key.startswith("checkpoints/0") and self.moved < 2:
                self.moved += 1
                for step in (self.moved * 10, self.moved * 10 + 1):
                    learn(home, step)
            super().get_file(key, path)

    at, store = running(home), Moving(home / "store")
    backup, _ = back_up(Running(home, at.log, store, at.catalog, at.registry), BackupSet(FolderStore(tmp_path / "b"), "b"), by_name=False)
    assert store.moved == 2 and backup.step == 21
    restored(tmp_path / "b", tmp_path / "again")
    assert Checkpoints(running(tmp_path / "again").store, keep=2).load()["step"] == 21


def test_a_checkpoint_that_many_ranks_wrote_is_copied_with_all_its_parts(home, tmp_path):
    learn(home, 8, parted=True, model={"weight": torch.arange(6.0)}, optimizer={})
    names = {p.suffix for p in (home / "store" / "checkpoints").glob("000000000008-*")}
    backed_up(home, tmp_path / "b")
    restored(tmp_path / "b", tmp_path / "again")
    assert names == {".part", ".rest", ".json"}
    assert torch.equal(Checkpoints(running(tmp_path / "again").store, keep=2).load()["model"]["weight"], torch.arange(6.0))
    (part,) = (home / "store" / "checkpoints").glob("*.part")
    part.write_bytes(b"x" * part.stat().st_size)
    with pytest.raises(Corrupt, match="damaged at its source"):
        backed_up(home, tmp_path / "other")


def test_a_unit_committed_after_the_catalog_was_copied_is_fetched_again(home, tmp_path):
    class Behind(DeltaCatalog):
        """A fetcher commits a unit, and says so to the log, directly after the table has been listed."""

        def listing(self):
            found, place = super().listing(), Place(home)
            at = place.catalog.position(CANDIDATES, 0)
            place.log.append([Candidate_(0)])
            put(place, crafted(at, at + 1))
            place.log.commit(GROUP, {(CANDIDATES, 0): at + 1})
            return found

    at = running(home)
    catalog = Behind(at.catalog.uri, log_id=at.log.log_id)
    was = at.catalog.position(CANDIDATES, 0)
    back_up(Running(home, at.log, at.store, catalog, at.registry), BackupSet(FolderStore(tmp_path / "b"), "b"), by_name=False)
    restored(tmp_path / "b", tmp_path / "again")
    again = running(tmp_path / "again")
    assert again.catalog.position(CANDIDATES, 0) == was == again.log.committed(GROUP, CANDIDATES, 0)
    assert again.log.bounds(CANDIDATES, 0)[1] == was + 1 and findings(tmp_path / "again") == []


def Candidate_(partition):
    from streamlearn.contract.candidate import Candidate
    from streamlearn.contract.event_log import NewRecord

    c = Candidate(url="http://x/late.jpg", source="t", source_ref="l", discovered_at="2026-11-21T00:00:00Z")
    return NewRecord(CANDIDATES, b"x", c.to_json(), partition)


def test_rounds_seen_without_the_one_before_them_are_left_out():
    keys = [f"rounds/{n:08d}.json" for n in (0, 1, 2, 4, 5)]
    assert unbroken(keys, "rounds/") == keys[:3] and unbroken([], "rounds/") == []


def test_a_round_that_reaches_beyond_the_catalog_is_never_backed_up(home, tmp_path):
    for row in running(home).catalog.rows():
        assert row.end_offset  # what the round has learnt
    shutil.rmtree(home / "store" / "catalog")
    with pytest.raises(Corrupt, match="learnt up to .* covered up to 0.*not backed up"):
        backed_up(home, tmp_path / "b")
    with pytest.raises(NotFound, match="no backup; there are: none"):
        BackupSet(FolderStore(tmp_path / "b"), "b").read()


def test_damage_at_the_source_is_not_backed_up(home, tmp_path):
    (shard,) = [p for p in (home / "store" / "shards").rglob("*.tar")][:1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(Corrupt, match=r"damaged at its source; `streamlearn dataset verify --deep`"):
        backed_up(home, tmp_path / "b")


def test_a_full_disk_costs_the_attempt_and_not_the_former_backup(home, tmp_path):
    need, _ = backed_up(home, tmp_path / "measured")
    with small_disk(tmp_path / "small", f"{need.total_bytes * 2 // 1024}k") as place:
        backed_up(home, place)
        (place / "ballast").write_bytes(b"x" * (shutil.disk_usage(place).free - 8192))
        learn(home, step=8)
        publish(home, "0.8.0")
        with pytest.raises(StoreFull, match="free some space"):
            backed_up(home, place)
        found = BackupSet(FolderStore(place), "b")
        verify(found, found.read(), tmp_path / "scratch")
        (place / "ballast").unlink()
        assert backed_up(home, place)[0].step == 8


def test_forgetting_keeps_what_newer_backups_need(home, tmp_path):
    for step in (8, 12, 16):
        learn(home, step)
        backed_up(home, tmp_path / "b")
    there = BackupSet(FolderStore(tmp_path / "b"), "b")
    assert there.forget(2) >= 1 and list(there.numbers()) == [2, 3]
    for number in (2, 3):
        verify(there, there.read(number), tmp_path / "scratch")
    assert there.forget(2) == 0


def test_a_place_belongs_to_one_home(home, tmp_path):
    backed_up(home, tmp_path / "b")
    for path in home.glob("log.sqlite*"):
        path.unlink()
    with pytest.raises(ConfigError, match="holds the backups of another home .* name another place"):
        backed_up(home, tmp_path / "b")
