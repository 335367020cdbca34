"""The suite every object store passes."""

import pytest

from streamlearn.contract.errors import NotFound
from streamlearn.contract.object_store import FolderStore


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "store")


def test_returns_what_was_put_whole_or_in_part(store, tmp_path):
    store.put("a/b", b"0123456789")
    assert store.get("a/b") == b"0123456789" and store.size("a/b") == 10
    assert store.get_range("a/b", 3, 4) == b"3456" and store.get_range("a/b", 8, 100) == b"89"
    store.get_file("a/b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"


def test_a_put_file_stays_where_it_was(store, tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    store.put_file("big", tmp_path / "f")
    assert store.get("big") == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("call", ["get", "size"])
def test_what_is_not_there_is_not_found(store, call):
    with pytest.raises(NotFound, match="no object a/b"):
        getattr(store, call)("a/b")


def test_a_failed_get_file_touches_nothing(store, tmp_path):
    with pytest.raises(NotFound):
        store.get_file("a/b", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_put_if_absent_keeps_the_first(store):
    assert store.put_if_absent("k", b"1") and not store.put_if_absent("k", b"2")
    assert store.get("k") == b"1"


def test_lists_by_prefix_sorted_and_never_what_is_staged(store):
    for key in ("s/b", "s/a", "t/c", "s/d/e"):
        store.put(key, b"")
    (store.root / "s" / ".half.tmp").write_bytes(b"half")
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
