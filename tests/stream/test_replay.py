"""What replay draws from: uniform over the window, none too often, and the least redundant where that is asked for."""

import numpy as np
import pytest

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.object_store import FolderStore
from streamlearn.stream.keys import key
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished
from streamlearn.stream.replay import Reservoir
from streamlearn.stream.rounds import different, order
from tests.stream.catalogs import MemoryCatalog


def refs(numbers):
    numbers = np.array(numbers, np.int64)
    return np.stack([numbers, numbers], 1)


def chi2(hits, expected, share):
    """Of counts that have the variance of draws without replacement."""
    return float(((hits - expected) ** 2 / (expected * (1 - share))).sum())


def held(reservoir):
    found = reservoir.refs_N2[:, 0]
    assert len(np.unique(found)) == len(found) <= reservoir.capacity
    return found


def test_the_reservoir_is_uniform_over_everything_admitted():
    """Chi-square over many seeds: each of 60 samples is in a reservoir of 12 with probability 1/5."""
    hits = np.zeros(60)
    for seed in range(800):
        r = Reservoir(seed, 12)
        for start in range(0, 60, 7):
            r = r.admitted(refs(range(start, min(60, start + 7))))
        assert len(r) == 12
        hits[held(r)] += 1
    assert chi2(hits, 800 * 12 / 60, 0.2) < 95  # 59 degrees of freedom: 99.8 %


def rolling(seed, window=40, capacity=12, days=10, a_day=10):
    """A window over a stream: each day ten samples come, and what is older than four days expires; in the end one more is taken down."""
    r, gone = Reservoir(seed, capacity), set()
    for day in range(days):
        r = r.admitted(refs(range(a_day * day, a_day * (day + 1))))
        over = set(range(max(0, a_day * (day + 1) - window))) - gone
        gone |= over
        deleted = [(n, n) for n in over if n in set(r.refs_N2[:, 0].tolist())]
        r = r.without(deleted, alive=r.alive - len(over))
    return r


def test_over_a_rolling_window_it_is_uniform_over_what_is_left_and_stays_full():
    """After ten days 40 of 100 samples are in the window, and the reservoir holds what the deletions left of 12, evenly."""
    hits, size = np.zeros(100), 0
    for seed in range(1000):
        r = rolling(seed).admitted(refs(range(100, 110)))  # the newcomers make up for the last day's expiry
        assert len(r) == 12 and r.alive == 50 and not r.holes + r.others
        r = r.without([(n, n) for n in range(60, 70) if n in set(held(r).tolist())], alive=40)
        hits = hits + np.bincount(held(r), minlength=110)[:110] if len(hits) == 110 else np.bincount(held(r), minlength=110)
        size += len(r)
    assert not hits[:70].any() and abs(size / 1000 - 12 * 40 / 50) < 0.1
    expected = size / 40
    assert chi2(hits[70:], expected, 0.24) < 73  # 39 degrees of freedom: 99.9 %


@pytest.mark.parametrize("newcomers", [10, 60])
def test_after_half_of_the_population_has_gone_newcomers_and_survivors_are_drawn_alike(newcomers):
    """Of 40, 20 are deleted; then come fewer than went, or many more."""
    hits, size, total = np.zeros(40 + newcomers), 0, 20 + newcomers
    for seed in range(1500):
        r = Reservoir(seed, 12).admitted(refs(range(40)))
        r = r.without([(n, n) for n in range(20) if n in set(held(r).tolist())], alive=20).admitted(refs(range(40, 40 + newcomers)))
        hits += np.bincount(held(r), minlength=40 + newcomers)
        size += len(r)
    assert not hits[:20].any() and (size == 12 * 1500 or newcomers == 10)
    assert chi2(hits[20:], size / total, size / 1500 / total) < total + 4 * np.sqrt(2 * total)


@pytest.mark.parametrize("policy", ["reservoir", "fifo", "minred"])
def test_it_does_not_depend_on_how_samples_were_grouped(policy):
    start = Reservoir(3, 8, policy).admitted(refs(range(20)))
    start = start.without([tuple(ref) for ref in start.refs_N2[:3].tolist()], alive=12)
    whole, parts = start.admitted(refs(range(20, 50))), start
    for i in range(20, 50, 3):
        parts = parts.admitted(refs(range(i, min(50, i + 3))))
    assert np.array_equal(whole.refs_N2, parts.refs_N2) and (whole.alive, whole.holes, whole.others) == (
        parts.alive,
        parts.holes,
        parts.others,
    )


