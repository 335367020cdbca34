"""Shards ahead of need: the same batches byte for byte over a slow, dead, full or forgetful store, and nothing else waits for it."""

import subprocess
import time
from datetime import timedelta

import pytest
import torch

from ingest.compact import compact
from ingest.expire import purge
from ingest.takedown import takedown
from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.event_log import TAKEDOWNS, SqliteLog
from streamlearn.contract.waits import Waits
from streamlearn.stream import loader
from streamlearn.stream.cache import Copy, ShardCache, Want
from tests.conftest import missing
from tests.stream.stores import LIMIT_S, Road
from tests.stream.test_life import FAR
from tests.stream.test_loader import equal
from tests.stream.world import CONFIG, World, take, url

ADDED = ((6, 0), (5, 1), (9, 0), (4, 1))


@pytest.fixture
def world(tmp_path):
    return filled(tmp_path)


def filled(home):
    world = World(home)
    world.store = Road(home / "store")
    for count, partition in ADDED:
        world.add(count, partition)
    return world


@pytest.fixture
def whole(tmp_path):
    """All batches, as they come where nothing goes wrong."""
    return take(filled(tmp_path / "plain").stream(), 100)


def same(a, b):
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def drive(stream, count, on_wait=lambda batches: None):
    """The next batches, however long it takes; `on_wait` is asked whenever there is none."""
    found, end = [], time.monotonic() + LIMIT_S
    for batch in stream.batches():
        assert time.monotonic() < end
        if batch is None:
            on_wait(found)
        else:
            found.append(batch)
            if len(found) == count:
                break
    return found


def test_while_a_download_hangs_earlier_batches_are_delivered_and_then_it_says_nothing(world, whole, monkeypatch):
    monkeypatch.setattr(loader, "PATIENCE_S", 0.05)
    late = world.add(8, 0)  # of the third round
    key = [row.key for row in world.catalog.rows()][2]
    world.store.stalled = key.rpartition("/")[2]
    stream, before = world.stream(round_samples=9, fresh_fraction=1.0), []

    def go_on(found):
        before.append(len(found))
        if len(found) >= 2 and world.store.hanging.is_set():
            world.store.open.set()

    found = drive(stream, 9, go_on)
    stream.close()
    assert before[-1] >= 2 and world.store.open.is_set() and world.store.asked[late] == 1
    other = World(world.home)
    assert same(found, take(other.stream(cache=world.home / "c1", round_samples=9, fresh_fraction=1.0), 9))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_is_down_for_a_while_changes_no_batch(world, whole, workers):
    stream, told = world.stream(workers=workers, prefetch=1, prefetch_bytes=1), []

    def back(found):
        told.append((stream.waiting(), stream.counters()))
        world.store.down = False

    found = drive(stream, 2)
    world.store.down = True
    found += drive(stream, len(whole) - 2, back)
    assert same(found, whole) and told
    waiting, counters = told[0]
    assert "the store is down" in waiting["waiting"] and waiting["waiting_since"] and counters["failures"] >= 1
    assert stream.waiting()["waiting"] == "" and stream.counters()["lost"] == stream.counters()["corrupt"] == 0
    stream.close()


def test_down_from_the_start_it_is_waited_for(world, whole):
    stream, before = world.stream(), []
    world.store.down = True

    def back(found):
        before.append(len(found))
        world.store.down = False

    assert same(drive(stream, len(whole), back), whole) and before[0] == 0 and world.store.failed.is_set()


def test_what_is_here_is_taken_though_every_download_waits(world):
    take(world.stream(), 100)
    rows = world.catalog.rows()
    (world.home / "cache" / f"{rows[0].sha256}.tar").unlink()
    world.store.down = True
    waits = Waits()
    cache = ShardCache(world.store, world.home / "cache", CONFIG.model_copy(update={"downloads": 1}), waits)
    cache.foresee([Want(row.key, row.sha256) for row in rows], urgent=1, kept=[], force=False)
    until(lambda: all(isinstance(cache.copy(row.sha256), Copy) for row in rows[1:]))
    until(lambda: waits.why() is not None)
    assert cache.copy(rows[0].sha256) is None
    cache.close()


def until(true):
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_images_for_calibration_are_had_once_the_store_is_back(world):
    state = take(world.stream(), 9)[-1].taken()
    stream, other = world.stream(cache=world.home / "c1"), world.stream(cache=world.home / "c2")
    refs = stream.sample(state, 6)
    assert other.sample(state, 6) == refs
    world.store.down = True
    with pytest.raises(Retryable, match="the store is down"):
        stream.eval_images(refs, 16)
    world.store.down = False
    until(lambda: stream.waiting()["waiting"] == "")
    images = stream.eval_images(refs, 16)
    assert len(images) == 6 and torch.equal(images, other.eval_images(refs, 16))
    stream.close()


@pytest.mark.parametrize("shards", [0.5, 1.5])
def test_a_round_larger_than_the_budget_goes_on_batch_by_batch(world, whole, shards):
    one = max(row.bytes for row in world.catalog.rows())
    stream, most = world.stream(), 0
    stream.cache.copies.budget_bytes = int(shards * one)
    found = []
    for batch in stream.batches():
        if batch is None:
            break
        found.append(batch)
        most = max(most, stream.counters()["cache_bytes"])
        if len(found) == len(whole):
            break
    assert same(found, whole) and most <= max(int(shards * one), 4 * one)  # four slots may lie in four shards
    assert stream.counters()["cache_evictions"] > 0
    stream.close()


