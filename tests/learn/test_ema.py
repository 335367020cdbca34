"""The published average: its weights against closed forms and a loop, and when its horizon begins anew."""

import math

import pytest
import torch
from torch import nn

from streamlearn.contract.config import OptimConfig, PlateauConfig
from streamlearn.learn.ema import Ema, calibrated
from streamlearn.learn.lr_policy import HalveOnPlateau
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import train
from tests.learn.test_trainer import through_disk
from tests.learn.world import batches, same, small_config


class Iterate(nn.Module):
    """Its weights are the unit vector of the step, so an average of them is the weights of the average."""

    def __init__(self, steps):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(steps + 1, dtype=torch.float64))
        self.move(0)

    def move(self, to):
        with torch.no_grad():
            self.at.zero_()[to] = 1


def weights(steps, ema_of, since=lambda step: 0):
    """(steps + 1,) what each iterate counts for in the average after so many updates; the first is the beginning."""
    model = Iterate(steps)
    ema = ema_of(model)
    for step in range(steps):
        model.move(step + 1)
        ema.update(model, step, since(step))
    return ema.model.at.detach()


def by_a_loop(steps, decay_of):
    """The same from the decays alone."""
    found = [1.0] + [0.0] * steps
    for step in range(steps):
        decay = decay_of(step)
        found = [decay * w for w in found]
        found[step + 1] += 1 - decay
    return torch.tensor(found, dtype=torch.float64)


def test_a_growing_horizon_is_polynomial_decay_averaging():
    """Shamir and Zhang's weights are binomials: with a share of 1 / k, C(s - 1, k - 1) / C(t, k) of iterate s after t."""
    t, k = 300, 10
    found = weights(t, lambda m: Ema(m, 0.0, 1 / k, 1.0))
    closed = torch.tensor([0.0] + [math.comb(s - 1, k - 1) / math.comb(t, k) for s in range(1, t + 1)], dtype=torch.float64)
    torch.testing.assert_close(found, closed, rtol=1e-9, atol=1e-15)
    age = float((found * (t - torch.arange(t + 1))).sum())
    assert age == pytest.approx((t - k) / (k + 1), rel=1e-9)  # always the same part of t


def test_the_horizon_stays_between_its_bounds_and_the_random_beginning_is_forgotten():
    def decay(step):
        return min(max(0.9, min(0.975, 1 - 1 / max(1.0, 0.1 * (step + 1)))), (1 + step) / (10 + step))

    found = weights(600, lambda m: Ema(m, 0.9, 0.1, 0.975))
    torch.testing.assert_close(found, by_a_loop(600, decay), rtol=1e-9, atol=1e-15)
    ema = Ema(Iterate(1), 0.9, 0.1, 0.975)
    assert ema.decay_at(0) == pytest.approx(0.1) and ema.decay_at(90) == pytest.approx(0.9)  # warmed up, then at its least
    assert ema.decay_at(199) == pytest.approx(0.95) and ema.decay_at(10**6) == 0.975 and found[0] < 1e-9


def test_without_a_share_the_decay_is_constant():
    found = weights(400, lambda m: Ema(m, 0.98))
    torch.testing.assert_close(found, by_a_loop(400, lambda s: min(0.98, (1 + s) / (10 + s))), rtol=1e-9, atol=1e-15)
    assert Ema(Iterate(1), 0.99995, 0.05, 0.9999).decay_at(10**7) == 0.99995  # a bound below the least does not lower it


def test_when_the_rate_changes_the_horizon_begins_anew_and_the_average_is_not_thrown_away():
    t, changed = 400, 300
    found = weights(t, lambda m: Ema(m, 0.9, 0.1, 1.0), since=lambda step: changed if step >= changed else 0)
    before = weights(changed, lambda m: Ema(m, 0.9, 0.1, 1.0))
    kept = 0.9 ** (t - changed)  # the horizon is at its least, ten updates, until a hundred have gone by
    torch.testing.assert_close(found[: changed + 1], before * kept, rtol=1e-9, atol=1e-15)
    assert float(found[changed + 1 :].sum()) == pytest.approx(1 - kept)
    later = Ema(Iterate(1), 0.9, 0.1, 1.0)
    assert later.decay_at(changed, changed) == 0.9 and later.decay_at(changed + 199, changed) == pytest.approx(0.95)


def policy(**more):
    return HalveOnPlateau(OptimConfig(lr=1.0, warmup_steps=30, **more), PlateauConfig())


def test_halvings_orders_retreats_and_another_configuration_let_it_begin_anew_and_nothing_else_does():
    one = policy()
    assert one.steady_since == 30  # the end of the warm-up
    one.restart(50, "refresh")
    one.command("hold", None, 60)
    one.command("release", None, 70)
    assert one.steady_since == 30
    one.command("halve", None, 80)
    assert one.steady_since == 80
    one.command("set", 0.2, 90)
    assert one.steady_since == 90
    one.retreat(95, at_most=0.2, halve=False)  # after a rollback for which the rate is not to blame
    assert one.steady_since == 90
    one.retreat(100, at_most=0.2, halve=True)
    assert one.steady_since == 100
    saved = one.state_dict()
    other = HalveOnPlateau(OptimConfig(lr=2.0, warmup_steps=30), PlateauConfig())
    other.load_state_dict(saved)
    assert other.steady_since == 100
    other.reconfigured(saved, 120)
    assert other.steady_since == 120


def test_a_plateau_that_is_proved_lets_it_begin_anew_and_so_does_an_annealed_branch():
    flat = HalveOnPlateau(OptimConfig(lr=1.0, warmup_steps=0), PlateauConfig(block_steps=1, min_blocks=4, horizon_blocks=4))
    [at] = [step + 1 for step in range(60) if flat.observe(2.0, step)][:1]
    assert flat.halvings[0][0] == at and flat.steady_since == flat.halvings[-1][0]
    branch = policy()
    branch.anneal = (500, 50)
    assert branch.steady_since == 500


def small():
    config = small_config(ema_share=0.2)
    return config.model_copy(update={"train": config.train.model_copy(update={"ema_decay": 0.5})})


ORDER = 16  # the step before which the rate is halved


def run(start, end, state=None):
    state = state or fresh_state(small())
    train(state, batches(start, min(end, ORDER)), [])
    if start <= ORDER < end:
        state.policy.command("halve", None, ORDER)
    train(state, batches(max(start, ORDER), end), [])
    return state


def test_the_learner_s_average_follows_the_policy_and_a_resumed_one_goes_on_bit_for_bit():
    whole = run(0, 22)
    assert whole.policy.changed_at == ORDER
    for cut in (14, 19):
        second = fresh_state(small())
        second.load_state_dict(through_disk(run(0, cut).state_dict()))
        assert same(whole.state_dict(), run(cut, 22, second).state_dict()) == set()
    unchanged = run(0, ORDER)
    unchanged.policy.base = 0.25  # the same rate from there on, of which the horizon knows nothing
    train(unchanged, batches(ORDER, 22), [])
    different = same(whole.state_dict(), unchanged.state_dict())
    assert any(path.startswith(".ema") for path in different) and not any(path.startswith(".model") for path in different)


def test_a_trunk_without_batchnorm_is_calibrated_without_looking_at_an_image():
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    found = calibrated(trunk, torch.empty(0, 3, 8, 8))
    assert not found.training and trunk.training and same(found.state_dict(), trunk.state_dict()) == set()
