"""Warm-up once, constant, halved only on a proved plateau."""

import numpy as np
import pytest

from streamlearn.contract.config import OptimConfig, PlateauConfig
from streamlearn.learn.lr_policy import HalveOnPlateau
from streamlearn.learn.state import fresh_state
from tests.learn.world import small_config


def policy(**plateau):
    return HalveOnPlateau(OptimConfig(lr=1.0, warmup_steps=10), PlateauConfig(**plateau))


def noise(steps, level, seed, rho=0.5):
    rng = np.random.default_rng(seed)
    x, out = 0.0, np.empty(steps)
    for i in range(steps):
        x = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal()
        out[i] = 1 + level * x
    return out * np.where(rng.random(steps) < 0.002, 1.5, 1.0)  # rare spikes


def first_halving(losses, p):
    for step, loss in enumerate(losses):
        if p.observe(float(loss), step + 10):
            return step
    return None


def test_the_rate_warms_up_once_and_is_constant_then():
    p = policy()
    assert [p.rate(s) for s in (0, 4, 9, 10, 10**9)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0])


def test_a_warm_up_may_begin_at_a_share_of_the_rate():
    p = HalveOnPlateau(OptimConfig(lr=9.6, warmup_steps=8000, warmup_start=1 / 64), PlateauConfig())
    assert [p.rate(s) for s in (0, 3999, 7999, 8000)] == pytest.approx([0.15 + 9.45 / 8000, 4.875, 9.6, 9.6])


def test_a_learner_has_the_rate_of_its_own_batch():
    config = small_config()
    optim = config.train.optim.model_copy(update={"lr": 0.3, "lr_batch": 256, "warmup_steps": 0})
    state = fresh_state(config.model_copy(update={"train": config.train.model_copy(update={"optim": optim})}))
    assert state.policy.rate(0) == pytest.approx(0.3 * 8 / 256)


@pytest.mark.parametrize("level", [0.01, 0.03])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_still_falls_is_never_a_plateau(level, seed):
    steps = np.arange(12_000)
    losses = (3 + 2 * (1 + steps / 300) ** -0.5) * noise(len(steps), level, seed)
    gain = 1 - (3 + 2 * (1 + (12_000 + 2400) / 300) ** -0.5) / (3 + 2 * (1 + 12_000 / 300) ** -0.5)
    assert gain > 0.006  # there is twice delta to be had at the end
    assert first_halving(losses, policy()) is None


@pytest.mark.parametrize("seed", range(3))
def test_a_flat_loss_is_proved_to_be_a_plateau(seed):
    assert first_halving(3 * noise(20_000, 0.01, seed), policy()) is not None


def test_a_stream_that_drifts_upwards_is_not_compared_with_its_best():
    """After a shift to harder content the loss falls from a new height: torch's ReduceLROnPlateau would halve again and again."""
    steps = np.arange(9_000)
    losses = np.where(steps < 3000, 2.0 - steps / 6000, 3.0 - steps / 12000) * noise(len(steps), 0.01, 0)
    assert first_halving(losses, policy()) is None


def test_halvings_stop_at_the_floor():
    p = policy(block_steps=1, min_blocks=4, floor=0.25)
    for step in range(5000):
        p.observe(3.0 + 1e-6 * (step % 7), step + 10)
    assert [rate for _, rate in p.halvings] == [0.5, 0.25] and p.rate(10**6) == 0.25


def test_a_state_saved_in_the_middle_of_a_block_goes_on_alike():
    losses = 3 * noise(9_000, 0.01, 4)
    whole, cut = policy(), policy()
    expected = [whole.observe(float(x), i + 10) for i, x in enumerate(losses)]
    got = [cut.observe(float(x), i + 10) for i, x in enumerate(losses[:4321])]
    again = policy()
    again.load_state_dict(cut.state_dict())
    got += [again.observe(float(x), i + 4331) for i, x in enumerate(losses[4321:])]
    assert got == expected and again.state_dict() == whole.state_dict() and any(expected)