def test_no_more_is_fetched_ahead_than_is_asked_for(world):
    for _ in range(20):
        world.add(6)
    one = max(row.bytes for row in world.catalog.rows())
    stream = world.stream(prefetch=1, round_samples=1000, prefetch_bytes=4 * one, downloads=2)
    drive(stream, 1)
    kept = stream._kept()
    stream.ahead.foresee(kept)
    until(lambda: stream.cache._lanes == {False: 2, True: 1})  # nobody is at work any more
    assert 1 <= stream.counters()["shards_ahead"] <= 4 * one // 20480 + 2 + 4  # as asked, what was begun at once, what the batch had
    stream.close()


def test_a_shard_that_was_just_rewritten_is_not_lost(world, monkeypatch):
    monkeypatch.setattr(loader, "LOOK_S", 1000.0)  # it will not see it by itself
    for _ in range(12):
        world.add(5)
    stream = world.stream(prefetch=1, prefetch_bytes=1, downloads=1, fresh_fraction=1.0, round_samples=1000)
    found = drive(stream, 1)
    compact(world.store, world.catalog, folder=world.home / "rewriting", max_bytes=2**20)
    purge(world.store, world.catalog, grace=timedelta(0), at=FAR)
    found += take(stream, 20)
    assert stream.counters()["lost"] == stream.counters()["taken_down"] == 0
    assert sum(int(b.fresh.sum()) for b in found) == 84 == sum(len(b.fresh) for b in found)
    stream.close()


def test_the_shards_of_the_next_round_are_fetched_before_it_is_planned(world):
    stream = world.stream(prefetch=1, fresh_fraction=1.0)
    drive(stream, 1)
    stream.ahead.foresee(stream._kept())
    until(lambda: stream.counters()["downloads"] == len(ADDED))
    assert stream.ahead.position.round == 0 and world.store.list("rounds/") == ["rounds/00000000.json"]
    stream.close()


def removed(world, **selector):
    log = SqliteLog(world.home / "log.sqlite")
    log.ensure_topic(TAKEDOWNS, 1)
    takedown(log, world.store, world.catalog, folder=world.home / "rewriting", reason="", by="", **selector)


@pytest.mark.parametrize("whose", ["its own", "another rank's"])
def test_a_takedown_ends_a_download_that_is_under_way(world, monkeypatch, whose):
    monkeypatch.setattr(loader, "LOOK_S", 0.0)
    row = world.catalog.rows()[0]
    world.store.stalled = row.sha256[:12]
    stream = world.stream()
    stream.ahead.next()
    stream.ahead.foresee(frozenset())
    assert world.store.hanging.wait(LIMIT_S)

    def names():
        return [p for p in (world.home / "cache").rglob("*") if p.stem == row.sha256]

    assert names()
    other = world.stream()
    world.store.stalled = ""
    removed(world, url=url(0, 2))
    who = stream if whose == "its own" else other
    who._look()
    who._heed()
    assert not names()
    world.store.open.set()
    found = take(stream, 100)
    assert not names() and sum(int(b.fresh.sum()) for b in found) == sum(count for count, _ in ADDED) - 1
    assert stream.counters()["lost"] == 0
    stream.close()
    other.close()


def test_what_another_rank_has_seen_taken_down_is_not_delivered_from_what_was_made_ahead(world, monkeypatch):
    """Nobody waits for the next look: the folder says that somebody knows more."""
    monkeypatch.setattr(loader, "LOOK_S", 1000.0)
    stream, other = world.stream(workers=1, prefetch=4, fresh_fraction=1.0), world.stream()
    drive(stream, 1)
    removed(world, host="h0.example")
    other.planner.look()
    other._heed()
    found = take(stream, 100)
    assert sum(int(b.fresh.sum()) for b in found) <= 9 and stream.counters()["taken_down"] > 0
    stream.close()


def test_a_cache_that_somebody_empties_is_filled_again(world, whole):
    stream = world.stream(workers=1)
    found = drive(stream, 3)
    subprocess.run(["rm", "-rf", world.home / "cache"], check=True)
    found += drive(stream, len(whole) - 3)
    assert same(found, whole)
    stream.close()


def test_what_the_store_refuses_for_good_ends_the_learner_with_the_remedy(world):
    class Locked(Road):
        def get_range(self, key, start, length):
            raise ConfigError("not allowed in this bucket; allow s3:GetObject")

    world.store = Locked(world.store.root)
    with pytest.raises(ConfigError, match="s3:GetObject"):
        take(world.stream(), 1)


def test_a_full_disk_is_waited_for(tmp_path, whole):
    world = filled(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        missing(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    told = []
    try:
        with pytest.raises(OSError, match="space"), (folder / "ballast").open("wb", buffering=0) as f:
            while True:
                f.write(bytes(4096))
        stream = world.stream(cache=folder / "cache")

        def room(found):
            told.append(stream.waiting()["waiting"])
            (folder / "ballast").unlink(missing_ok=True)

        assert same(drive(stream, len(whole), room), whole)
        assert "no space left" in told[0] and stream.waiting()["waiting"] == ""
        stream.close()
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_closing_waits_for_no_request(world):
    world.store.stalled = ".tar"
    stream = world.stream()
    stream.ahead.next()
    stream.ahead.foresee(frozenset())
    assert world.store.hanging.wait(LIMIT_S)
    stream.close()
    assert not list((world.home / "cache").rglob("*.part"))
    world.store.open.set()


def test_the_order_knows_nothing_of_how_shards_come(world, whole):
    for i, more in enumerate(({"downloads": 1}, {"downloads": 8}, {"prefetch_bytes": 1}, {"prefetch": 7})):
        assert same(take(world.stream(cache=world.home / f"c{i}", **more), len(whole)), whole)
