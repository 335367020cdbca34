"""The suite every object store passes: the folder, and S3 as moto plays it."""

import threading
import time

import pytest

from streamlearn.adapters.s3_store import S3Store
from streamlearn.contract.errors import NotFound
from streamlearn.contract.object_store import FolderStore


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path):
    if request.param == "folder":
        return FolderStore(tmp_path / "store")
    return S3Store(request.getfixturevalue("bucket").config())


def test_returns_what_was_put_whole_or_in_part(store, tmp_path):
    store.put("a/b", b"0123456789")
    assert store.get("a/b") == b"0123456789" and store.size("a/b") == 10
    assert store.get_range("a/b", 3, 4) == b"3456" and store.get_range("a/b", 8, 100) == b"89"
    store.get_file("a/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789" and list(tmp_path.glob(".*")) == []


def test_a_range_ends_where_the_object_ends(store):
    store.put("a", b"0123456789")
    store.put("empty", b"")
    assert store.get_range("a", 10, 5) == store.get_range("a", 99, 5) == store.get_range("a", 3, 0) == b""
    assert store.get_range("empty", 0, 5) == b"" and store.get_range("a", 9, 1) == b"9"


def test_nothing_is_a_whole_object_too(store, tmp_path):
    (tmp_path / "empty").touch()
    store.put_file("file", tmp_path / "empty")
    store.put("bytes", b"")
    store.get_file("file", tmp_path / "copy")
    assert store.get("file") == store.get("bytes") == (tmp_path / "copy").read_bytes() == b"" and store.size("file") == 0


def test_the_last_put_stands(store, tmp_path):
    (tmp_path / "f").write_bytes(b"new")
    store.put("k", b"longer than the new one")
    store.put_file("k", tmp_path / "f")
    (tmp_path / "copy").write_bytes(b"an older copy")
    store.get_file("k", tmp_path / "copy")
    assert store.get("k") == (tmp_path / "copy").read_bytes() == b"new"


def test_a_put_file_stays_where_it_was(store, tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    store.put_file("big", tmp_path / "f")
    assert store.get("big") == (tmp_path / "f").read_bytes()


def test_every_put_makes_an_object_young_again(store, tmp_path):
    (tmp_path / "f").write_bytes(b"2")
    before = int(time.time())  # S3 tells whole seconds
    store.put("k", b"1")
    first = store.modified("k")
    assert before <= first <= time.time() + 1
    time.sleep(1.1)
    store.get("k")
    assert store.modified("k") == first  # reading is no change
    store.put_file("k", tmp_path / "f")
    assert store.modified("k") >= first + 1


@pytest.mark.parametrize(
    "call", [("get", "a/b"), ("size", "a/b"), ("modified", "a/b"), ("get_range", "a/b", 0, 5), ("get_range", "a/b", 0, 0)], ids=str
)
def test_what_is_not_there_is_not_found(store, call):
    name, *args = call
    with pytest.raises(NotFound, match="no object a/b"):
        getattr(store, name)(*args)


def test_a_failed_get_file_touches_nothing(store, tmp_path):
    with pytest.raises(NotFound):
        store.get_file("a/b", tmp_path / "copy")
    assert not (tmp_path / "copy").exists() and list(tmp_path.glob(".*")) == []


def test_put_if_absent_keeps_the_first(store):
    assert store.put_if_absent("k", b"1") and not store.put_if_absent("k", b"2")
    assert store.get("k") == b"1"
    store.put("plain", b"1")
    assert not store.put_if_absent("plain", b"1")


def test_of_many_who_put_if_absent_exactly_one_is_told_so(store):
    told = {}

    def race(i):
        told[i] = store.put_if_absent("k", b"%d" % i)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(told) == 16 and [b"%d" % i for i, won in told.items() if won] == [store.get("k")]


def test_lists_by_prefix_sorted(store):
    for key in ("s/b", "s/a", "t/c", "s/d/e"):
        store.put(key, b"")
    assert store.list("s/") == ["s/a", "s/b", "s/d/e"] and store.list("s/d") == ["s/d/e"] and store.list("zz/") == []


def test_deleting_twice_is_harmless(store):
    store.put("k", b"1")
    store.delete("k")
    store.delete("k")
    assert store.list("") == []


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/.hidden", "."])
def test_a_key_cannot_leave_the_store(store, key):
    with pytest.raises(ValueError, match="object key"):
        store.put(key, b"")


def test_a_folder_never_lists_what_is_staged(tmp_path):
    store = FolderStore(tmp_path)
    store.put("s/a", b"")
    (tmp_path / "s" / ".half.tmp").write_bytes(b"half")
    assert store.list("") == ["s/a"]
