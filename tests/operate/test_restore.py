"""A restore is whole or refused, and never over something without being told to."""

import json

import pytest

from ingest import audit
from streamlearn.contract import durable
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.object_store import FolderStore
from streamlearn.operate import restore as module
from streamlearn.operate.backup_set import BackupSet, blob_key
from streamlearn.operate.restore import verify
from streamlearn.supervise import exclusive
from tests.operate.homes import Killed, Knife, backed_up, learn, restored, running, tree


def damaged(place, path):
    """A bit of one file of the newest backup is flipped."""
    there = BackupSet(FolderStore(place), str(place))
    entry = next(e for e in there.read().entries if e.path == path)
    file = place / blob_key(entry.sha256)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return there


def test_a_home_that_holds_something_is_refused_and_with_force_put_aside(home, tmp_path):
    backed_up(home, tmp_path / "b")
    learn(home, step=8)
    newer = tree(home)
    with pytest.raises(
        ConfigError, match=r"home: holds .*config.json.*restore into an empty folder, or use --force: .*put aside, not deleted"
    ):
        restored(tmp_path / "b", home)
    assert tree(home) == newer
    aside = restored(tmp_path / "b", home, force=True)
    assert tree(aside) == newer and not [k for k in tree(home) if "000000000008" in k and not k.startswith(".replaced")]
    restored(tmp_path / "b", home, force=True)  # what was put aside before stays where it is
    assert tree(aside) == newer


def test_a_loop_that_runs_is_not_restored_over(home, tmp_path):
    backed_up(home, tmp_path / "b")
    with exclusive(home), pytest.raises(ConfigError, match="already in use by process"):
        restored(tmp_path / "b", home, force=True)


def test_a_flipped_bit_is_named_before_anything_has_changed(home, tmp_path):
    backed_up(home, tmp_path / "b")
    there = damaged(tmp_path / "b", "checkpoints/latest.json")
    before = tree(home)
    with pytest.raises(Corrupt, match=r"store/checkpoints/latest.json: blob .*damaged; delete it and back up again"):
        restored(tmp_path / "b", home, force=True)
    assert {k: v for k, v in tree(home).items() if not k.startswith(".restoring")} == before
    with pytest.raises(Corrupt, match="damaged"):
        verify(there, there.read(), tmp_path / "scratch")
    with pytest.raises(ConfigError, match="half restored; give the same `streamlearn restore` again"), exclusive(home):
        pass


def test_a_list_that_is_damaged_is_refused_and_the_one_before_it_is_there(home, tmp_path):
    backed_up(home, tmp_path / "b")
    learn(home, step=8)
    backed_up(home, tmp_path / "b")
    there = BackupSet(FolderStore(tmp_path / "b"), "b")
    file = tmp_path / "b" / there.numbers()[2]
    file.write_bytes(file.read_bytes().replace(b'"step": 8', b'"step": 9'))
    with pytest.raises(Corrupt, match=r"does not match its digest; restore an older backup \(--number\)"):
        there.read()
    restored(tmp_path / "b", tmp_path / "again", number=1)
    with pytest.raises(NotFound, match="no backup 7; there are: 1, 2"):
        there.read(7)
    assert backed_up(home, tmp_path / "b")[0].number == 3  # and the next one does without it


@pytest.mark.parametrize("force", [False, True])
def test_killed_anywhere_the_next_restore_is_whole(home, tmp_path, monkeypatch, force):
    backed_up(home, tmp_path / "b")
    restored(tmp_path / "b", tmp_path / "wanted")
    wanted, deaths = tree(tmp_path / "wanted"), 0
    while True:
        folder = tmp_path / f"again{deaths}"
        folder.mkdir()
        if force:
            (folder / "config.json").write_text("{}")
            (folder / "notes").write_text("mine")
        knife = Knife(1 + deaths, "after" if deaths % 2 else "before")
        with monkeypatch.context() as patch:
            for owner, name in ((BackupSet, "get"), (durable, "move"), (durable, "write"), (module.shutil, "rmtree")):
                patch.setattr(owner, name, lambda *a, really=getattr(owner, name), knife=knife, **how: knife.around(really, *a, **how))
            try:
                restored(tmp_path / "b", folder, force=force)
                break
            except Killed:
                deaths += 1
        if (folder / "config.json").exists() and (folder / "config.json").read_text() != "{}":  # a role may start: nothing is missing
            there = {k: v for k, v in tree(folder).items() if not k.startswith((".replaced", ".restoring"))}
            assert there == wanted and (folder / "log.sqlite").exists()
        begun = (folder / ".restoring").exists()
        if begun:
            with pytest.raises(ConfigError, match="half restored"), exclusive(folder):
                pass
        restored(tmp_path / "b", folder, force=force or (folder / "config.json").exists())
        assert {k: v for k, v in tree(folder).items() if not k.startswith(".replaced")} == wanted
        if force:
            assert [v for k, v in tree(folder).items() if k.endswith("/notes")] == [b"mine"]
        deaths += 5 if deaths > 8 else 0  # every step of the first files, then now and then, for each takes a while
    assert deaths > 20


def test_what_is_restored_is_sound(home, tmp_path):
    backed_up(home, tmp_path / "b")
    restored(tmp_path / "b", tmp_path / "again")
    at = running(tmp_path / "again")
    assert audit.verify(at.log, at.store, at.catalog, deep=True, sample=0).findings == []
    assert json.loads((tmp_path / "again" / "config.json").read_text())["home"] == str(tmp_path / "again")
