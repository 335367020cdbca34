"""Rounds over any life of a dataset: growth, expiry, takedowns, mergers, restarts, another number of ranks."""

import io
from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.object_store import FolderStore
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished
from streamlearn.stream.rounds import order, part_of_batch
from tests.stream.catalogs import MemoryCatalog

BATCH = 4
STEP = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 1)),
    st.tuples(st.just("add"), st.integers(0, 12), st.integers(0, 1)),
    st.tuples(st.just("learn"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("learn"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("restart"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("expire"), st.integers(0, 50), st.just(0)),
    st.tuples(st.just("takedown"), st.integers(0, 200), st.just(0)),
    st.tuples(st.just("merge"), st.integers(0, 50), st.integers(0, 1)),
)


class Life:
    """A catalog, a learner of it, and what a careful observer knows of both."""

    def __init__(self, config, folder):
        self.config, self.catalog, self.store = config, MemoryCatalog(), FolderStore(folder)
        self.planner = Planner(config, self.catalog, self.store, batch=BATCH)
        self.position = Position.start(config)
        self.fresh, self.sequence, self.states = Counter(), [], []

    def change(self, what, a, b):
        live = self.catalog.live()
        if what == "add":
            self.catalog.add(a, b)
        elif what == "expire" and live:
            self.catalog.expire(live[a % len(live)])
        elif what == "takedown" and self.catalog.alive():
            alive = sorted(self.catalog.alive())
            self.catalog.takedown(alive[a % len(alive)])
        elif what == "merge" and len(own := self.neighbours(b)) > 1:
            at = a % (len(own) - 1)
            self.catalog.merge(own[at : at + 2])

    def neighbours(self, partition):
        """Live shards of a partition up to the first gap, which expiry leaves."""
        keys, found = self.catalog.live(partition), []
        for key in keys:
            if found and self.catalog.rows[found[-1]].end_offset != self.catalog.rows[key].first_offset:
                break
            found.append(key)
        return found

    def restart(self, back):
        """From the checkpoint so many rounds ago: another process, which knows only what it reads."""
        if self.states:
            data, learnt, taken = self.states[-1 - min(back, len(self.states) - 1)]
            self.position = Position.from_state(self.config, torch.load(io.BytesIO(data), weights_only=True))
            self.fresh, self.sequence = Counter(learnt), self.sequence[:taken]
        self.planner = Planner(self.config, self.catalog, self.store, batch=BATCH)

    def learn(self, rounds):
        for _ in range(rounds):
            again = f"rounds/{self.position.round:08d}.json" in self.store.list("rounds/")
            planned = self.planner.planned(self.position)
            if planned is None:
                return
            if not again:
                self.check_plan(planned)
            self.take(planned)
            self.position = finished(planned)
            data = io.BytesIO()
            torch.save(self.position.to_state(), data)
            self.states.append((data.getvalue(), Counter(self.fresh), len(self.sequence)))

    def check_plan(self, planned):
        """Of a round planned just now: replay draws from the living alone, and the population is counted right."""
        alive, kept, reservoir = self.catalog.alive(), self.kept(planned), planned.reservoir
        assert set(kept) <= alive & set(self.fresh) and len(set(kept)) == len(kept) == len(reservoir.uses_N) <= self.config.reservoir
        assert planned.record.alive == len(alive & set(self.fresh)) == reservoir.alive
        if reservoir.policy == "reservoir":
            deleted = reservoir.holes + reservoir.others
            assert len(kept) + reservoir.holes == min(reservoir.capacity, reservoir.alive + deleted)

    def kept(self, at):
        return [self.catalog.samples[at.table.get(n)[0]][i] for n, i in at.reservoir.refs_N2.tolist()]

    def take(self, planned):
        slots, table = order(self.config.seed, planned.record, planned.reservoir), planned.table.with_(planned.record.shards)
        samples = [self.catalog.samples[table.get(n)[0]][i] for n, i in slots.refs_N2.tolist()]
        self.fresh.update(s for s, fresh in zip(samples, slots.fresh_N, strict=True) if fresh)
        self.sequence += list(zip(samples, slots.fresh_N.tolist(), slots.keys_N.tolist(), strict=True))


@settings(max_examples=150)
@given(st.lists(STEP, min_size=3, max_size=40), st.integers(0, 2), st.sampled_from(["reservoir", "fifo"]), st.sampled_from([0, 2]))
def test_over_any_life_each_survivor_is_fresh_exactly_once_and_replay_knows_the_living(tmp_path_factory, steps, seed, replay, cap):
    config = StreamConfig(round_samples=15, reservoir=10, max_replay_per_fresh=1.5, seed=seed, replay=replay, max_replays=cap)
    life = Life(config, tmp_path_factory.mktemp("s"))
    for what, a, b in steps:
        if what == "learn":
            life.learn(a)
        elif what == "restart":
            life.restart(a)
        else:
            life.change(what, a, b)
    life.learn(10**6)
    assert set(life.fresh.values()) <= {1}
    assert life.catalog.alive() <= set(life.fresh)


@settings(max_examples=40)
@given(st.lists(STEP, min_size=5, max_size=25), st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=6))
def test_ranks_together_take_the_sequence_of_one_however_their_number_changes(tmp_path_factory, steps, numbers):
    config = StreamConfig(round_samples=15, reservoir=10, max_replay_per_fresh=1.5)
    life = Life(config, tmp_path_factory.mktemp("s"))
    for what, a, b in steps:
        life.learn(a) if what in ("learn", "restart") else life.change(what, a, b)
    life.learn(3)
    position, got, turn = Position.start(config), [], 0
    while planned := Planner(config, life.catalog, life.store, batch=BATCH, leader=False).planned(position):
        slots = order(config.seed, planned.record, planned.reservoir)
        for start in range(0, len(slots.refs_N2), BATCH):
            ranks = numbers[turn % len(numbers)]
            parts = [part_of_batch(BATCH, rank, ranks) for rank in range(ranks)]
            got += [k for part in parts for k in slots.keys_N[start : start + BATCH][part].tolist()]
            turn += 1
        position = finished(planned)
    assert got == [k for _, _, k in life.sequence]


def test_replay_forgets_what_expired_in_a_shard_that_it_was_merged_into(tmp_path):
    life = Life(StreamConfig(round_samples=15, reservoir=20, max_replay_per_fresh=1.5), tmp_path)
    for _ in range(3):
        life.catalog.add(6)
    life.learn(10)
    for _ in range(2):  # merged twice
        life.catalog.merge(life.catalog.live()[:2])
    life.catalog.expire(life.catalog.live()[0])
    life.catalog.add(4)
    planned = life.planner.planned(life.position)
    assert planned.record.alive == len(planned.reservoir) == 0 and len(planned.record.gone) == 18


def test_a_follower_waits_for_the_leader_s_record_and_plans_nothing(tmp_path):
    config, catalog, store = StreamConfig(round_samples=15), MemoryCatalog(), FolderStore(tmp_path)
    catalog.add(9)
    follower = Planner(config, catalog, store, batch=BATCH, leader=False)
    assert follower.planned(Position.start(config)) is None and store.list("rounds/") == []
    planned = Planner(config, catalog, store, batch=BATCH).planned(Position.start(config))
    again = follower.planned(Position.start(config))
    assert again.record == planned.record
    assert np.array_equal(order(0, again.record, again.reservoir).refs_N2, order(0, planned.record, planned.reservoir).refs_N2)


def test_a_long_row_of_expired_shards_is_passed_in_rounds_of_no_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("streamlearn.stream.plan.ROUND_SHARDS", 10)
    config, catalog, store = StreamConfig(round_samples=15, max_replay_per_fresh=0), MemoryCatalog(), FolderStore(tmp_path)
    for _ in range(35):
        catalog.add(3)
    for key in catalog.live()[:34]:
        catalog.expire(key)
    planner, position, shards = Planner(config, catalog, store, batch=BATCH), Position.start(config), []
    while planned := planner.planned(position):
        shards.append((len(planned.record.shards), planned.record.batches))
        position = finished(planned)
    assert shards == [(10, 0), (10, 0), (10, 0), (5, 2)] and position.unseen == 34 * 3 and position.fresh == 3
