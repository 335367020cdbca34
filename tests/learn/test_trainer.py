"""A step in its true order; a run that is cut and resumed is the run that was not."""

import copy
import io

import pytest
import torch

from streamlearn.learn.ema import calibrated
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import NonFinite, train
from tests.learn.world import batches, same, small_config


def through_disk(state):
    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    return torch.load(f, weights_only=True)


def run(start, end, state=None, watchers=(), **more):
    state = state or fresh_state(small_config())
    train(state, batches(start, end, **more), list(watchers))
    return state


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_a_run_cut_at_any_step_and_resumed_is_bit_equal_to_one_that_was_not(cut):
    whole = run(0, 10)
    second = fresh_state(small_config())
    second.load_state_dict(through_disk(run(0, cut).state_dict()))
    run(cut, 10, second)
    assert same(whole.state_dict(), second.state_dict()) == set()
    assert (second.step, second.images) == (10, 80)


@pytest.mark.parametrize("forgotten", ["objective", "ema", "optimizer", "policy"])
def test_forgetting_any_part_of_the_state_would_be_caught(forgotten):
    whole = run(0, 10)
    saved = through_disk(run(0, 5).state_dict())
    saved[forgotten] = through_disk(fresh_state(small_config()).state_dict())[forgotten]
    second = fresh_state(small_config())
    second.load_state_dict(saved)
    run(5, 10, second)
    assert same(whole.state_dict(), second.state_dict()) != set()


def test_the_same_seed_gives_the_same_beginning_and_touches_no_global_generator():
    before = torch.get_rng_state()
    one, two = fresh_state(small_config()), fresh_state(small_config())
    assert same(one.state_dict(), two.state_dict()) == set()
    assert torch.equal(before, torch.get_rng_state())


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    state = run(0, 5)
    before = copy.deepcopy(state.state_dict())
    train(state, batches(5, 6, spoilt={5}), [])
    after = state.state_dict()
    for part in ("model", "ema", "objective", "optimizer", "policy"):
        assert same(before[part], after[part]) == set(), part
    assert (state.step, state.bad_steps, state.bad_in_a_row) == (6, 1, 1)
    run(6, 8, state)
    assert state.bad_in_a_row == 0 and all(torch.isfinite(p).all() for p in state.model.parameters())


def test_too_many_bad_steps_in_a_row_end_with_a_remedy():
    with pytest.raises(NonFinite, match=r"3 steps in a row were not finite. Lower train.optim.lr"):
        train(run(0, 2), batches(2, 9, spoilt=set(range(2, 9))), [], max_bad=3)


def test_watchers_see_every_step_and_leave_the_state_as_it_was():
    seen = []
    watched = run(0, 6, watchers=[lambda state, step: seen.append((state.step, step.rate))])
    assert same(watched.state_dict(), run(0, 6).state_dict()) == set()
    assert [s for s, _ in seen] == [1, 2, 3, 4, 5, 6] and seen[0][1] == pytest.approx(0.5 / 3)


def test_frozen_prototypes_do_not_move_and_later_ones_do():
    start = fresh_state(small_config()).objective.prototypes.weight.detach().clone()
    assert torch.equal(run(0, 2).objective.prototypes.weight, start)
    moved = run(0, 4).objective.prototypes.weight
    assert not torch.equal(moved, start)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(6))


def test_the_average_follows_the_weights_and_its_calibration_leaves_it_alone():
    state = run(0, 6)
    before = copy.deepcopy(state.ema.model.state_dict())
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 3 + 1
    trunk = calibrated(state.ema.model.trunk, images, batch=32)
    assert same(before, state.ema.model.state_dict()) == set() and not trunk.training
    x = trunk.stem.conv(images)
    expected = torch.stack([part.mean((0, 2, 3)) for part in x.split(32)]).mean(0)
    torch.testing.assert_close(trunk.stem.bn.running_mean, expected, atol=1e-5, rtol=1e-4)
