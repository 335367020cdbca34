"""Batches: the same bytes after a resume, with any number of workers, over damaged, lost and growing shards."""

import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.stream import distort, distort_cpu, views
from streamlearn.stream.audit import audit
from streamlearn.stream.cache import read_member
from streamlearn.stream.decode import decode
from streamlearn.stream.worker import make
from tests.stream.test_views import cut
from tests.stream.world import CONFIG, World, first_spec, take


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    for count, partition in ((6, 0), (5, 1), (9, 0), (4, 1)):
        world.add(count, partition)
    return world


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True)) and torch.equal(a.fresh, b.fresh)


def test_batches_have_the_shapes_that_the_learner_asks_for(world):
    batch = take(world.stream(), 1)[0]
    assert [tuple(c.shape) for c in batch.crops] == [(2, 4, 3, 16, 16), (1, 4, 3, 8, 8)]
    assert batch.crops[0].dtype == torch.float32 and batch.fresh.dtype == torch.bool


@pytest.mark.parametrize(("cut", "augment"), [(1, "workers"), (3, "workers"), (5, "workers"), (8, "workers"), (3, "device"), (8, "device")])
def test_resumed_at_any_batch_the_next_are_equal_byte_for_byte(world, cut, augment):
    whole = take(world.stream(augment=augment), 12)
    first = take(world.stream(cache=world.home / "c1", augment=augment), cut)
    world.add(7)  # the catalog grows meanwhile: recorded rounds are not planned anew
    rest = take(world.stream(first[-1].taken(), cache=world.home / "c2", augment=augment), 12 - cut)
    assert all(equal(a, b) for a, b in zip(whole[cut:], rest, strict=True))
    assert [b.taken()["place"] for b in whole[cut:]] == [b.taken()["place"] for b in rest]


@pytest.mark.parametrize(("augment", "workers"), [("workers", 2), ("device", 1), ("device", 2)])
def test_worker_processes_make_the_same_batches_as_none(world, augment, workers):
    plain = take(world.stream(augment=augment), 8)
    stream = world.stream(workers=workers, cache=world.home / "c1", augment=augment)
    try:
        assert all(equal(a, b) for a, b in zip(plain, take(stream, 8), strict=True))
    finally:
        stream.close()


