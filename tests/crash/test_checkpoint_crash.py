"""The checkpoint protocol, killed at every step and damaged in every part."""

import threading

import pytest
import torch

from streamlearn.contract.errors import Corrupt
from streamlearn.contract.object_store import POINTER
from streamlearn.learn.checkpoint import Checkpoints
from tests.crash.dying import DyingStore, Killed


def state(step):
    return {"step": step, "weights": torch.full((4,), float(step)), "stream": {"cursor": {"candidates/0": step}, "refs": torch.arange(3)}}


@pytest.fixture
def store(tmp_path):
    return DyingStore(tmp_path / "store")


def save(store, step, keep=2):
    checkpoints = Checkpoints(store, keep=keep)
    checkpoints.save(state(step), step, wait=True)
    return checkpoints


STEPS = [(m, w, t) for m, w in (("put", "pt"), ("put", "latest"), ("delete", "pt")) for t in ("before", "after")]


@pytest.mark.parametrize("die_at", STEPS, ids=" ".join)
def test_killed_at_any_step_the_newest_committed_state_is_whole(store, die_at):
    for step in (1, 2, 3):
        save(store, step)
    store.die_at = die_at
    with pytest.raises(Killed):
        save(store, 4)
    store.die_at = None
    committed = die_at[0] == "delete" or die_at == ("put", "latest", "after")
    loaded = Checkpoints(store, keep=2).load()
    assert loaded["step"] == (4 if committed else 3)
    assert torch.equal(loaded["weights"], state(loaded["step"])["weights"])
    save(store, 5)
    assert Checkpoints(store, keep=2).load()["step"] == 5


def test_the_newest_k_are_kept_and_the_others_deleted(store):
    for step in range(1, 7):
        save(store, step, keep=3)
    kept = [k for k in store.list("checkpoints/") if k.endswith(".pt")]
    assert [int(k[12:24]) for k in kept] == [4, 5, 6]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_checkpoint_is_refused_with_its_reason_and_the_one_before_is_used(store, damage, caplog):
    for step in (1, 2):
        save(store, step)
    path = store.root / [k for k in store.list("checkpoints/") if k.endswith(".pt")][-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": bytes(data[: len(data) // 2]), "flipped": bytes(data), "empty": b""}[damage])
    assert Checkpoints(store, keep=2).load()["step"] == 1
    assert "checkpoint refused" in caplog.text and path.name[:12] in caplog.text


def test_when_none_is_sound_the_error_names_each_and_the_remedy(store):
    save(store, 1)
    for key in store.list("checkpoints/0"):
        (store.root / key).write_bytes(b"garbage")
    with pytest.raises(Corrupt, match=r"no sound checkpoint is left: checkpoints/0+1-.*backup"):
        Checkpoints(store, keep=2).load()


def test_a_pointer_that_is_not_json_is_named(store):
    save(store, 1)
    (store.root / POINTER).write_bytes(b"{")
    with pytest.raises(Corrupt, match=r"checkpoints/latest.json: not a checkpoint pointer"):
        Checkpoints(store, keep=2).load()


def test_a_full_store_fails_the_attempt_and_not_the_training(store):
    checkpoints = save(store, 1)
    store.full = ("pt", "latest")
    checkpoints.save(state(2), 2, wait=True)
    assert checkpoints.failures == 1 and Checkpoints(store, keep=2).load()["step"] == 1
    store.full = ()
    checkpoints.save(state(3), 3, wait=True)
    assert Checkpoints(store, keep=2).load()["step"] == 3


def test_the_state_is_copied_before_save_returns(store):
    """Training goes on while the file is written: what is written is the state of the call."""
    gate = threading.Event()
    put = store.put

    def slow(key, data):
        gate.wait(10)
        put(key, data)

    store.put = slow
    live = state(1)
    checkpoints = Checkpoints(store, keep=2)
    checkpoints.save(live, 1)
    live["weights"].fill_(99)
    live["stream"]["cursor"]["candidates/0"] = 99
    gate.set()
    checkpoints.wait()
    loaded = Checkpoints(store, keep=2).load()
    assert torch.equal(loaded["weights"], torch.ones(4)) and loaded["stream"]["cursor"] == {"candidates/0": 1}
