"""The learner while its shards are merged, rewritten, taken down and expire: each survivor fresh once, nothing delivered that is gone."""

import hashlib
import random
import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from ingest.compact import compact
from ingest.expire import expire, purge
from ingest.takedown import takedown
from streamlearn.contract.catalog import EXPIRED
from streamlearn.contract.event_log import TAKEDOWNS, SqliteLog
from streamlearn.stream import crew, loader
from streamlearn.stream.audit import audit
from streamlearn.stream.cache import read_member
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, begun, finished
from tests.ingest.server import picture
from tests.stream.world import CONFIG, World, take, url

NAMES = {hashlib.sha256(picture(1000 * p + n)).hexdigest(): (p, n) for p in range(2) for n in range(120)}
FAR = datetime(2027, 11, 21, tzinfo=UTC)


class Living(World):
    """A world whose dataset changes, and a learner whose every delivery is written down."""

    def __init__(self, home, monkeypatch):
        super().__init__(home)
        self.log = SqliteLog(home / "log.sqlite")
        self.log.ensure_topic(TAKEDOWNS, 1)
        self.delivered, self._last = [], []
        monkeypatch.setattr(loader, "LOOK_S", 0.0)
        monkeypatch.setattr(crew, "make", self._make)

    def _make(self, config, spec, *out, really=crew.make, **how):
        self._last = []
        for place in spec.places:
            with Path(place.path).open("rb") as f:
                self._last.append(NAMES[hashlib.sha256(read_member(f.fileno(), place.sample)).hexdigest()])
        return really(config, spec, *out, **how)

    def learn(self, stream, count=10**9):
        """The state after so many more batches; None if there were none."""
        state, taken = None, 0
        if not count:
            return None
        for batch in stream.batches():
            if batch is None:
                break
            state, taken = batch.taken(), taken + 1
            self.delivered += list(zip(self._last, batch.fresh.tolist(), strict=True))
            if taken == count:
                break
        return state

    def fresh(self):
        return Counter(name for name, fresh in self.delivered if fresh)

    def takedown(self, **selector):
        return takedown(self.log, self.store, self.catalog, folder=self.home / "rewriting", reason="test", by="test", **selector)

    def compact(self, max_bytes=2**20):
        return compact(self.store, self.catalog, folder=self.home / "rewriting", max_bytes=max_bytes)

    def purge(self):
        return purge(self.store, self.catalog, grace=timedelta(0), at=FAR)

    def all(self):
        return {(p, n) for p, end in self.ends.items() for n in range(end)}


@pytest.fixture
def world(tmp_path, monkeypatch):
    return Living(tmp_path, monkeypatch)


def grown(world, *shards):
    for count, partition in shards:
        world.add(count, partition)
    return world


@pytest.mark.parametrize("seed", range(6))
def test_over_any_life_each_survivor_is_fresh_exactly_once(world, seed):
    """Growth, learning, deaths, takedowns, mergers and purges in any order."""
    draw, gone, state = random.Random(seed), set(), None
    stream = world.stream()
    for step in range(24):
        what = draw.choice(["add", "add", "learn", "learn", "restart", "takedown", "compact", "purge"])
        if what == "add":
            world.add(draw.randint(1, 7), draw.randint(0, 1))
        elif what == "learn":
            state = world.learn(stream, draw.randint(1, 4)) or state
        elif what == "restart":  # without its cache
            stream = world.stream(state, cache=world.home / f"cache{step}")
        elif what == "takedown" and world.all() - gone:
            victim = draw.choice(sorted(world.all() - gone))
            world.takedown(url=url(*victim))
            gone.add(victim)
            before = len(world.delivered)
            state = world.learn(stream, 2) or state
            assert not {name for name, _ in world.delivered[before:]} & gone
        elif what == "compact":
            world.compact()
        elif what == "purge":
            world.purge()
    before = len(world.delivered)
    end = world.learn(stream) or state
    assert not {name for name, _ in world.delivered[before:]} & gone
    fresh = world.fresh()
    assert set(fresh.values()) <= {1} and world.all() - gone <= set(fresh)
    if end:
        assert sum(audit(CONFIG, world.store, end).fresh.values()) >= len(fresh) and stream.counters()["lost"] == 0


def test_a_merger_of_learnt_and_new_shards_is_learnt_from_where_the_cursor_stands(world):
    grown(world, (5, 0), (4, 0))
    stream = world.stream(round_samples=5, fresh_fraction=1.0)
    state = world.learn(stream, 2)  # the first round: 5 samples, 3 slots of replay
    world.add(3)
    assert world.compact().merged == 3
    world.learn(world.stream(state, cache=world.home / "c1", round_samples=50, fresh_fraction=1.0))
    assert world.fresh() == Counter({(0, n): 1 for n in range(12)})


def test_a_recorded_round_is_delivered_from_the_rewritten_shard(world):
    """Its order stays; the slot of what is gone goes to another, and is not fresh."""
    grown(world, (6, 0), (6, 1))
    plain = take(World(world.home).stream(cache=world.home / "c0"), 2)
    state = world.learn(world.stream(cache=world.home / "c1"), 1)
    first = {name for name, _ in world.delivered}
    victim = next(n for n in sorted(world.all()) if n not in first)
    world.takedown(url=url(*victim))
    world.purge()
    stream = world.stream(state, cache=world.home / "c2")
    world.learn(stream)
    assert world.fresh() == Counter(world.all() - {victim}) and victim not in {name for name, _ in world.delivered}
    assert stream.counters()["taken_down"] >= 1 and stream.counters()["lost"] == 0 and len(plain) == 2


