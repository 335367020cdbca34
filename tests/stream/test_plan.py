"""Rounds: every sample once as fresh, the same order for ever, whatever happens around them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.contract.catalog import Changes, ShardRow
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError, Corrupt, OffsetGap
from streamlearn.contract.object_store import FolderStore
from streamlearn.stream.audit import audit
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished
from streamlearn.stream.replay import Reservoir
from streamlearn.stream.rounds import order


class GrowingCatalog:
    """The catalog's reading half, over rows that a test adds."""

    def __init__(self):
        self.rows, self.ends = [], {}

    def add(self, samples, partition=0, skip=0):
        first = self.ends.get(partition, 0) + skip
        self.ends[partition] = first + max(1, samples)
        row = ShardRow(
            key=f"shards/{partition}/{first}.tar", sha256="0" * 64, bytes=1, num_samples=samples, topic="candidates", partition=partition,
            first_offset=first, end_offset=first + max(1, samples), first_fetched_at="", last_fetched_at="", day="2026-11-21",
            committed=len(self.rows),
        )  # fmt: skip
        self.rows.append(row)

    def changes(self, after):
        return Changes(len(self.rows) - 1, self.rows[after + 1 :], [])


def walk(config, catalog, store, batch, position=None):
    """Go through rounds until there is nothing to learn; [(slots of the round, position)]."""
    planner, position, seen = Planner(config, catalog, store, batch=batch), position or Position.start(config), []
    while (planned := planner.planned(position)) is not None:
        seen.append((order(config.seed, planned.record, planned.reservoir), planned))
        position = finished(planned)
    return seen, position


CONFIG = StreamConfig(round_samples=20, reservoir=15, max_replay_per_fresh=1.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 9),
    st.floats(0.2, 1.0),
    st.integers(0, 3),
)
def test_over_any_growth_each_sample_is_fresh_exactly_once(tmp_path_factory, shards, batch, share, seed):
    config = CONFIG.model_copy(update={"fresh_fraction": share, "seed": seed})
    catalog, store = GrowingCatalog(), FolderStore(tmp_path_factory.mktemp("s"))
    position, fresh, batches = Position.start(config), Counter(), 0
    for samples, partition in shards:
        catalog.add(samples, partition)
        seen, position = walk(config, catalog, store, batch, position)
        for slots, at in seen:
            assert len(slots.refs_N2) % batch == 0 == at.record.slots % batch
            table = dict(at.table) | {s.number: s for s in at.record.shards}
            fresh.update((table[n].key, i) for (n, i), f in zip(slots.refs_N2.tolist(), slots.fresh_N.tolist(), strict=True) if f)
            batches += at.record.batches
    want = {(r.key, i) for r in catalog.rows for i in range(r.num_samples)}
    assert set(fresh) <= want and set(fresh.values()) <= {1}
    if any(r.num_samples for r in catalog.rows):
        last = max(i for i, r in enumerate(catalog.rows) if r.num_samples)
        assert {k for k in want} == set(fresh), last
    learnt = audit(config, store, position.to_state())
    assert learnt.fresh == fresh and learnt.batches == batches


def test_the_order_is_a_function_of_seed_round_and_record_alone(tmp_path):
    catalog = GrowingCatalog()
    for _ in range(6):
        catalog.add(7)
    a, _ = walk(CONFIG, catalog, FolderStore(tmp_path / "a"), 4)
    b, _ = walk(CONFIG, catalog, FolderStore(tmp_path / "b"), 4)
    c, _ = walk(CONFIG.model_copy(update={"seed": 1}), catalog, FolderStore(tmp_path / "c"), 4)
    assert all(np.array_equal(x.refs_N2, y.refs_N2) and np.array_equal(x.keys_N, y.keys_N) for (x, _), (y, _) in zip(a, b, strict=True))
    assert not np.array_equal(a[0][0].refs_N2, c[0][0].refs_N2)


def test_a_recorded_round_wins_over_a_catalog_that_has_grown(tmp_path):
    catalog, store = GrowingCatalog(), FolderStore(tmp_path)
    catalog.add(5)
    first = Planner(CONFIG, catalog, store, batch=4).planned(Position.start(CONFIG))
    for _ in range(3):
        catalog.add(5)
    again = Planner(CONFIG, catalog, store, batch=4).planned(Position.start(CONFIG))
    assert again.record == first.record and len(again.record.shards) == 1


