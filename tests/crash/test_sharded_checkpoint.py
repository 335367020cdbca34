"""The checkpoint of many parts, killed at every step, damaged in every part, read in every way.  Of real ranks: test_ranks_killed.py."""

import json
import threading

import pytest
import torch

from streamlearn.contract.errors import Corrupt
from streamlearn.contract.object_store import POINTER
from streamlearn.learn import sharded
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import train
from tests.crash.dying import DyingStore, Killed
from tests.learn.world import batches, same, small_config

KINDS = ("part", "rest", "json", "latest")


def state(step):
    weights = {
        "a.weight": torch.full((4, 3), float(step)),
        "a.bias": torch.tensor(step),
        "half": torch.ones(3, dtype=torch.bfloat16) * step,
    }
    optimizer = {"state": {0: {"momentum_buffer": torch.arange(5.0) + step}}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    return {"model": weights, "optimizer": optimizer, "step": step, "stream": {"cursor": {"candidates/0": step}, "refs": torch.arange(3)}}


@pytest.fixture
def store(tmp_path):
    return DyingStore(tmp_path / "store")


def save(store, step, keep=2, **more):
    checkpoints = Checkpoints(store, keep=keep, parted=True)
    checkpoints.save(state(step), step, wait=True, **more)
    return checkpoints


STEPS = [(m, k, t) for m, kinds in (("put", KINDS), ("delete", KINDS[:3])) for k in kinds for t in ("before", "after")]


@pytest.mark.parametrize("die_at", STEPS, ids=" ".join)
def test_killed_at_any_step_the_newest_committed_state_is_whole(store, die_at):
    for step in (1, 2, 3):
        save(store, step)
    store.die_at = die_at
    with pytest.raises(Killed):
        save(store, 4)
    store.die_at = None
    loaded = Checkpoints(store, keep=2).load()
    committed = die_at[0] == "delete" or die_at == ("put", "latest", "after")
    assert loaded["step"] == (4 if committed else 3)
    assert same(loaded, state(loaded["step"])) == set()
    save(store, 4)
    save(store, 5)
    assert same(Checkpoints(store, keep=2).load(), state(5)) == set()


def test_what_falls_out_of_the_newest_is_deleted_with_all_its_parts(store):
    for step in range(1, 6):
        save(store, step)
    named = {key for e in json.loads(store.get(POINTER))["checkpoints"] for key in (e["key"], *e["parts"])}
    assert set(store.list("checkpoints/")) == named | {POINTER} and len(named) == 6


def test_parts_that_two_checkpoints_share_stay_as_long_as_one_of_them(store):
    """A rollback writes the same weights again, with another word about them."""
    checkpoints = save(store, 1)
    checkpoints.replace(state(1) | {"skip_until": 7}, 1)
    loaded = Checkpoints(store, keep=2).load()
    assert loaded["skip_until"] == 7 and torch.equal(loaded["model"]["a.weight"], torch.ones(4, 3))
    assert len(json.loads(store.get(POINTER))["checkpoints"]) == 1 and len(store.list("checkpoints/0")) == 3


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_one_is_refused_with_its_reason_and_the_one_before_is_used(store, kind, damage, caplog):
    for step in (1, 2):
        save(store, step)
    path = store.root / [key for key in store.list("checkpoints/0") if key.endswith(kind)][-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(data[: len(data) // 2]) if damage == "truncated" else bytes(data))
    assert Checkpoints(store, keep=2).load()["step"] == 1
    assert "checkpoint refused" in caplog.text and path.name[:12] in caplog.text


def test_an_index_that_is_none_is_named(store):
    with pytest.raises(Corrupt, match=r"checkpoints/1.json: no index of a checkpoint"):
        sharded.load(store, "checkpoints/1.json", b'{"tensors": 3}', None)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_full_store_fails_the_attempt_and_not_the_training(store, kind):
    checkpoints = save(store, 1)
    store.full = (kind,)
    checkpoints.save(state(2), 2, wait=True)
    assert checkpoints.failures == 1 and Checkpoints(store, keep=2).load()["step"] == 1
    store.full = ()
    checkpoints.save(state(3), 3, wait=True)
    assert Checkpoints(store, keep=2).load()["step"] == 3


def test_training_goes_on_while_it_is_written_and_what_is_written_is_the_state_of_the_call(store):
    gate, put = threading.Event(), store.put

    def slow(key, data):
        gate.wait(60)
        put(key, data)

    store.put = slow
    live, checkpoints = state(1), Checkpoints(store, keep=2, parted=True)
    checkpoints.save(live, 1)
    live["model"]["a.weight"].fill_(99)
    live["stream"]["cursor"]["candidates/0"] = 99
    gate.set()
    checkpoints.wait()
    assert same(Checkpoints(store, keep=2).load(), state(1)) == set()


def test_a_large_one_is_put_in_pieces(store, monkeypatch):
    monkeypatch.setattr(sharded, "PART_BYTES", 15)
    save(store, 1)
    sizes = [len(store.get(key)) for key in store.list("checkpoints/") if key.endswith("part")]
    assert len(sizes) > 1 and sum(size < 15 for size in sizes) <= 1  # small tensors share one; only what is left over is smaller
    assert same(Checkpoints(store, keep=2).load(), state(1)) == set()


def test_a_learner_goes_on_from_it_bit_for_bit_wherever_its_tensors_are_read_into(store):
    whole, cut = fresh_state(small_config()), fresh_state(small_config())
    train(whole, batches(0, 6), [])
    train(cut, batches(0, 4), [])
    Checkpoints(store, keep=1, parted=True).save(cut.state_dict(), 4, wait=True)
    for roomy in (False, True):
        on = fresh_state(small_config())
        on.load_state_dict(Checkpoints(store, keep=1).load(room=on.room() if roomy else None))
        train(on, batches(4, 6), [])
        assert same(on.state_dict(), whole.state_dict()) == set()


def test_a_kind_of_checkpoint_can_follow_the_other(store):
    save(store, 1)
    Checkpoints(store, keep=2).save(state(2), 2, wait=True)
    save(store, 3)
    for step in (3, 2):
        loaded = Checkpoints(store, keep=2).load(sound_at=step)
        assert same(loaded, state(step)) == set()