def test_batches_that_were_made_ahead_are_dropped_when_their_sample_is_taken_down(world):
    grown(world, (12, 0))
    stream = world.stream(prefetch=6, fresh_fraction=1.0)
    world.learn(stream, 1)
    ahead = len(stream._queue)
    assert ahead >= 2
    world.takedown(host="h0.example")
    world.add(4, 1)
    before = len(world.delivered)
    world.learn(stream)
    assert {name for name, _ in world.delivered[before:]} == {(1, n) for n in range(4)}


def test_the_workers_of_a_running_learner_survive_the_removal_of_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "LOOK_S", 0.0)
    world = World(tmp_path)
    log = SqliteLog(tmp_path / "log.sqlite")
    log.ensure_topic(TAKEDOWNS, 1)
    world.add(12)
    stream, got = world.stream(workers=2, prefetch=6, fresh_fraction=1.0), []
    try:
        for batch in stream.batches():
            if batch is None:
                break
            got.append(batch)
            if len(got) == 1:
                done = takedown(log, world.store, world.catalog, folder=tmp_path / "r", url=url(0, 5), reason="", by="")
                assert done.shards == 1
                assert world.catalog.rows()[0].num_samples == 11
    finally:
        stream.close()
    assert sum(int(b.fresh.sum()) for b in got) in (11, 12) and stream.counters()["worker_deaths"] == 0  # 12: it was in the first


def test_replay_forgets_what_was_taken_down_and_a_resumed_run_forgets_the_same(world):
    grown(world, (9, 0))
    planner = Planner(CONFIG, world.catalog, world.store, batch=4)
    position = finished(planner.planned(Position.start(CONFIG)))
    world.takedown(url=url(0, 4))
    world.compact()
    planned = planner.planned(position)
    assert planned.record.gone == ((0, 4),) and len(planned.reservoir) == 8
    again = Planner(CONFIG, world.catalog, world.store, batch=4).planned(position)  # reads the record back
    assert np.array_equal(again.reservoir.refs_N2, planned.reservoir.refs_N2) and begun(position, again.record).record == again.record


def test_the_cache_drops_what_was_taken_down_though_another_process_made_the_copy(world):
    grown(world, (6, 0))
    world.learn(world.stream())
    (row,) = world.catalog.rows()
    copy = world.home / "cache" / f"{row.sha256}.tar"
    assert copy.exists()
    world.takedown(url=url(0, 2))
    stream = world.stream()
    assert not copy.exists() and stream.counters()["cache_bytes"] == 0


def test_a_reference_to_what_was_taken_down_is_not_found_and_others_are_followed(world):
    grown(world, (6, 0), (3, 0))
    stream = world.stream()
    state = world.learn(stream)
    refs = stream.sample(state, 9)
    images = {ref: stream.image_bytes(ref) for ref in refs}
    world.takedown(url=url(0, 1))
    world.compact()
    world.purge()
    stream = world.stream(state, cache=world.home / "c1")
    assert sorted(stream.sample(state, 9)) == sorted(refs)
    for ref in refs:
        if images[ref] == picture(1):
            with pytest.raises(loader.NotFound, match="taken down"):
                stream.image_bytes(ref)
        else:
            assert stream.image_bytes(ref) == images[ref]
    assert torch.isfinite(stream.eval_images(refs, 16)).all()


def test_what_expires_unseen_is_passed_over_and_counted(world):
    grown(world, (6, 0))
    state = world.learn(world.stream(), 1)
    grown(world, (5, 0), (4, 1))
    early = [r.key for r in world.catalog.rows()]
    assert expire(world.catalog, window=timedelta(days=90), at=FAR).samples == 15
    world.add(3, 0)
    stream = world.stream(state)
    end = world.learn(stream)
    assert stream.counters()["expired_unseen"] == end["unseen"] == 9
    assert world.fresh() == Counter({(0, n): 1 for n in [*range(6), *range(11, 14)]})
    assert [r.key for r in world.catalog.history() if r.status == EXPIRED] == early
    assert len(end["reservoir"]["refs"]) == 3  # replay does not draw from what has expired


def test_half_of_a_merged_shard_expires_unseen(world):
    grown(world, (6, 0))
    state = world.learn(world.stream(), 3)
    world.add(5, 0)
    world.compact()
    expire(world.catalog, window=timedelta(days=90), at=FAR)
    world.add(2, 0)
    world.purge()
    shutil.rmtree(world.home / "cache")
    end = world.learn(world.stream(state))
    assert end["unseen"] == 5 and world.fresh()[(0, 12)] == 1 and end["cursor"] == {"candidates/0": 13}


def test_with_everything_taken_down_the_learner_waits(world):
    grown(world, (6, 0))
    stream = world.stream()
    world.learn(stream, 1)
    world.takedown(host="h0.example")
    before = len(world.delivered)
    world.learn(stream)
    assert world.delivered[before:] == []
    world.add(4, 1)
    world.learn(stream)
    assert {name for name, _ in world.delivered[before:]} == {(1, n) for n in range(4)}
