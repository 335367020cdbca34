"""A slope test that neither a shift of the content nor a cycle of known length can fool."""

import numpy as np
import pytest

from bench.plateau import DELTA, SCENARIOS, fires, ours_fires, summary, torch_fires, true_gain
from streamlearn.contract.config import PlateauConfig
from streamlearn.learn import plateau
from streamlearn.learn.plateau import Plateau, Trend, trend

G = np.random.default_rng


def line(m, slope, noise=0.01, seed=0):
    return 3 + slope * np.arange(m) + noise * G(seed).standard_normal(m)


def of(y, **more):
    return trend(y, np.arange(len(y), dtype=float), 48, **more)


def test_without_shifts_it_is_the_least_squares_line():
    y = line(100, -0.002)
    slope, level = np.polyfit(np.arange(100) - 49.5, y, 1)
    assert of(y).gain == pytest.approx(-slope * 48 / level)
    assert of(y).shifts == ()


def test_its_doubt_is_what_the_slope_really_varies_by():
    """Over many draws of AR(1) noise: within a fifth, and never too small by more."""
    found = []
    for seed in range(300):
        shocks, x = G(seed).standard_normal(120), np.zeros(120)
        for i in range(1, 120):
            x[i] = 0.5 * x[i - 1] + shocks[i]
        found.append(of(3 + 0.01 * x))
    spread = float(np.std([f.gain for f in found]))
    assert 0.85 * spread < np.mean([f.doubt for f in found]) < 1.3 * spread


@pytest.mark.parametrize("jump", [0.3, -0.3])
def test_a_jump_of_the_content_is_seen_and_does_not_change_the_slope(jump):
    y = line(100, -0.002) + jump * (np.arange(100) >= 60)
    found = of(y, shifting=True)
    assert len(found.shifts) == 1 and abs(found.shifts[0] - 60) <= 1
    assert found.gain == pytest.approx(0.002 * 48 / y.mean(), abs=3 * found.doubt)
    assert abs(of(y).gain - found.gain) > 10 * found.doubt  # a line alone is fooled


def test_a_shift_hidden_in_the_noise_hides_no_fall():
    """The content gets harder by just what is learnt: a line alone calls it flat, mostly; with room for a jump it is not known well enough."""
    jump = 0.025 * (np.arange(100) >= 50)
    draws = [line(100, -0.006 * 3 / 48, noise=0.018, seed=seed) + jump for seed in range(50)]
    assert sum(of(y).proves_less_than(0.003) for y in draws) > 25
    allowed = [of(y, shifting=True) for y in draws]
    assert sum(found.proves_less_than(0.003) for found in allowed) <= 2
    assert sum(bool(found.shifts) for found in allowed) < 25  # hidden, that is


def test_a_cycle_of_known_length_is_taken_out():
    t = np.arange(150)
    y = line(150, -0.002) + 0.1 * np.sin(2 * np.pi * t / 70 + 1)
    assert of(y, cycle=70.0).gain == pytest.approx(0.002 * 48 / y.mean(), rel=0.1)
    assert of(y, cycle=70.0).doubt < of(y).doubt / 3


def test_what_rises_is_no_plateau():
    assert Trend(0.0, 0.001).proves_less_than(0.003)
    assert not Trend(-0.004, 0.001).proves_less_than(0.003)
    assert not Trend(0.002, 0.001).proves_less_than(0.003) and not Trend(0.0, 0.002).proves_less_than(0.003)


def test_nothing_is_judged_before_a_cycle_and_a_half_lies_in_the_window():
    y = 3 + 1e-4 * G(0).standard_normal(900)

    def first(cycle):
        window = Plateau(PlateauConfig(block_steps=1, cycle_steps=cycle))
        return next(i for i, v in enumerate(y) if window.observe(float(v), looks=2, patience=1.0)) + 1

    assert first(0) < 60 and 600 <= first(200) <= 620


def test_what_is_kept_is_bounded_and_a_state_saved_across_a_merge_goes_on_alike(monkeypatch):
    monkeypatch.setattr(plateau, "MOST", 120)
    y = [float(v) for v in 3 + 0.1 * G(1).standard_normal(3000)]
    whole, cut = Plateau(PlateauConfig(block_steps=2)), Plateau(PlateauConfig(block_steps=2))
    expected = [whole.observe(v, looks=2, patience=1.25) for v in y]
    got = [cut.observe(v, looks=2, patience=1.25) for v in y[:777]]
    again = Plateau(PlateauConfig(block_steps=2))
    again.load_state_dict(cut.state_dict())
    got += [again.observe(v, looks=2, patience=1.25) for v in y[777:]]
    assert got == expected and again.state_dict() == whole.state_dict()
    assert whole.steps == 3000 and len(whole.state_dict()["means"]) <= 120 and whole.state_dict()["merged"] > 4


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["power law, +3 % once", "power law, shifts of 5 %"])
def test_where_the_content_shifts_it_halves_neither_too_early_nor_never_and_torch_too_early(name, seed):
    found = fires(name, 0.01, seed)
    gain = true_gain(SCENARIOS[name])
    assert found["ours"] is not None and gain[found["ours"] - 1] < DELTA
    assert found["ours +probe"] is not None and gain[found["ours +probe"] - 1] < DELTA
    assert gain[found["torch 50"] - 1] >= 2 * DELTA


def test_the_bench_counts_a_halving_before_the_true_plateau_as_premature_and_none_as_missed():
    scenario = SCENARIOS["power law"]
    gain = true_gain(scenario)
    true = int(np.argmax(gain < DELTA))
    gross = int(np.argmax(gain < 2 * DELTA))
    found = [1000, gross + 100, true, true + 2, true + 5000, None]
    assert summary(scenario, found)[:3] == (3, 1, 1)
    assert summary(scenario, found)[3].split() == ["2", "5000", "5000"]


def test_the_bench_gives_torchs_scheduler_means_and_ours_every_step():
    flat = np.full(160_000, 3.0)
    assert torch_fires(flat, mean=50, patience=10) == 50 * 12  # the first is the best, then ten that are no better, then one too many
    assert ours_fires(flat, []) == 50 * 60  # 48 blocks, a look every 6, and the window has to grow by a quarter
