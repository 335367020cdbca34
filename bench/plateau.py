"""Is a plateau proved when there is one, and never before?  Synthetic losses of a stream, ours beside torch's ReduceLROnPlateau.

    nice python -m bench.plateau                       # --seeds 12 --jobs 2 --only shift; half an hour of one core

A loss is (what has been learnt) x (how hard the content is) x (AR(1) noise, rho 0.5, and one step in 500 half as high again).  What has been learnt
is known without noise, so the truth is known: the plateau begins where the next horizon (2400 steps) brings less than delta = 0.3 %.  A first
halving before that is premature (gross: 0.6 % could still be had); a stream without one in 160,000 steps is missed.  The delay is counted from the
true plateau to the first halving, in steps, over the seeds that were right.

`ours` has the loss alone; `+cycle` knows the length of the cycle; `+probe` has the error on 10,000 fixed images as well, each 2,000 steps, told
1,000 steps late, with a noise of 0.3 points.  torch sees means of 50 steps with its defaults (patience 10), and of 200 steps with patience 12.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from streamlearn.contract.config import OptimConfig, PlateauConfig
from streamlearn.learn.lr_policy import HalveOnPlateau

Array = NDArray[np.float64]
STEPS, HORIZON, DELTA = 160_000, 2400, 0.003
PROBE_EVERY, PROBE_LATE, PROBE_NOISE = 2000, 1000, 0.003
NOISES = (0.01, 0.03, 0.10)


@dataclass(frozen=True)
class Scenario:
    """Losses are (3 + 2 p) x content, errors 0.3 + 0.4 p, where p falls from 1."""

    progress: Callable[[Array], Array]
    content: Callable[[np.random.Generator], Array]
    cycle: int = 0  # steps


def power(t: Array) -> Array:
    return (1 + t / 300) ** -0.5


def exponential(t: Array) -> Array:
    p: Array = np.exp(-t / 6000)
    return p


def flat(t: Array) -> Array:
    return np.zeros_like(t)


def same(g: np.random.Generator) -> Array:
    return np.ones(STEPS)


def shifts(g: np.random.Generator, *, size: float = 0.05, every: int = 20_000) -> Array:
    """The content changes for good, up to `size` easier or harder, again and again."""
    content, at = np.ones(STEPS), 0
    while (at := at + int(g.uniform(0.5, 1.5) * every)) < STEPS:
        content[at:] = 1 + g.uniform(-size, size)
    return content


def harder(g: np.random.Generator, *, size: float) -> Array:
    """Once, while the loss still falls."""
    content = np.ones(STEPS)
    content[int(g.uniform(3000, 20_000)) :] = 1 + size
    return content


def cycles(g: np.random.Generator, *, period: int, size: float = 0.02) -> Array:
    content: Array = 1 + size * np.sin(2 * np.pi * (np.arange(STEPS) / period + g.random()))
    return content


SCENARIOS = {
    "power law": Scenario(power, same),
    "exponential": Scenario(exponential, same),
    "flat from the start": Scenario(flat, same),
    "power law, shifts of 5 %": Scenario(power, shifts),
    "flat, shifts of 5 %": Scenario(flat, shifts),
    "power law, +1 % once": Scenario(power, partial(harder, size=0.01)),
    "power law, +2 % once": Scenario(power, partial(harder, size=0.02)),
    "power law, +3 % once": Scenario(power, partial(harder, size=0.03)),
    "power law, day of 2k": Scenario(power, partial(cycles, period=2000), cycle=2000),
    "power law, day of 10k": Scenario(power, partial(cycles, period=10_000), cycle=10_000),
    "power law, day of 40k": Scenario(power, partial(cycles, period=40_000), cycle=40_000),
    "flat, day of 10k": Scenario(flat, partial(cycles, period=10_000), cycle=10_000),
    "flat, day of 40k": Scenario(flat, partial(cycles, period=40_000), cycle=40_000),
}
DETECTORS = ("torch 50", "torch 200", "ours", "ours +cycle", "ours +probe")


def noise(g: np.random.Generator, level: float, rho: float = 0.5) -> Array:
    x, shocks = np.empty(STEPS), g.standard_normal(STEPS) * math.sqrt(1 - rho * rho)
    last = 0.0
    for i, shock in enumerate(shocks.tolist()):
        last = rho * last + shock
        x[i] = last
    found: Array = (1 + level * x) * np.where(g.random(STEPS) < 0.002, 1.5, 1.0)
    return found


def true_gain(scenario: Scenario) -> Array:
    """(STEPS,) relative gain of the next horizon."""
    learnt = 3 + 2 * scenario.progress(np.arange(STEPS + HORIZON, dtype=np.float64))
    gain: Array = 1 - learnt[HORIZON:] / learnt[:STEPS]
    return gain


def torch_fires(losses: Array, *, mean: int, patience: int) -> int | None:
    """The step at which torch's scheduler halves first."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience)
    for i, value in enumerate(losses.reshape(-1, mean).mean(1).tolist()):
        scheduler.step(value)
        if optimizer.param_groups[0]["lr"] < 1.0:
            return (i + 1) * mean
    return None


