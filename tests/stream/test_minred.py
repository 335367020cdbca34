"""MinRed: what is redundant goes, whatever was made ahead, and a resumed run lets go of the same."""

import numpy as np
import pytest
import torch

from streamlearn.stream import minred
from streamlearn.stream.audit import audit
from streamlearn.stream.minred import Features, redundant
from streamlearn.stream.rounds import Round
from tests.stream.world import CONFIG, World


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def by_the_formula(features, count):
    """Of all pairs left the two nearest: of them the newer one goes; again, until `count` are gone."""
    left, gone = list(range(len(features))), []
    for _ in range(count):
        pairs = np.triu(features[left] @ features[left].T + 2, 1)
        gone.append(left.pop(int(pairs.argmax()) % len(left)))
    return sorted(gone)


@pytest.mark.parametrize("seed", range(4))
def test_what_goes_is_what_the_formula_says(seed):
    rng = np.random.default_rng(seed)
    features = unit(rng.normal(size=(60, 8)))
    assert redundant(np.ones(60, bool), features, 25).tolist() == by_the_formula(features, 25)


def test_frames_of_a_clip_go_and_single_images_stay():
    rng = np.random.default_rng(0)
    clips = np.repeat(unit(rng.normal(size=(10, 32))), 30, axis=0)
    features = unit(np.concatenate([clips, rng.normal(size=(100, 32))]) + 0.01 * rng.normal(size=(400, 32)))
    gone = redundant(np.ones(400, bool), features, 200)
    assert (gone < 300).all()
    left = np.delete(np.arange(400), gone)
    assert set((left[left < 300] // 30).tolist()) == set(range(10))  # of every clip something stays


def test_more_than_can_be_compared_at_once_are_compared_with_what_is_near(monkeypatch):
    monkeypatch.setattr(minred, "GROUP", 64)
    rng = np.random.default_rng(1)
    single = rng.normal(size=(700, 32))
    features = unit(np.concatenate([single, single[:200] + 0.01 * rng.normal(size=(200, 32))]))
    groups = minred.split(features, np.arange(900))
    assert max(map(len, groups)) <= 64 and sorted(np.concatenate(groups).tolist()) == list(range(900))
    gone = redundant(np.ones(900, bool), features, 200)
    twins = {(i, i + 700) for i in range(200)}
    hit = sum(bool({a, b} & set(gone.tolist())) for a, b in twins)
    assert hit > 180 and len(gone) == 200  # nearly every pair of twins lost one


def test_features_all_alike_can_be_split_too(monkeypatch):
    monkeypatch.setattr(minred, "GROUP", 16)
    features = np.ones((100, 4), np.float32) / 2
    assert len(redundant(np.ones(100, bool), features, 40)) == 40


def test_what_was_not_seen_is_not_judged_and_with_too_few_seen_the_oldest_go():
    rng = np.random.default_rng(2)
    features, seen = unit(rng.normal(size=(40, 4))), np.arange(40) % 2 == 0
    assert all(seen[redundant(seen, features, 10)]) and len(redundant(seen, features, 10)) == 10
    assert redundant(seen, features, 11).tolist() == list(range(11))
    assert redundant(seen, features, 0).tolist() == redundant(seen, features, -5).tolist() == []


def test_the_average_forgets_by_halves_and_waits_for_its_round():
    a, b, refs = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([[0, 0], [0, 1]])
    features = Features()
    features.observe(0, refs, np.stack([a, a]) * 3)
    features.observe(1, refs[[0, 0]], np.stack([b, b]))
    features.observe(1, refs[1:], np.array([[np.nan, 1.0]]))
    features.settle(-1, refs)
    assert not features.of(refs)[0].any()
    features.settle(0, refs)
    seen, found = features.of(refs)
    assert seen.all() and np.allclose(found, [a, a], atol=1e-3)
    again = Features.from_state(features.state_dict())
    for f in (features, again):
        f.settle(1, refs)
        once = (a + b) / np.linalg.norm(a + b)
        twice = (once + b) / np.linalg.norm(once + b)
        assert np.allclose(f.of(refs)[1], [twice, a], atol=2e-3)
    features.settle(1, refs[1:])
    assert features.of(refs)[0].tolist() == [False, True]


def world_of(home, shards=6):
    world = World(home)
    for _ in range(shards):
        world.add(12)
    return world


def look_of(batch):
    """What a learner would make of each image: a function of its pixels."""
    x = batch.crops[0].mean(0).flatten(1)
    return x[:, :48]


MINRED = {"replay": "minred", "reservoir": 30}


def learn(stream, count=10**9, into=None):
    """[(crops, state)] of so many batches, each one told back."""
    got = []
    for batch in stream.batches():
        if batch is None:
            break
        got.append((batch.crops, batch.taken(look_of(batch))))
        if len(got) == count:
            break
    return got


def equal(a, b):
    return all(torch.equal(x, y) for (x_s, _), (y_s, _) in zip(a, b, strict=True) for x, y in zip(x_s, y_s, strict=True))


@pytest.mark.parametrize("prefetch", [1, 3, 9])
def test_however_much_is_made_ahead_the_same_is_let_go(tmp_path, prefetch):
    plain = learn(world_of(tmp_path / "a").stream(**MINRED))
    world = world_of(tmp_path / "b")
    ahead = learn(world.stream(**MINRED, prefetch=prefetch))
    assert equal(plain, ahead) and len(plain) > 20
    learnt = audit(CONFIG.model_copy(update=MINRED), world.store, ahead[-1][1])
    assert len(learnt.fresh) == 72 and set(learnt.fresh.values()) == {1} and learnt.batches == len(ahead)
    rounds = [Round.from_json(world.store.get(name), name) for name in world.store.list("rounds/")]
    evicted = [r.evicted for r in rounds if r.evicted]
    assert len(ahead[-1][1]["reservoir"]["refs"]) <= 30 + 12 and all(e != tuple(range(len(e))) for e in evicted) and len(evicted) >= 3


@pytest.mark.parametrize("cut", [1, 5, 8, 14])
def test_a_resumed_run_lets_go_of_the_same_though_no_round_was_recorded_meanwhile(tmp_path, cut):
    whole = learn(world_of(tmp_path / "a").stream(**MINRED))
    world = world_of(tmp_path / "b")
    first = learn(world.stream(**MINRED), cut)
    at = first[-1][1]["round"]
    for name in world.store.list("rounds/"):  # as if it had died before they were recorded: planned anew they are the same
        if int(name[7:15]) > at:
            world.store.delete(name)
    rest = learn(world.stream(first[-1][1], cache=tmp_path / "c", **MINRED))
    assert equal(whole, first + rest)


def test_evictions_are_in_the_record_so_other_features_change_nothing_that_was_recorded(tmp_path):
    world = world_of(tmp_path)
    whole = learn(world.stream(**MINRED))
    again, stream = [], world.stream(cache=tmp_path / "c", **MINRED)
    for batch in stream.batches():
        if batch is None or len(again) == len(whole):
            break
        again.append((batch.crops, batch.taken(None)))
    assert equal(whole, again)


def test_images_that_stand_in_for_others_are_not_taken_for_them(tmp_path):
    world = World(tmp_path)
    world.add(12, spoilt={1, 4, 7})
    stream = world.stream(**MINRED, fresh_fraction=1.0)
    states = learn(stream)
    told = {tuple(divmod(int(c), 2**32)) for _, batch, _ in states[2][1]["features"]["recent"] for c in batch.tolist()}
    assert told == {(0, i) for i in range(12)} - {(0, 1), (0, 4), (0, 7)}
