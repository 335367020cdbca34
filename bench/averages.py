"""Averages of the weights on a model whose loss is known exactly: constant horizons, growing ones, and what a change of the rate does to them.

    python -m bench.averages                    under a minute on one core

The noisy quadratic (Zhang et al., arXiv:1907.04164): D directions of curvature 1 / i^1.1, gradients with noise of variance proportional to it, so
that the expected loss of the weights and of any average of them follows from three moments a direction, without chance.  The rate is the
learner's own policy's, constant and halved where the table says so, or annealed at the end; the growing average is the learner's own (learn/ema.py).
Beside them, the best cosine that knew when it would be stopped, among PEAKS.  Losses are over the least one that there is, zero.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
from torch import nn

from streamlearn.contract.config import OptimConfig, PlateauConfig
from streamlearn.learn.ema import Ema
from streamlearn.learn.lr_policy import HalveOnPlateau

D = 400
CURVATURE = np.arange(1, D + 1.0) ** -1.1
START = np.arange(1, D + 1.0) ** -0.2
NOISE = 0.05
RATE = 1.0
PEAKS = (0.25, 0.5, 1.0)
STOPS = (3_000, 6_000, 12_000, 13_000, 15_000, 24_000, 25_000, 48_000)
HALVED = (12_000, 24_000)
Decay = Callable[[int, int], float]  # of a step, where the rate stands since a step


class Quadratic:
    """Expected squares of the weights' error d, of the average's error e, and of their product."""

    def __init__(self, averages: int = 0) -> None:
        self.dd = START**2
        self.de, self.ee = np.tile(START**2, (averages, 1)), np.tile(START**2, (averages, 1))

    def step(self, rate: float, decays_A: np.ndarray) -> None:
        a, b = 1 - rate * CURVATURE, decays_A[:, None]
        dd = a * a * self.dd + rate * rate * NOISE * CURVATURE
        cross = a * self.de
        self.ee = b * b * self.ee + 2 * b * (1 - b) * cross + (1 - b) ** 2 * dd
        self.de = b * cross + (1 - b) * dd
        self.dd = dd

    @property
    def losses(self) -> list[float]:
        """The weights', then each average's."""
        return [float(0.5 * (CURVATURE * x).sum()) for x in (self.dd, *self.ee)]


def learner_s(share: float, *, least: float = 0.999, most: float = 0.9999, restarts: bool = True) -> Decay:
    ema = Ema(nn.Identity(), least, share, most)
    return lambda step, since: ema.decay_at(step, since if restarts else 0)


AVERAGES: dict[str, Decay] = {
    "0.999": learner_s(0.0),
    "0.9999": learner_s(0.0, least=0.9999),
    "share 0.02": learner_s(0.02),
    "share 0.05": learner_s(0.05),
    "share 0.1": learner_s(0.1),
    "0.05, no restart": learner_s(0.05, restarts=False),
    "0.05, from bare": learner_s(0.05, least=0.0),  # a change of the rate throws away what was averaged
}


def policy() -> HalveOnPlateau:
    return HalveOnPlateau(OptimConfig(lr=RATE, warmup_steps=0), PlateauConfig())


def lived(stops: tuple[int, ...], halved: tuple[int, ...] = (), anneal: float = 0.0) -> dict[int, list[float]]:
    """Stop -> losses.  `anneal`: the last part of the one stop, linear to zero."""
    rate, model, found = policy(), Quadratic(len(AVERAGES)), {}
    if anneal:
        [stop] = stops
        rate_at = stop - round(anneal * stop)
    for step in range(max(stops)):
        if step in halved:
            rate.command("halve", None, step)
        if anneal and step == rate_at:
            rate.anneal = (step, stop - step)
        since = rate.steady_since
        model.step(rate.rate(step), np.array([decay(step, since) for decay in AVERAGES.values()]))
        if step + 1 in stops:
            found[step + 1] = model.losses
    return found


def best_cosine(stop: int) -> float:
    losses = []
    for peak in PEAKS:
        model = Quadratic()
        for step in range(stop):
            model.step(peak * 0.5 * (1 + math.cos(math.pi * step / stop)), np.empty(0))
        losses.append(model.losses[0])
    return min(losses)


def main(args: argparse.Namespace) -> None:
    stops = tuple(s for s in STOPS if s <= args.most)
    cosine = {stop: best_cosine(stop) for stop in stops}
    runs = {
        "constant": lived(stops),
        f"halved at {' and '.join(map(str, HALVED))}": lived(stops, HALVED),
        "constant, the last tenth annealed": {stop: lived((stop,), anneal=0.1)[stop] for stop in stops},
    }
    print("loss x 1000; the best cosine is one for each stop\n")
    print(f"{'stop':>8}{'cosine':>10}{'weights':>10}" + "".join(f"{name:>18}" for name in AVERAGES))
    for name, found in runs.items():
        print(name)
        for stop in stops:
            print(
                f"{stop:>8}{1000 * cosine[stop]:>10.2f}{1000 * found[stop][0]:>10.2f}"
                + "".join(f"{1000 * x:>18.2f}" for x in found[stop][1:])
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=48_000, help="the last stop")
    main(parser.parse_args())