def ours_fires(losses: Array, errors: list[float], *, cycle: int = 0) -> int | None:
    """Likewise; `errors`: the probe's, one a snapshot, or none."""
    policy = HalveOnPlateau(OptimConfig(lr=1.0, warmup_steps=0), PlateauConfig(cycle_steps=cycle), probed=bool(errors))
    for step, loss in enumerate(losses.tolist()):
        snapshot, late = divmod(step - PROBE_LATE, PROBE_EVERY)
        if errors and late == 0 and snapshot > 0:
            policy.probe(snapshot * PROBE_EVERY, errors[snapshot])
        if policy.observe(loss, step):
            return step + 1
    return None


def fires(name: str, level: float, seed: int) -> dict[str, int | None]:
    scenario, g = SCENARIOS[name], np.random.default_rng(1000 + seed)
    p = scenario.progress(np.arange(STEPS, dtype=np.float64))
    losses = (3 + 2 * p) * scenario.content(g) * noise(g, level)
    errors = (0.3 + 0.4 * p[::PROBE_EVERY] + PROBE_NOISE * g.standard_normal(STEPS // PROBE_EVERY)).tolist()
    found = {
        "torch 50": torch_fires(losses, mean=50, patience=10),
        "torch 200": torch_fires(losses, mean=200, patience=12),
        "ours": ours_fires(losses, []),
        "ours +probe": ours_fires(losses, errors),
    }
    return found | ({"ours +cycle": ours_fires(losses, [], cycle=scenario.cycle)} if scenario.cycle else {})


def summary(scenario: Scenario, found: list[int | None]) -> tuple[int, int, int, str]:
    """Premature, of them gross, missed, and the delays in words."""
    gain = true_gain(scenario)
    true = int(np.argmax(gain < DELTA))
    fired = [f for f in found if f is not None]
    premature = [f for f in fired if gain[f - 1] >= DELTA]
    delays = sorted(f - true for f in fired if f not in premature)
    said = f"{delays[0]:6d} {delays[len(delays) // 2]:6d} {delays[-1]:6d}" if delays else "     -      -      -"
    return len(premature), sum(bool(gain[f - 1] >= 2 * DELTA) for f in premature), len(found) - len(fired), said


def report(names: list[str], chosen: range, jobs: int) -> Iterator[str]:
    totals = {detector: [0, 0, 0, 0] for detector in DETECTORS}
    yield f"{'stream':26s} {'noise':>5s}  {'detector':12s} premature (gross) missed   delay: least median most   of {len(chosen)} seeds"
    with ProcessPoolExecutor(jobs) as pool:
        for name in names:
            for level in NOISES:
                runs = list(pool.map(partial(fires, name, level), chosen))
                for detector in (d for d in DETECTORS if d in runs[0]):
                    *counts, delays = summary(SCENARIOS[name], [run[detector] for run in runs])
                    totals[detector] = [a + b for a, b in zip(totals[detector], (*counts, len(chosen)), strict=True)]
                    yield f"{name:26s} {level:5.0%}  {detector:12s} {counts[0]:9d} {counts[1]:7d} {counts[2]:6d}   {delays:>26s}"
    for detector, (premature, gross, missed, of) in totals.items():
        yield f"{'all':26s} {'':5s}  {detector:12s} {premature:9d} {gross:7d} {missed:6d}   of {of} streams"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--first", type=int, default=0, help="seed; the test was made looking at 0 to 11")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="streams whose name holds this")
    asked = parser.parse_args()
    for line in report([name for name in SCENARIOS if asked.only in name], range(asked.first, asked.first + asked.seeds), asked.jobs):
        print(line, flush=True)
