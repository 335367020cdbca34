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
    losses = 3 * noise(14_000, 0.01, 4)
    whole, cut = policy(), policy()
    expected = [whole.observe(float(x), i + 10) for i, x in enumerate(losses)]
    got = [cut.observe(float(x), i + 10) for i, x in enumerate(losses[:4321])]
    again = policy()
    again.load_state_dict(cut.state_dict())
    got += [again.observe(float(x), i + 4331) for i, x in enumerate(losses[4321:])]
    assert got == expected and again.state_dict() == whole.state_dict() and any(expected)


def flat_until_proved(p, start=0, seed=0, limit=20_000):
    """Steps until the loss is proved flat: the rate is halved, or something is waited for."""
    for i, x in enumerate(3 * noise(limit, 0.003, seed)):
        if p.observe(float(x), start + i) or p.waits:
            return start + i
    raise AssertionError("never")


def probed(**plateau):
    return HalveOnPlateau(OptimConfig(lr=1.0, warmup_steps=0), PlateauConfig(**plateau), probed=True)


def test_a_probe_that_still_improves_vetoes_a_loss_that_is_flat():
    p = probed()
    for i in range(20):
        p.probe(100 + 100 * i, 0.5 - 0.004 * i)
    step = flat_until_proved(p)
    assert p.halvings == [] and p.waits == "probe" and [e["event"] for e in p.told()] == ["plateau"]
    for i in range(60):
        p.probe(3000 + 100 * i, 0.42)
    while not p.halvings:
        p.observe(3.0, step := step + 1)
    assert p.waits == "" and p.rate(step + 1) == 0.5
    assert [e["event"] for e in p.told()] == ["halved"]


def test_without_a_word_of_the_probe_nothing_is_halved_and_that_is_said_once():
    p = probed()
    flat_until_proved(p)
    for step in range(20_000, 30_000):
        p.observe(3.0 + 0.001 * (step % 3), step)
    assert p.halvings == [] and p.waits == "probe" and len(p.told()) == 1


def test_a_probe_of_before_the_last_halving_says_nothing_about_the_rate_of_now():
    p = probed()
    for i in range(20):
        p.probe(300 + i, 0.5)
    assert p.confirmed()
    p.command("halve", None, 500)
    for i in range(20):
        p.probe(400 + i, 0.5)
    assert p.probe_trend() is None
    for i in range(20):
        p.probe(600 + i, 0.5)
        p.probe(600 + i, 0.9)  # the same snapshot again: the first word stands
    assert p.confirmed() and len(p.probes) == 20


def test_results_of_the_probe_may_come_in_any_order():
    one, two = probed(), probed()
    results = [(100 * i, 0.5 - 0.001 * i) for i in range(1, 30)]
    for step, error in results:
        one.probe(step, error)
    for step, error in reversed(results):
        two.probe(step, error)
    assert one.state_dict() == two.state_dict() and not one.confirmed()


def test_at_the_floor_a_plateau_is_said_once_and_changes_nothing():
    p = policy(block_steps=1, min_blocks=4, floor=0.5)
    for step in range(3000):
        p.observe(3.0 + 1e-6 * (step % 7), step + 10)
    events = p.told()
    assert [e["event"] for e in events] == ["halved", "plateau"] and events[1]["waits"] == "floor" == p.waits
    assert p.rate(5000) == 0.5


def test_a_held_rate_is_halved_by_no_plateau_until_it_is_released():
    p = policy(block_steps=1, min_blocks=4)
    p.command("hold", None, 20)
    for step in range(20, 500):
        p.observe(3.0 + 1e-6 * (step % 7), step)
    assert p.rate(500) == 1.0 and p.waits == "hold"
    p.command("release", None, 500)
    step = 500
    while not p.observe(3.0 + 1e-6 * (step % 7), step):
        step += 1
    assert p.rate(step + 1) == 0.5 and step < 600 and p.waits == ""


def test_an_operator_halves_below_the_floor_and_sets_any_rate():
    p = policy(floor=1.0)
    p.command("halve", None, 100)
    assert (p.rate(100), p.halvings) == (0.5, [(100, 0.5)])
    p.command("set", 0.7, 200)
    p.command("halve", None, 300)
    assert p.rate(300) == 0.35 and p.halvings == [(100, 0.5), (300, 0.35)]
    assert [e["event"] for e in p.told()] == ["halved", "lr_set", "halved"]


@pytest.mark.parametrize("what", ["halve", "set", "restart", "lr", "made_of"])
def test_the_window_begins_anew_with_another_rate_content_or_configuration(what):
    p = HalveOnPlateau(OptimConfig(lr=1.0, warmup_steps=0), PlateauConfig(), made_of="a")
    for step in range(2000):
        p.observe(3.0 + 0.1 * (step % 2), step)
    assert p.loss.steps == 2000
    saved = p.state_dict()
    if what == "restart":
        p.restart(2000, "a generation was cut")
    elif what in ("halve", "set"):
        p.command(what, 0.8 if what == "set" else None, 2000)
    else:
        p = HalveOnPlateau(
            OptimConfig(lr=0.9 if what == "lr" else 1.0, warmup_steps=0), PlateauConfig(), made_of="b" if what == "made_of" else "a"
        )
        p.load_state_dict(saved)
        p.reconfigured(saved, 2000)
    assert p.loss.steps == 0 and len(p.told()) == 1
    assert p.rate(2000) == {"halve": 0.5, "set": 0.8, "lr": 0.9}.get(what, 1.0)


def test_the_same_configuration_leaves_the_window_as_it_is():
    p = policy()
    for step in range(2000):
        p.observe(3.0, step + 10)
    again = policy()
    again.load_state_dict(p.state_dict())
    again.reconfigured(p.state_dict(), 2010)
    assert again.state_dict() == p.state_dict() and again.told() == []


def test_another_rate_in_the_configuration_keeps_the_halvings_and_ends_what_was_set():
    p = policy()
    p.command("halve", None, 50)
    p.command("set", 0.1, 60)
    again = HalveOnPlateau(OptimConfig(lr=2.0, warmup_steps=10), PlateauConfig())
    again.load_state_dict(p.state_dict())
    again.reconfigured(p.state_dict(), 70)
    assert again.rate(70) == 1.0


def test_a_checkpoint_of_version_0_1_is_taken_up():
    p = policy()
    saved = {"halvings": [[900, 0.5]], "block": [3.0] * 7, "means": [3.0] * 11, "agreed": 0}
    p.load_state_dict(saved)
    p.reconfigured(saved, 1500)
    assert p.rate(1500) == 0.5 and p.loss.steps == 11 * 50 + 7 and p.told() == []


def test_an_annealed_branch_falls_linearly_to_zero_and_proves_no_plateau():
    p = policy(block_steps=1, min_blocks=4)
    p.command("halve", None, 20)
    p.anneal = (100, 50)
    assert [p.rate(s) for s in (99, 100, 125, 149, 150, 10**6)] == pytest.approx([0.5, 0.5, 0.25, 0.01, 0.0, 0.0])
    assert not any(p.observe(3.0, step) for step in range(100, 400))
    again = policy()
    again.load_state_dict(p.state_dict())
    assert again.rate(125) == pytest.approx(0.25)