def test_fifo_keeps_the_newest():
    r = Reservoir(0, 5, "fifo").admitted(refs(range(4))).admitted(refs(range(4, 9)))
    assert held(r).tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("total, count", [(10, 0), (10, 3), (10, 10), (1000, 30), (64, 32)])
def test_different_numbers_are_different_and_every_one_is_drawn_alike(total, count):
    hits = np.zeros(total)
    for k in range(600):
        found = different(key("test", k), count, total)
        assert len(np.unique(found)) == count
        hits[found] += 1
    if 0 < count < total:
        assert chi2(hits, 600 * count / total, count / total) < total + 4.5 * np.sqrt(2 * total)


def walk(config, home, a_shard=12, batch=4, shards=6):
    """Rounds over shards that come one at a time; how often each sample was replayed since it was admitted, round by round."""
    catalog, position = MemoryCatalog(), Position.start(config)
    planner, replays, seen = Planner(config, catalog, FolderStore(home), batch=batch), {}, []
    for _ in range(shards):
        catalog.add(a_shard)
        while planned := planner.planned(position):
            slots = order(config.seed, planned.record, planned.reservoir)
            for ref in map(tuple, slots.refs_N2[~slots.fresh_N].tolist()):
                replays[ref] = replays.get(ref, 0) + 1
            seen.append(planned)
            position = finished(planned)
            kept = {
                tuple(ref): uses for ref, uses in zip(position.reservoir.refs_N2.tolist(), position.reservoir.uses_N.tolist(), strict=True)
            }
            assert all(replays.get(ref, 0) == uses for ref, uses in kept.items())
    return replays, seen, position


def test_no_sample_is_replayed_more_often_than_allowed(tmp_path):
    config = StreamConfig(reservoir=20, max_replays=3, max_replay_per_fresh=50.0, fresh_fraction=0.4)
    replays, seen, position = walk(config, tmp_path)
    assert max(replays.values()) == 3
    assert position.reservoir.tickets(3) < 4  # so it stopped: not by the other limit
    assert position.replay < 50 * position.fresh and {p.record.slots % 4 for p in seen} == {0}
    filled, seen, _ = walk(config, tmp_path / "filled", a_shard=10)  # 10 are no whole batches, and what fills the last one may be over
    assert sum(n - 3 for n in filled.values() if n > 3) <= 2 * sum(p.record.fresh > 0 for p in seen)
    free, _, _ = walk(config.model_copy(update={"max_replays": 0}), tmp_path / "free")
    assert max(free.values()) > 3


def test_with_a_slow_stream_each_fresh_image_has_so_many_updates(tmp_path):
    _, _, position = walk(StreamConfig(reservoir=20, max_replay_per_fresh=3.0), tmp_path)
    assert 0 <= 3 * position.fresh - position.replay < 4


def test_a_checkpoint_of_before_deletions_were_counted_goes_on(tmp_path):
    """Its table is a list of rows, its reservoir says neither what it stands for nor how often its samples were used."""
    config = StreamConfig(reservoir=15, round_samples=20, max_replay_per_fresh=0.0)
    catalog, store = MemoryCatalog(), FolderStore(tmp_path)
    for _ in range(4):
        catalog.add(10)
    position, planner = Position.start(config), Planner(config, catalog, store, batch=4)
    while planned := planner.planned(position):
        position = finished(planned)
    old = position.to_state()
    table = [[n, *position.table.get(n), "candidates/0", 10 * n + 10, 10, "", ""] for n in position.table.numbers_N.tolist()]
    del old["form"]
    old |= {"table": table, "reservoir": {"count": 40, "refs": position.reservoir.state_dict()["refs"]}}
    catalog.expire(catalog.live()[0])
    catalog.add(10)
    planned = Planner(config, catalog, store, batch=4).planned(Position.from_state(config, old))
    whole = Planner(config, catalog, FolderStore(tmp_path / "b"), batch=4).planned(position)
    assert planned.record == whole.record and planned.record.alive == 30
    assert np.array_equal(finished(planned).reservoir.refs_N2, finished(whole).reservoir.refs_N2)


def test_a_checkpoint_of_a_newer_form_or_of_another_policy_is_refused_with_the_remedy():
    config = StreamConfig()
    state = Position.start(config).to_state()
    with pytest.raises(ConfigError, match=r"form 9, this version knows up to 2.*install that one, or use a new home"):
        Position.from_state(config, state | {"form": 9})
    with pytest.raises(ConfigError, match=r"stream.replay = 'fifo': the checkpoint's samples were kept by 'reservoir'; set it back"):
        Position.from_state(config.model_copy(update={"replay": "fifo"}), state)
