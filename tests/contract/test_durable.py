"""A file is whole or absent; a full disk is a fault that passes."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from streamlearn.contract import durable
from streamlearn.contract.errors import StoreFull
from streamlearn.contract.status import Heartbeat, read_status
from tests.conftest import small_disk


@pytest.fixture
def tiny_disk(tmp_path):
    with small_disk(tmp_path / "tiny", "256k") as folder:
        yield folder


def test_a_full_disk_is_a_fault_that_passes_and_leaves_no_litter(tiny_disk):
    durable.write(tiny_disk / "a", b"old")
    with pytest.raises(StoreFull, match="no space left"):
        durable.write(tiny_disk / "a", bytes(2**20))
    assert (tiny_disk / "a").read_bytes() == b"old" and os.listdir(tiny_disk) == ["a"]
    with pytest.raises(StoreFull):
        durable.create(tiny_disk / "b", bytes(2**20))
    assert os.listdir(tiny_disk) == ["a"]


def test_a_full_disk_mutes_the_heartbeat_but_not_the_work(tiny_disk):
    filler = tiny_disk / "filler"
    with pytest.raises(OSError, match="space"):
        filler.write_bytes(bytes(2**20))
    heart = Heartbeat(tiny_disk, "fetch")
    heart.beat(force=True, stored=1)
    heart.history(stored=1)
    filler.unlink()
    heart.beat(force=True, stored=2)
    assert read_status(tiny_disk)["fetch"]["stored"] == 2


def test_of_many_who_create_one_is_told_so_and_its_bytes_stay(tmp_path):
    won = []

    def race(i):
        if durable.create(tmp_path / "x", b"%d" % i):
            won.append(i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(won) == 1 and (tmp_path / "x").read_bytes() == b"%d" % won[0] and os.listdir(tmp_path) == ["x"]


def test_killed_at_any_byte_a_write_leaves_the_old_file_or_the_new(tmp_path):
    """A child writes over and over and is killed at random; what lies there is always one whole version."""
    code = (
        "import sys; from pathlib import Path; from streamlearn.contract import durable\n"
        "i = 0\nwhile True:\n    i += 1\n    durable.write(Path(sys.argv[1]), (b'%09d' % i) * 20000)"
    )
    target = tmp_path / "x"
    for round_number in range(6):
        child = subprocess.Popen([sys.executable, "-c", code, str(target)])
        while not target.exists():
            pass
        threading.Event().wait(0.05 + 0.013 * round_number)
        child.kill()
        child.wait()
        data = target.read_bytes()
        assert len(data) == 180000 and data == data[:9] * 20000


def test_a_torn_last_line_is_passed_over_and_the_next_starts_afresh(tmp_path):
    path = tmp_path / "h.jsonl"
    durable.append_line(path, json.dumps({"a": 1}))
    with path.open("ab") as f:
        f.write(b'{"a": 2, "b')
    assert list(durable.read_lines(path)) == [{"a": 1}]
    durable.append_line(path, json.dumps({"a": 3}))
    assert list(durable.read_lines(path)) == [{"a": 1}, {"a": 3}]


def folder_of(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def test_a_folder_appears_whole_and_replaces_another_only_if_told(tmp_path):
    durable.publish_folder(folder_of(tmp_path / "new", a="1", b="2"), tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["a", "b"] and os.listdir(tmp_path) == ["x"]
    with pytest.raises(FileExistsError):
        durable.publish_folder(folder_of(tmp_path / "new", a="3"), tmp_path / "x")
    assert (tmp_path / "x" / "a").read_text() == "1" and (tmp_path / "new" / "a").exists()
    durable.publish_folder(tmp_path / "new", tmp_path / "x", replace=True)
    assert {p.name: p.read_text() for p in (tmp_path / "x").iterdir()} == {"a": "3"} and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("nth", [1, 2])
def test_killed_at_either_rename_of_a_folder_no_file_of_the_old_one_is_lost(tmp_path, monkeypatch, nth):
    class Killed(BaseException): ...

    folder_of(tmp_path / "x", a="old")
    new, rename, calls = folder_of(tmp_path / "new", a="new"), Path.rename, []

    def dying(path, target):
        calls.append(path)
        if len(calls) == nth:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(Killed):
        durable.publish_folder(new, tmp_path / "x", replace=True)
    assert sorted(p.read_text() for p in tmp_path.rglob("a")) == ["new", "old"]