def test_a_second_learner_on_one_home_is_found_out(tmp_path):
    catalog, store = GrowingCatalog(), FolderStore(tmp_path)
    catalog.add(5)

    class Late(FolderStore):
        def get(self, key):
            if key.startswith("rounds/"):
                from streamlearn.contract.errors import NotFound

                raise NotFound(key)  # it looked just before the other recorded
            return super().get(key)

    Planner(CONFIG, catalog, store, batch=4).planned(Position.start(CONFIG))
    with pytest.raises(Corrupt, match="another learner has recorded this round"):
        Planner(CONFIG, catalog, Late(tmp_path), batch=4).planned(Position.start(CONFIG))


def test_a_gap_between_cursor_and_shard_is_an_incident(tmp_path):
    catalog = GrowingCatalog()
    catalog.add(5)
    catalog.add(5, skip=2)
    with pytest.raises(OffsetGap, match=r"candidates/0 continues at 7 .*stands at 5"):
        walk(CONFIG, catalog, FolderStore(tmp_path), 4)


def test_another_batch_size_is_refused_with_the_remedy(tmp_path):
    catalog = GrowingCatalog()
    catalog.add(5)
    Planner(CONFIG, catalog, FolderStore(tmp_path), batch=4).planned(Position.start(CONFIG))
    with pytest.raises(ConfigError, match=r"planned for batches of 4, train.batch = 8"):
        Planner(CONFIG, catalog, FolderStore(tmp_path), batch=8).planned(Position.start(CONFIG))


def test_a_damaged_record_is_named(tmp_path):
    store = FolderStore(tmp_path)
    store.put("rounds/00000000.json", b"{")
    with pytest.raises(Corrupt, match=r"rounds/00000000.json: not a round record"):
        Planner(CONFIG, GrowingCatalog(), store, batch=4).planned(Position.start(CONFIG))


def test_with_nothing_fresh_replay_goes_on_up_to_its_limit(tmp_path):
    catalog = GrowingCatalog()
    catalog.add(16)
    seen, end = walk(CONFIG, catalog, FolderStore(tmp_path), 4)
    assert end.replay <= 1.5 * end.fresh and end.replay + 4 > 1.5 * end.fresh
    assert [p.record.fresh for _, p in seen][1:] == [0] * (len(seen) - 1) and len(seen) > 1


def test_a_position_survives_its_state(tmp_path):
    catalog = GrowingCatalog()
    for _ in range(5):
        catalog.add(9)
    seen, _ = walk(CONFIG, catalog, FolderStore(tmp_path), 4)
    for _, position in seen:
        again = Position.from_state(CONFIG, replace(position, place=1).to_state())
        assert np.array_equal(again.reservoir.refs_N2, position.reservoir.refs_N2) and again.record == position.record
        assert again.table == position.table and again.cursor == position.cursor and again.place == 1


def test_the_reservoir_is_uniform_over_everything_admitted():
    """Chi-square over many seeds: each of 60 samples is in a reservoir of 12 with probability 1/5."""
    hits = np.zeros(60)
    for seed in range(800):
        r = Reservoir(seed, 12)
        for start in range(0, 60, 7):
            block = np.arange(start, min(60, start + 7))
            r = r.admitted(np.stack([block, block], 1))
        assert len(r) == 12 and len(np.unique(r.refs_N2[:, 0])) == 12
        hits[r.refs_N2[:, 0]] += 1
    expected = 800 * 12 / 60
    chi2 = float(((hits - expected) ** 2 / (expected * 0.8)).sum())
    assert chi2 < 95  # 59 degrees of freedom: 99.8 %


def test_the_reservoir_does_not_depend_on_how_samples_were_grouped():
    block = np.stack([np.arange(50), np.arange(50)], 1)
    whole, parts = Reservoir(3, 8).admitted(block), Reservoir(3, 8)
    for i in range(0, 50, 3):
        parts = parts.admitted(block[i : i + 3])
    assert np.array_equal(whole.refs_N2, parts.refs_N2)
