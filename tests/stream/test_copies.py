"""Copies in a folder that ranks share: downloaded once, never evicted in use, purged at once, and no death stands in anyone's way."""

import contextlib
import hashlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.contract.errors import StoreFull
from streamlearn.stream.copies import Copies, Refusal
from tests.conftest import REPO, small_disk
from tests.stream.dying import BUDGET, SIZE, fetch, shard

NAMES = "abcdef"
DIGEST = {name: shard(name)[0] for name in NAMES}


@pytest.fixture
def two(tmp_path):
    return [Copies(tmp_path, BUDGET) for _ in range(2)]


def claim(copies, name, *, near=None, heeded=0, force=False):
    return copies.claim(DIGEST[name], SIZE, near or {}, heeded=heeded, force=force)


def finish(copies, name):
    (copies._own / f"{DIGEST[name]}.part").write_bytes(shard(name)[1])
    return copies.publish(DIGEST[name])


def test_killed_at_anything_it_does_to_the_folder_a_rank_stands_in_nobodys_way(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.stream.dying", tmp_path], cwd=REPO, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 60


def test_of_two_ranks_one_downloads_and_both_read(two):
    a, b = two
    assert claim(a, "a").exists()
    assert claim(b, "a") is Refusal.BUSY and b.take(DIGEST["a"]) is None
    assert finish(a, "a").read_bytes() == shard("a")[1]
    assert claim(b, "a") is Refusal.HERE and b.take(DIGEST["a"]).read_bytes() == shard("a")[1]
    assert a.bytes == b.bytes == SIZE


def test_what_another_rank_reads_is_not_evicted_and_what_is_needed_sooner_neither(two):
    a, b = two
    fetch(a, "a")
    fetch(b, "b")
    assert claim(a, "c") is Refusal.FULL
    b.drop([DIGEST["b"]])
    assert claim(a, "c", near={DIGEST["b"]: 1, DIGEST["c"]: 1}) is Refusal.FULL
    assert claim(a, "c", near={DIGEST["b"]: 2, DIGEST["c"]: 1}).exists()
    assert not a.has(DIGEST["b"]) and a.has(DIGEST["a"]) and a.bytes == 2 * SIZE and a.evictions == 1


def test_what_was_used_least_lately_goes_first(tmp_path):
    copies = Copies(tmp_path, BUDGET)
    for name in "ab":
        fetch(copies, name)
        copies.drop([DIGEST[name]])
    copies.take(DIGEST["a"])
    copies.drop([DIGEST["a"]])
    fetch(copies, "c")
    assert copies.has(DIGEST["a"]) and not copies.has(DIGEST["b"])


def test_over_the_budget_rather_than_not_at_all(two):
    a, b = two
    fetch(a, "a")
    fetch(b, "b")
    assert claim(a, "c", force=True).exists() and a.bytes == 3 * SIZE > BUDGET


def test_purging_takes_what_others_read_and_what_others_download_and_nobody_fetches_it_back(two):
    a, b = two
    fetch(b, "a")
    claim(b, "b")
    a.purge([DIGEST["a"], DIGEST["b"]], 5)
    assert not [p for p in a.folder.rglob("*") if p.suffix in (".tar", ".part")] and a.bytes == b.bytes == 0
    assert finish_if_there(b, "b") is None
    assert b.noted() == 5 and claim(b, "a", heeded=4) is Refusal.STALE
    assert claim(b, "c", heeded=5).exists()


def finish_if_there(copies, name):
    """As a thread that goes on writing where the part had been."""
    return copies.publish(DIGEST[name])


def test_a_copy_that_lay_there_is_read_before_it_is_believed(tmp_path):
    fetch(Copies(tmp_path, BUDGET), "a")
    (tmp_path / f"{DIGEST['a']}.tar").write_bytes(b"\0" * SIZE)  # as after a power loss
    after = Copies(tmp_path, BUDGET)
    assert not after.sound(DIGEST["a"], after.take(DIGEST["a"]))
    after.discard(DIGEST["a"])
    assert fetch(after, "a").read_bytes() == shard("a")[1] and after.sound(DIGEST["a"], after.take(DIGEST["a"]))


def test_a_rank_that_has_left_begins_with_nothing_new(two):
    a, b = two
    fetch(a, "a")
    claim(a, "b")
    a.close()
    assert claim(a, "c") is Refusal.LEFT and a.take(DIGEST["a"]) is None and finish_if_there(a, "b") is None
    assert b.take(DIGEST["a"]) and claim(b, "b").exists() and b.bytes == 2 * SIZE
    assert [path.name for path in (b.folder / ".ranks").iterdir()] == [b._id]


def test_an_emptied_folder_is_made_anew(two):
    a, b = two
    fetch(a, "a")
    subprocess.run(["rm", "-rf", a.folder], check=True)
    assert a.take(DIGEST["a"]) is None and fetch(b, "a").exists() and a.take(DIGEST["a"]).exists()
    assert a.bytes == b.bytes == SIZE


def test_a_full_disk_costs_what_nobody_reads_and_then_is_said(tmp_path):
    with small_disk(tmp_path / "tiny", "64k") as folder, contextlib.closing(Copies(folder / "cache", 2**30)) as copies:
        fetch(copies, "a")
        copies.drop([DIGEST["a"]])
        with pytest.raises(OSError, match="space"), (folder / "ballast").open("wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        fetch(copies, "b", {})  # in the place of a
        assert not copies.has(DIGEST["a"])
        with pytest.raises(StoreFull, match="goes on by itself"):
            claim(copies, "c")
        assert copies.bytes == SIZE
        (folder / "ballast").unlink()
        assert fetch(copies, "c").exists()


class Crowd:
    """Three ranks, what each reads and downloads."""

    def __init__(self, folder):
        self.folder = folder
        self.ranks, self.reads, self.loads = [Copies(folder, BUDGET) for _ in range(3)], [set(), set(), set()], [set(), set(), set()]

    def claim(self, i, name):
        if name not in self.reads[i] | self.loads[i] and not isinstance(claim(self.ranks[i], name), Refusal):
            assert not any(name in names for names in (*self.loads, *self.reads))
            self.loads[i].add(name)

    def publish(self, i, name):
        if name in self.loads[i]:
            self.loads[i].discard(name)
            assert finish(self.ranks[i], name)
            self.reads[i].add(name)

    def abandon(self, i, name):
        self.ranks[i].abandon(DIGEST[name])
        self.loads[i].discard(name)

    def take(self, i, name):
        if self.ranks[i].take(DIGEST[name]):
            self.reads[i].add(name)

    def drop(self, i, name):
        self.ranks[i].drop([DIGEST[name]])
        self.reads[i].discard(name)

    def purge(self, i, name):
        self.ranks[i].purge([DIGEST[name]], 0)
        for names in (*self.reads, *self.loads):
            names.discard(name)

    def leave(self, i, name):
        self.ranks[i].close()
        self.ranks[i], self.reads[i], self.loads[i] = Copies(self.folder, BUDGET), set(), set()

    def die(self, i, name):
        if self.ranks[i]._alive:
            self.ranks[i]._alive.close()  # the kernel unlocks it; nothing is tidied
        self.ranks[i], self.reads[i], self.loads[i] = Copies(self.folder, BUDGET), set(), set()

    def check(self):
        held = {p.stat().st_ino: p.stat().st_size for p in self.folder.rglob("*") if p.suffix in (".tar", ".part")}
        assert self.ranks[0].bytes == sum(held.values()) <= BUDGET
        for rank, names in zip(self.ranks, self.reads, strict=True):
            for name in names:
                assert hashlib.sha256((rank._own / f"{DIGEST[name]}.tar").read_bytes()).hexdigest() == DIGEST[name]


DOINGS = ["claim", "publish", "abandon", "take", "drop", "purge", "leave", "die"]


@given(st.lists(st.tuples(st.sampled_from(DOINGS), st.integers(0, 2), st.sampled_from(NAMES)), max_size=40))
def test_over_any_doings_of_three_ranks_the_bytes_are_true_and_what_is_read_stays(tmp_path_factory, doings):
    crowd = Crowd(tmp_path_factory.mktemp("cache"))
    for what, i, name in doings:
        getattr(crowd, what)(i, name)
        crowd.check()
