"""What a rollback does to the rate and to an operator's orders, and how far it goes back."""

import json
import threading

import pytest
import torch
from prometheus_client import CollectorRegistry

from streamlearn.contract.durable import read_lines
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.orders import Order, input_key, send
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.guard import sound
from streamlearn.learn.inputs import Sources
from streamlearn.learn.recorder import Recorder
from streamlearn.learn.rollback import GivenUp
from streamlearn.learn.run import Learner
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import Step
from tests.learn.test_guard import life, rollbacks
from tests.learn.test_run import Shelf
from tests.learn.world import PlainStream, same, small_config

GRAY = range(34, 56)  # found at 50 to 60, gone back from to 30


def ordered(home, step, action, value=None):
    """An order that a learner took before that step, and was killed: so the step is certain."""
    store = FolderStore(home / "store")
    number = send(store, Order(action, value, by="ann@desk"))
    told = {"step": step, "at": "", "kind": "command", "number": number, "action": action, "value": value, "by": "ann@desk", "reason": ""}
    store.put(input_key(number), json.dumps(told).encode())


def lived(home, end=80, **more):
    return life(home, end, sources=Sources(), **more)


def told(home):
    return [e for e in read_lines(home / "history" / "train.jsonl") if e.get("event") == "rollback"]


@pytest.mark.parametrize(
    ("rate", "step", "after"),
    [
        (0.5, 45, 0.25),  # the same as it was: the halving stands
        (0.1, 45, 0.05),  # lower: it stays, and was too high as well
        (5.0, 40, 0.5),  # higher: that is to blame, and not the rate that had been borne
    ],
)
def test_an_order_from_before_the_rollback_does_not_undo_it(tmp_path, rate, step, after):
    ordered(tmp_path, step, "set", rate)
    state = lived(tmp_path, gray=GRAY)
    [done] = told(tmp_path)
    assert state.policy.full == done["lr"] == after and done.get("order_undone", False) == (rate > 0.5)
    assert state.inputs["count"] == 1 and state.step == 80 and state.guard.signs == ()


def test_an_order_from_after_the_rollback_goes_before_it(tmp_path):
    lived(tmp_path, 62, gray=GRAY)
    ordered(tmp_path, 64, "set", 0.4)
    assert lived(tmp_path, gray=GRAY).policy.full == 0.4 and len(rollbacks(tmp_path)) == 1


def test_a_hold_and_a_halving_that_were_passed_over_stay_in_force_and_are_not_taken_twice(tmp_path):
    ordered(tmp_path, 45, "hold")
    ordered(tmp_path, 46, "halve")
    state = lived(tmp_path, gray=GRAY)
    assert state.policy.held and [rate for _, rate in state.policy.halvings] == [0.25, 0.125] and state.inputs["count"] == 2


def test_killed_after_a_rollback_that_settled_an_order_it_learns_what_one_that_was_not_does(tmp_path):
    for home in ("a", "b"):
        ordered(tmp_path / home, 45, "set", 0.1)
    whole = lived(tmp_path / "a", gray=GRAY)
    for end in (52, 61, 67, 80):
        state = lived(tmp_path / "b", end, gray=GRAY)
    assert same(whole.state_dict(), state.state_dict()) == set()


def test_a_rate_that_breaks_the_weights_right_before_a_checkpoint_is_undone_with_its_order(tmp_path):
    """The weights are finite, and worth nothing: going back to that checkpoint does not help, so it goes back further."""
    ordered(tmp_path, 19, "set", 1e38)
    state = lived(tmp_path, 40)
    assert rollbacks(tmp_path) == [(20, 23, False), (10, 26, False)] and told(tmp_path)[-1]["order_undone"]
    assert state.policy.full == 0.5 and sound(state) and state.skipped == 16 and state.step == 40


def test_weights_that_are_not_finite_are_neither_published_nor_gone_back_to_though_no_step_has_met_them_yet(tmp_path):
    config = small_config(checkpoint_steps=5, snapshot_steps=5, bn_images=8)
    state, stream, stop, shelf = fresh_state(config), PlainStream(None, 100), threading.Event(), Shelf()
    kept, state.step = Checkpoints(FolderStore(tmp_path), keep=3), 5
    weight = next(state.model.parameters()).data
    weight[(0,) * weight.dim()] = float("inf")
    recorder = Recorder(config, state, LearnerMetrics(CollectorRegistry()), Heartbeat(tmp_path, "train", period_s=0), stream)
    learner = Learner(config, state, stream, kept, publish=shelf, recorder=recorder, stop=stop, gallery=None)
    learner.save(state, Step(1.0, 1.0, 1.0, 0.1, True, False, torch.zeros(1, 1)))
    assert kept.load()["step"] == 5 and kept.load(sound_at=9) is None and shelf.exports == {}


@pytest.mark.parametrize("part", ["model", "ema", "objective"])
def test_a_state_with_a_value_that_is_not_finite_is_not_sound(part):
    state = fresh_state(small_config())
    assert sound(state)
    module = {"model": state.model, "ema": state.ema.model, "objective": state.objective}[part]
    weight = next(module.parameters()).data
    weight[(-1,) * weight.dim()] = float("inf")
    assert not sound(state) and state.sound


def test_where_going_back_has_not_helped_it_goes_back_further_and_never_to_a_higher_rate(tmp_path):
    with pytest.raises(GivenUp, match="3 rollbacks in a row have not helped"):
        lived(tmp_path, nan=range(24, 80), max_rollbacks=3)
    assert rollbacks(tmp_path) == [(20, 27, False), (10, 30, True), (10, 33, True)]
    assert [done["lr"] for done in told(tmp_path)] == [0.5, 0.25, 0.125]
    saved = Checkpoints(FolderStore(tmp_path / "store"), keep=3).load()
    assert saved["step"] == 10 and [r[:2] for r in saved["rollbacks"]] == [[20, 27], [10, 30], [10, 33]]
    assert all(torch.isfinite(w).all() for w in saved["model"].values())


def test_steps_that_are_passed_over_push_no_checkpoint_out(tmp_path):
    lived(tmp_path, 56, gray=GRAY, keep_checkpoints=2, checkpoint_steps=5)
    [(to, found, _)] = rollbacks(tmp_path)
    listed = json.loads(FolderStore(tmp_path / "store").get("checkpoints/latest.json"))["checkpoints"]
    assert not [e["step"] for e in listed if to < e["step"] < found and e["step"] != 56]
