"""Rounds: every sample once as fresh, the same order for ever, whatever happens around them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError, Corrupt, OffsetGap
from streamlearn.contract.object_store import FolderStore
from streamlearn.stream.audit import audit
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished
from streamlearn.stream.rounds import order
from tests.stream.catalogs import MemoryCatalog


def walk(config, catalog, store, batch, position=None):
    """Go through rounds until there is nothing to learn; [(slots of the round, position)]."""
    planner, position, seen = Planner(config, catalog, store, batch=batch), position or Position.start(config), []
    while (planned := planner.planned(position)) is not None:
        seen.append((order(config.seed, planned.record, planned.reservoir), planned))
        position = finished(planned)
    return seen, position


def named(slots, at):
    """`key#index` of each slot."""
    table = at.table.with_(at.record.shards)
    return np.array([f"{table.get(n)[0]}#{i}" for n, i in slots.refs_N2.tolist()], object)


CONFIG = StreamConfig(round_samples=20, reservoir=15, max_replay_per_fresh=1.5)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=12),
    st.integers(1, 9),
    st.floats(0.2, 1.0),
    st.integers(0, 3),
)
def test_over_any_growth_each_sample_is_fresh_exactly_once(tmp_path_factory, shards, batch, share, seed):
    config = CONFIG.model_copy(update={"fresh_fraction": share, "seed": seed})
    catalog, store = MemoryCatalog(), FolderStore(tmp_path_factory.mktemp("s"))
    position, fresh, batches = Position.start(config), Counter(), 0
    for samples, partition in shards:
        catalog.add(samples, partition)
        seen, position = walk(config, catalog, store, batch, position)
        for slots, at in seen:
            assert len(slots.refs_N2) % batch == 0 == at.record.slots % batch
            fresh.update(named(slots, at)[slots.fresh_N.nonzero()[0]].tolist())
            batches += at.record.batches
    want = {f"{r.key}#{i}" for r in catalog.rows.values() for i in range(r.num_samples)}
    assert set(fresh) == want and set(fresh.values()) <= {1}
    learnt = audit(config, store, position.to_state())
    assert {f"{k}#{i}": n for (k, i), n in learnt.fresh.items()} == fresh and learnt.batches == batches


def test_the_order_is_a_function_of_seed_round_and_record_alone(tmp_path):
    catalog = MemoryCatalog()
    for _ in range(6):
        catalog.add(7)
    a, _ = walk(CONFIG, catalog, FolderStore(tmp_path / "a"), 4)
    b, _ = walk(CONFIG, catalog, FolderStore(tmp_path / "b"), 4)
    c, _ = walk(CONFIG.model_copy(update={"seed": 1}), catalog, FolderStore(tmp_path / "c"), 4)
    assert all(np.array_equal(x.refs_N2, y.refs_N2) and np.array_equal(x.keys_N, y.keys_N) for (x, _), (y, _) in zip(a, b, strict=True))
    assert not np.array_equal(a[0][0].refs_N2, c[0][0].refs_N2)


def test_a_recorded_round_wins_over_a_catalog_that_has_grown(tmp_path):
    catalog, store = MemoryCatalog(), FolderStore(tmp_path)
    catalog.add(5)
    first = Planner(CONFIG, catalog, store, batch=4).planned(Position.start(CONFIG))
    for _ in range(3):
        catalog.add(5)
    again = Planner(CONFIG, catalog, store, batch=4).planned(Position.start(CONFIG))
    assert again.record == first.record and len(again.record.shards) == 1


def test_a_second_learner_on_one_home_is_found_out(tmp_path):
    catalog, store = MemoryCatalog(), FolderStore(tmp_path)
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
    catalog = MemoryCatalog()
    catalog.add(5)
    catalog.add(5, skip=2)
    with pytest.raises(OffsetGap, match=r"candidates/0 continues at 7 .*stands at 5"):
        walk(CONFIG, catalog, FolderStore(tmp_path), 4)


def test_another_batch_size_is_refused_with_the_remedy(tmp_path):
    catalog = MemoryCatalog()
    catalog.add(5)
    Planner(CONFIG, catalog, FolderStore(tmp_path), batch=4).planned(Position.start(CONFIG))
    with pytest.raises(ConfigError, match=r"planned for batches of 4, train.batch = 8"):
        Planner(CONFIG, catalog, FolderStore(tmp_path), batch=8).planned(Position.start(CONFIG))


def test_a_damaged_record_is_named(tmp_path):
    store = FolderStore(tmp_path)
    store.put("rounds/00000000.json", b"{")
    with pytest.raises(Corrupt, match=r"rounds/00000000.json: not a round record"):
        Planner(CONFIG, MemoryCatalog(), store, batch=4).planned(Position.start(CONFIG))


def test_with_nothing_fresh_replay_goes_on_up_to_its_limit(tmp_path):
    catalog = MemoryCatalog()
    catalog.add(16)
    seen, end = walk(CONFIG, catalog, FolderStore(tmp_path), 4)
    assert end.replay <= 1.5 * end.fresh and end.replay + 4 > 1.5 * end.fresh
    assert [p.record.fresh for _, p in seen][1:] == [0] * (len(seen) - 1) and len(seen) > 1


def test_a_position_survives_its_state(tmp_path):
    catalog = MemoryCatalog()
    for _ in range(5):
        catalog.add(9)
    seen, _ = walk(CONFIG, catalog, FolderStore(tmp_path), 4)
    for _, position in seen:
        again = Position.from_state(CONFIG, replace(position, place=1).to_state())
        assert np.array_equal(again.reservoir.refs_N2, position.reservoir.refs_N2) and again.record == position.record
        assert (
            again.table.state_dict().keys() == position.table.state_dict().keys() and again.cursor == position.cursor and again.place == 1
        )
        assert all(torch.equal(v, position.table.state_dict()[k]) for k, v in again.table.state_dict().items())
