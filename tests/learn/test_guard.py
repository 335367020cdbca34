"""Illness is found before it is published: the learner goes back, passes the bad stretch over, and says so; a loop of that ends."""

import dataclasses
import math
import threading

import pytest
import torch
from prometheus_client import CollectorRegistry

from streamlearn.contract.durable import read_lines
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.guard import Collapsed, Guard
from streamlearn.learn.rollback import in_a_row
from streamlearn.learn.run import run_train
from tests.learn.test_run import Killed, Shelf
from tests.learn.world import PlainStream, batch, same, small_config

GOOD = {"code_entropy": 0.5, "perplexity": 0.9}
EVEN = torch.eye(8)  # unit vectors, spread as widely as eight can be


def looked(guard, loss=1.0, z=EVEN, measures=GOOD, looks=1):
    for _ in range(10 * looks):
        guard.observe(loss, z, measures if guard.due else None)
    return guard.signs


def test_each_sign_is_seen_by_itself_and_none_where_there_is_none():
    def guard():
        return Guard(100, 3)

    line = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 4), dim=1)
    assert looked(guard()) == ()
    assert looked(guard(), loss=math.log(100)) == ("loss",)
    assert looked(guard(), measures=GOOD | {"code_entropy": 0.999}) == ("codes",)
    assert looked(guard(), z=line) == ("rank",)
    assert looked(guard(), z=EVEN[:1].repeat(8, 1) + 1e-3 * EVEN) == ("spread",)
    assert looked(guard(), measures=GOOD | {"perplexity": 0.015}) == ("prototypes",)


def test_what_was_never_well_has_not_collapsed():
    guard = Guard(100, 2)
    looked(guard, loss=5.0, looks=20)
    assert guard.signs == ("loss",) and guard.ill == 0


def test_one_bad_look_is_forgiven_and_so_many_in_a_row_are_not():
    guard = Guard(100, 2)
    looked(guard)
    looked(guard, loss=5.0)
    looked(guard)
    looked(guard, loss=5.0)
    with pytest.raises(Collapsed, match="loss over the last 20 steps"):
        looked(guard, loss=5.0)


def test_a_guard_that_is_switched_off_only_says_so():
    guard = Guard(100, 0)
    looked(guard)
    looked(guard, loss=5.0, looks=9)
    assert guard.ill == 9


def test_rollbacks_are_in_a_row_until_the_learner_was_sound_for_a_while():
    assert in_a_row([[100, 200, ""]]) == 1
    assert in_a_row([[100, 200, ""], [100, 300, ""], [340, 400, ""]]) == 3
    assert in_a_row([[100, 200, ""], [100, 300, ""], [350, 400, ""]]) == 1


class World(PlainStream):
    """Four patterns to tell apart, and stretches that are not finite or hold nothing but gray."""

    nan, gray = (), ()

    def batches(self):
        patterns = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))[torch.arange(8) % 4]
        for i in range(self.place, self.end):
            if self.stop.is_set():
                return
            made = batch(i, spoil=i in self.nan)
            crops = torch.full_like(made.crops[0], 0.1) if i in self.gray else patterns + 0.1 * made.crops[0]
            yield dataclasses.replace(made, crops=(crops,))


def life(home, end, shelf=None, *, nan=(), gray=(), sources=None, **train):
    def opened(state):
        stream = World(state, 1000, threading.Event())
        stream.nan, stream.gray = nan, gray
        return stream

    known = {"checkpoint_steps": 10, "snapshot_steps": 1000, "bn_images": 8, "max_bad_steps": 3, "guard_looks": 2}
    config = small_config(**known | train, max_steps=end)
    metrics, heart = LearnerMetrics(CollectorRegistry()), Heartbeat(home, "train", period_s=0)
    store = FolderStore(home / "store")
    return run_train(config, opened, store, shelf or Shelf(), metrics, heart, stop=threading.Event(), sources=sources)


def rollbacks(home):
    return [(e["to"], e["step"], e["halved"]) for e in read_lines(home / "history" / "train.jsonl") if e.get("event") == "rollback"]


def test_a_stretch_that_is_not_finite_is_skipped_and_the_sequence_goes_on(tmp_path):
    state = life(tmp_path, 30, nan=range(14, 17))
    assert rollbacks(tmp_path) == [(10, 17, False)] and state.rollbacks[0][:2] == [10, 17]
    assert (state.step, state.stream["place"], state.skipped, state.bad_steps) == (30, 30, 7, 0)
    assert all(torch.isfinite(p).all() for p in state.model.parameters()) and state.policy.halvings == []


def test_a_collapse_is_rolled_back_past_the_checkpoints_it_has_spoilt_and_survived_at_half_the_rate(tmp_path):
    state = life(tmp_path, 80, gray=range(34, 56))
    [(to, found, halved)] = rollbacks(tmp_path)
    assert to == 30 and 50 <= found <= 60 and halved  # the checkpoints of 40 and 50 had learnt gray
    assert state.policy.halvings == [(30, 0.25)] and state.skipped == found - 30
    assert state.guard.well and state.guard.signs == () and state.step == 80


def test_a_model_that_is_suspect_is_not_published(tmp_path):
    shelf = Shelf()
    life(tmp_path, 60, shelf, gray=range(30, 80), guard_looks=0, snapshot_steps=20)
    assert sorted(shelf.exports) == [20]
    told = [e["step"] for e in read_lines(tmp_path / "history" / "train.jsonl") if e.get("event") == "snapshot_withheld"]
    assert told == [40, 60]


def test_killed_after_going_back_it_learns_what_one_that_was_not_does(tmp_path):
    whole = life(tmp_path / "a", 30, nan=range(14, 17))

    class Dies(Shelf):
        def __call__(self, export):
            raise Killed

    with pytest.raises(Killed):
        life(tmp_path / "b", 30, Dies(), nan=range(14, 17), snapshot_steps=20)
    state = life(tmp_path / "b", 30, nan=range(14, 17))
    assert same(whole.state_dict(), state.state_dict()) == set() and len(rollbacks(tmp_path / "b")) == 1


def test_a_loop_of_rollbacks_stops_with_a_diagnosis_and_leaves_a_sound_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"2 rollbacks in a row have not helped \(17 -> 10: 3 steps in a row were not finite") as e:
        life(tmp_path, 60, nan=range(14, 60), max_rollbacks=2)
    assert "train.max_rollbacks = 2" in str(e.value) and "streamlearn train lr --set" in str(e.value)
    assert [(to, halved) for to, _, halved in rollbacks(tmp_path)] == [(10, False), (10, True)]
    saved = Checkpoints(FolderStore(tmp_path / "store"), keep=3).load(sound_at=10**9)
    assert all(torch.isfinite(w).all() for w in saved["model"].values())


def test_without_any_checkpoint_there_is_nothing_to_go_back_to_and_that_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no sound checkpoint to go back to"):
        life(tmp_path, 30, nan=range(2, 9))


def test_the_last_sound_checkpoint_is_kept_however_many_suspect_ones_follow(tmp_path):
    kept = Checkpoints(FolderStore(tmp_path), keep=2)
    for step, sound in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        kept.save({"step": step}, step, wait=True, sound=sound)
    assert kept.load() == {"step": 5} and kept.load(sound_at=9) == {"step": 2}
    assert len(FolderStore(tmp_path).list("checkpoints/0")) == 3
    kept.replace({"step": 2, "again": True}, 2)
    assert kept.load() == {"step": 2, "again": True} and len(FolderStore(tmp_path).list("checkpoints/0")) == 1
