"""Whether a loss has stopped falling: a slope test on a window that grows.

Block means of the prequential loss (the loss on fresh images before the update), trimmed of spikes; the window is the newest half of everything
since the last change.  A line is fitted by least squares, and with it what a stream does to a loss besides learning:

* shifts: the content changes and the level of the loss with it.  Each place in the window is tried for a jump, and those that stand out of the
  noise (|t| > SHIFT) become part of the fit.  One more jump upwards, the likeliest there is, is allowed for without proof: a shift hidden in the
  noise would else hide the fall of the loss.
* a cycle of known length (`cycle_steps`, such as a day): a sine and a cosine; nothing is judged before CYCLES of them lie in the window.

The slope's standard error is that of noise with an autocorrelation at lag one as the residuals have it (corrected for its small-sample bias).
The loss is flat where the slope is known well enough (standard error of the gain at most delta / 2), its 95 % bound promises less than `delta`
relative gain per horizon, and it does not rise by as much either: a loss that rises says that the content drifts, not that nothing is learnt.

What no test of this loss can tell: a cycle of unknown length, longer than the window, from a loss that levels off.  lr_policy.py asks the probe.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlearn.contract.config_learn import PlateauConfig

Array = NDArray[np.float64]
LOOK_EVERY = 6  # blocks between looks
Z = 1.64  # one-sided 95 %
TRIM = 20  # one twentieth of a block's losses is cut at each end: spikes say nothing about slope
SHIFT = 4.5  # |t| of a jump that is no accident, of the largest among PLACES
SHIFTS = 6  # jumps in one fit, at most
PLACES = 64  # of the window tried for a jump
FEW = 12  # blocks: a window of fewer is too short to tell a jump from a slope
CYCLES = 1.5  # cycles in the window
MOST = 4096  # block means kept: then neighbours are merged, and a block is twice as many steps


@dataclass(frozen=True)
class Trend:
    """Of a window; relative to its mean, per horizon."""

    gain: float  # what the next horizon brings, if things go on so
    doubt: float  # its standard error
    shifts: tuple[int, ...] = ()  # blocks of the window at which the content has changed

    def proves_less_than(self, delta: float) -> bool:
        return self.doubt <= delta / 2 and self.gain + Z * self.doubt < delta and self.gain > -delta


class Plateau:
    """The window and its judgement."""

    def __init__(self, config: PlateauConfig):
        self.config = config
        self.trend: Trend | None = None  # of the last look; for the record only
        self._block: list[float] = []
        self._means: list[float] = []  # since the last change
        self._merged = 1  # blocks in one mean
        self._agreed = 0  # looks in a row that say it is flat
        self._since = 0  # means there were at the first of them

    @property
    def steps(self) -> int:
        """Losses since the last change."""
        return len(self._means) * self._merged * self.config.block_steps + len(self._block)

    @property
    def flat(self) -> bool:
        """What the last look found."""
        return self._agreed > 0

    def restart(self) -> None:
        """Something has changed: what was seen before it says nothing about what comes."""
        self._block, self._means, self._merged, self._agreed, self._since, self.trend = [], [], 1, 0, 0, None

    def observe(self, loss: float, *, looks: int, patience: float) -> bool:
        """Take one loss; True at a look at which it is proved to be flat.

        That takes agreement at `looks` looks in a row, from the first of which on the window has grown by `patience`, a factor.
        """
        self._block.append(loss)
        if len(self._block) < self.config.block_steps * self._merged:
            return False
        self._means.append(trimmed_mean(self._block))
        self._block = []
        n = len(self._means)
        if n < 2 * self.config.min_blocks or n % LOOK_EVERY:
            return False
        self.trend = self._judge()
        if self.trend is None or not self.trend.proves_less_than(self.config.delta):
            self._agreed = 0
        else:
            self._since = n if self._agreed == 0 else self._since
            self._agreed += 1
        proved = self._agreed >= looks and n >= patience * self._since
        if n >= MOST:
            self._merge()
        return proved

    def _judge(self) -> Trend | None:
        """None where the window is too short for the cycle."""
        y = np.asarray(self._means[len(self._means) // 2 :])
        size = self._merged * self.config.block_steps
        cycle = self.config.cycle_steps / size
        if len(y) < CYCLES * cycle:
            return None
        horizon = self.config.horizon_blocks / self._merged
        return trend(y, np.arange(len(y), dtype=np.float64), horizon, cycle=cycle if cycle >= 2 else 0.0, shifting=True)

    def _merge(self) -> None:
        """Halve their number.  The sequence goes on: the next mean is of twice as many steps."""
        pairs = zip(self._means[::2], self._means[1::2], strict=False)
        self._means = [(a + b) / 2 for a, b in pairs]
        self._merged *= 2
        self._since //= 2

    def state_dict(self) -> dict[str, Any]:
        names = ("block", "means", "merged", "agreed", "since")
        return {n: list(v) if isinstance(v := getattr(self, f"_{n}"), list) else v for n in names}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._block, self._means = list(saved["block"]), list(saved["means"])
        self._merged, self._agreed = int(saved.get("merged", 1)), int(saved["agreed"])  # checkpoints of version 0.1 have neither
        self._since = int(saved.get("since", len(self._means)))


def trimmed_mean(losses: Sequence[float]) -> float:
    ordered = sorted(losses)
    cut = len(ordered) // TRIM
    return math.fsum(ordered[cut : len(ordered) - cut]) / (len(ordered) - 2 * cut)


def trend(y_M: Array, at_M: Array, horizon: float, *, cycle: float = 0.0, shifting: bool = False) -> Trend:
    """The slope of y over its places `at_M`, and its standard error, per `horizon` of places and relative to y's mean; falling is gain."""
    m = len(y_M)
    columns = [np.ones(m), at_M - at_M.mean()]
    if cycle:
        columns += [f(2 * math.pi * at_M / cycle) for f in (np.sin, np.cos)]
    shifts: list[int] = []
    if shifting and m >= FEW:
        edge = max(4, m // 12)
        places = np.unique(np.linspace(edge, m - edge, min(PLACES, m - 2 * edge + 1)).astype(int))
        jumps_MP = (np.arange(m)[:, None] >= places[None]).astype(np.float64)
        while True:
            z_P, proved = _jumps(columns, y_M, jumps_MP)
            proved = proved and len(shifts) < SHIFTS
            best = int(np.abs(z_P).argmax()) if proved else int(z_P.argmax())  # the last: the one upwards that is allowed for
            columns.append(jumps_MP[:, best])
            if not proved:
                break
            shifts.append(int(places[best]))
    x = np.stack(columns, 1)
    q, r = np.linalg.qr(x)
    variance = _variance(y_M - q @ (q.T @ y_M), x.shape[1])
    inverse = np.linalg.pinv(r)
    slope, error = float(inverse[1] @ (q.T @ y_M)), math.sqrt(variance * float(inverse[1] @ inverse[1]))
    scale = horizon / max(abs(float(y_M.mean())), 1e-12)
    return Trend(-slope * scale, error * scale, tuple(sorted(shifts)))


def _jumps(columns: list[Array], y_M: Array, jumps_MP: Array) -> tuple[Array, bool]:
    """How much of the residual a jump at each place would explain, with its sign; and whether the one that explains most is no accident."""
    q = np.linalg.qr(np.stack(columns, 1))[0]
    residual = y_M - q @ (q.T @ y_M)
    rest_MP = jumps_MP - q @ (q.T @ jumps_MP)
    norms = np.sqrt((rest_MP * rest_MP).sum(0))
    known = norms < 1e-6  # the fit has it already
    rest_MP = rest_MP / np.where(known, np.inf, norms)
    z_P: Array = rest_MP.T @ residual
    best = int(np.abs(z_P).argmax())
    # the noise is what is left with it: a large jump would else pass for noise of a large autocorrelation
    deviation = math.sqrt(_variance(residual - z_P[best] * rest_MP[:, best], len(columns) + 1))
    return z_P, bool(abs(z_P[best]) > SHIFT * deviation)


def _variance(residual: Array, fitted: int) -> float:
    """The long-run variance of a residual as AR(1) noise has it, which is what a slope's standard error takes."""
    m = len(residual)
    limit = 3 * 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    residual = np.clip(residual, -limit, limit)
    power = float(residual @ residual)
    if power <= 0:
        return 0.0
    rho = max(0.0, float(residual[1:] @ residual[:-1]) / power)
    rho = min(rho + (1 + 3 * rho) / m * fitted / 2, 0.98)  # an estimate from m residuals of a fit is low by about so much
    return power / max(1, m - fitted) * (1 + rho) / (1 - rho)