def test_workers_and_device_distort_alike(world):
    """Each rounds in its own way; the draws are the same."""
    ours, theirs = (take(world.stream(augment=a, cache=world.home / a), 4) for a in ("workers", "device"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.taken()["place"] == b.taken()["place"] and torch.equal(a.fresh, b.fresh)
        for x, y in zip(a.crops, b.crops, strict=True):
            assert x.shape == y.shape and (x - y).abs().mean() < 0.03  # of a standard deviation: under two levels of 255


@pytest.mark.parametrize("decoded_bytes", [0, 5000])
def test_who_crops_and_how_much_room_there_is_changes_no_byte_of_a_batch(world, decoded_bytes):
    """Nothing on piles, and half of the images; against all of them."""
    whole = take(world.stream(augment="device"), 8)
    other = take(world.stream(augment="device", decoded_bytes=decoded_bytes, cache=world.home / "c1"), 8)
    assert all(equal(a, b) for a, b in zip(whole, other, strict=True))


def test_the_views_of_a_batch_are_the_draws_of_its_keys(world):
    """Made again by hand, one view at a time, from the bytes that the spec points to."""
    stream = world.stream()
    item = first_spec(stream)
    batch = take(world.stream(cache=world.home / "c1"), 1)[0]
    for b, place in enumerate(item.spec.places):
        with Path(place.path).open("rb") as f:
            image = decode(read_member(f.fileno(), place.sample))
        size, k = np.array([image.shape[1::-1]]), item.spec.keys_B[b : b + 1]
        boxes, scales = views.plan(k, size, CONFIG.crops)
        drawn = distort.draw(k, range(3), CONFIG)
        for v, (crop, side) in enumerate([(batch.crops[0][0], 16), (batch.crops[0][1], 16), (batch.crops[1][0], 8)]):
            assert scales[0] == 1
            made = distort_cpu.distorted(cut(image, boxes[v, 0], side), drawn, v)
            assert torch.equal(crop[b], views.normalised(made[None], CONFIG.mean, CONFIG.std)[0])


def test_a_killed_worker_leaves_no_gap(world):
    plain = take(world.stream(), 10)
    stream, got = world.stream(workers=1, cache=world.home / "c1"), []
    for batch in stream.batches():
        got.append(batch)
        if len(got) == 3:
            for pid in list(stream.crew._pool._processes):
                os.kill(pid, signal.SIGKILL)
        if len(got) == 10:
            break
    stream.close()
    assert all(equal(a, b) for a, b in zip(plain, got, strict=True)) and stream.counters()["worker_deaths"] >= 1


def test_the_workers_end_with_the_learner(world):
    import subprocess
    import sys

    code = (
        "import sys, time; from pathlib import Path; from tests.stream.world import *\n"
        "if __name__ == '__main__':\n"
        "    w = World(Path(sys.argv[1])); s = w.stream(workers=2, cache=Path(sys.argv[1]) / 'c1')\n"
        "    take(s, 1); print('ready', flush=True); time.sleep(60)\n"
    )
    script = world.home / "child.py"
    script.write_text(code)
    child = subprocess.Popen(
        [sys.executable, str(script), str(world.home)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert child.stdout.readline() == b"ready\n"
    family = psutil.Process(child.pid).children(recursive=True)
    child.kill()
    child.wait()
    assert family
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


@pytest.mark.parametrize("augment", ["workers", "device"])
def test_a_sample_that_cannot_be_decoded_is_replaced_and_counted(tmp_path, augment):
    world = World(tmp_path)
    world.add(8, spoilt={2, 5})
    stream = world.stream(fresh_fraction=1.0, augment=augment)
    batches = take(stream, 2)
    assert sum(int(b.fresh.sum()) for b in batches) == 6 and stream.counters()["corrupt"] == 2
    assert all(torch.isfinite(c).all() for b in batches for c in b.crops)
    again = take(World(tmp_path).stream(fresh_fraction=1.0, cache=tmp_path / "c2", augment=augment), 2)
    assert all(equal(a, b) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("spoilt", [0, 2, 3])
def test_in_its_place_stands_the_next_of_the_batch_seen_by_other_draws(tmp_path, spoilt):
    world = World(tmp_path)
    world.add(4, spoilt={spoilt})
    stream = world.stream(fresh_fraction=1.0)
    item = first_spec(stream)
    samples = [place.sample.index for place in item.spec.places]
    at, places = samples.index(spoilt), list(item.spec.places)
    places[at] = places[(at + 1) % 4]
    made = []
    for spec in (item.spec, replace(item.spec, places=tuple(places))):
        out = tuple(np.full((c.count, 4, c.size, c.size, 3), len(made), np.uint8) for c in CONFIG.crops)
        sound = make(CONFIG, spec, out, paint=True)
        made.append((sound, out))
    assert [s.tolist() for s, _ in made] == [[i != at for i in range(4)], [True] * 4]
    assert all(np.array_equal(a, b) for a, b in zip(made[0][1], made[1][1], strict=True))
    assert not np.array_equal(made[0][1][0][:, at], made[0][1][0][:, (at + 1) % 4])


@pytest.mark.parametrize("augment", ["workers", "device"])
def test_a_whole_batch_of_garbage_does_not_stop_the_loop(tmp_path, augment):
    world = World(tmp_path)
    world.add(4, spoilt={0, 1, 2, 3})
    world.add(8)
    stream = world.stream(fresh_fraction=1.0, round_samples=4, augment=augment)
    batches = take(stream, 2)
    assert len(batches) == 2 and stream.counters()["corrupt"] >= 4 and stream.counters()["passed_over"] >= 1
    assert sum(int(b.fresh.sum()) for b in batches) == 8


@pytest.mark.parametrize("damage", ["vanished", "flipped", "truncated"])
def test_a_lost_shard_is_counted_and_its_slots_go_to_replay(world, damage):
    path = world.store.root / world.add(6)
    world.add(6)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    if damage == "vanished":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "flipped" else bytes(data[:3000]))
    stream = world.stream()
    batches = take(stream, 100)
    assert stream.counters()["lost"] >= 6
    assert sum(int(b.fresh.sum()) for b in batches) == 6 + 5 + 9 + 4 + 6
    assert batches[-1].taken()["cursor"]["candidates/0"] == world.ends[0]


def test_a_damaged_local_copy_is_fetched_again(world):
    whole = take(world.stream(), 3)
    for copy in (world.home / "cache").glob("*.tar"):
        copy.write_bytes(b"garbage")
    assert all(equal(a, b) for a, b in zip(whole, take(world.stream(), 3), strict=True))


def test_the_cache_stays_within_its_budget(world):
    for _ in range(10):
        world.add(6)
    one = max(p.stat().st_size for p in (world.store.root / "shards").rglob("*.tar"))
    stream = world.stream()
    stream.cache.copies.budget_bytes = 6 * one
    take(stream, 40)
    stream.close()  # nothing more is on its way
    held = sum(p.stat().st_size for p in (world.home / "cache").glob("*.tar"))
    assert held == stream.counters()["cache_bytes"] <= 6 * one


def test_everything_learnt_is_accounted_for(world):
    batches = take(world.stream(), 100)
    learnt = audit(CONFIG, world.store, batches[-1].taken())
    assert learnt.batches == len(batches) and set(learnt.fresh.values()) == {1} and len(learnt.fresh) == 24
    assert Counter(len(b.fresh) for b in batches) == {4: len(batches)}


def test_the_sample_for_calibration_is_a_function_of_the_state(world):
    batches = take(world.stream(), 9)
    a, b = world.stream(cache=world.home / "c1"), world.stream(cache=world.home / "c2")
    refs = a.sample(batches[-1].taken(), 6)
    assert refs == b.sample(batches[-1].taken(), 6) and len(refs) == 6
    assert torch.equal(a.eval_images(refs, 16), b.eval_images(refs, 16)) and a.eval_images(refs, 16).shape == (6, 3, 16, 16)
    with pytest.raises((NotFound, Corrupt)):
        a.image_bytes("nowhere.tar#0")


def side_by_side(parts):
    """The ranks' parts of each batch, put together."""
    return [tuple(torch.cat(crops, dim=1) for crops in zip(*(b.crops for b in batch), strict=True)) for batch in zip(*parts, strict=True)]


def test_stopped_on_four_ranks_and_gone_on_with_two_the_batches_are_those_of_one(world):
    whole = take(world.stream(), 12)
    other = World(world.home / "ranks")
    for count, partition in ((6, 0), (5, 1), (9, 0), (4, 1)):
        other.add(count, partition)
    four = [take(other.stream(cache=other.home / f"c{r}", rank=r, ranks=4), 7) for r in range(4)]  # the leader first: it records
    state = four[3][-1].taken()
    two = [take(other.stream(state, cache=other.home / f"d{r}", rank=r, ranks=2), 5) for r in range(2)]
    got = side_by_side(four) + side_by_side(two)
    assert len(got) == 12 and all(torch.equal(x, y) for a, b in zip(whole, got, strict=True) for x, y in zip(a.crops, b, strict=True))
    assert [len(b.fresh) for b in four[0]] == [1] * 7 and sum(int(b.fresh.sum()) for rank in [*four, *two] for b in rank) == sum(
        int(b.fresh.sum()) for b in whole
    )


def test_a_batch_that_cannot_be_shared_out_is_refused(world):
    with pytest.raises(ConfigError, match=r"train.batch = 4 cannot be shared out among 3 ranks; set it to a multiple"):
        world.stream(rank=0, ranks=3)


def test_a_rank_whose_part_is_garbage_steps_with_the_others(tmp_path):
    world = World(tmp_path)
    world.add(4, spoilt={0, 1, 2, 3})
    parts = [
        take(world.stream(fresh_fraction=1.0, max_replay_per_fresh=0.0, rank=r, ranks=2, cache=tmp_path / f"c{r}"), 1) for r in range(2)
    ]
    assert [tuple(b.crops[0].shape) for part in parts for b in part] == [(2, 2, 3, 16, 16)] * 2
    assert not any(b.fresh.any() or b.named.any() for part in parts for b in part)
