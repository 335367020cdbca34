"""The learning rate of a stream that never ends: warm-up once, constant, halved when a plateau is proved.

SEER (arXiv:2103.01988, section 3) divides its rate by 2 when the loss stops falling; it names no test.  This is a growing-window slope
test: block means of the prequential loss (the loss on fresh images before the update); the window is the newest half of everything
since the last change; ordinary least squares, the slope's standard error inflated for the residuals' lag-one autocorrelation.
The rate is halved when the slope is known well enough (standard error of the gain at most delta / 2) and even its 95 % upper
bound promises less than `delta` relative gain per horizon, on `looks` looks in a row.  Never against an all-time best: streams drift
upwards.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from streamlearn.contract.config import OptimConfig, PlateauConfig

LOOK_EVERY = 6  # blocks between looks
Z = 1.64  # one-sided 95 %
TRIM = 20  # one twentieth of a block's losses is cut at each end: spikes say nothing about slope


class LrPolicy(Protocol):
    """A rate for every step; never told a total."""

    def rate(self, step: int, /) -> float: ...
    def observe(self, loss: float, step: int, /) -> bool:
        """Take the prequential loss of a step; True if the rate changes from the next step on."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any], /) -> None: ...


class HalveOnPlateau:
    def __init__(self, optim: OptimConfig, plateau: PlateauConfig):
        self.optim, self.config = optim, plateau
        self.halvings: list[tuple[int, float]] = []  # (step, rate from then on)
        self._block: list[float] = []
        self._means: list[float] = []  # since the last change
        self._agreed = 0

    def rate(self, step: int) -> float:
        """Of the update that takes the learner from `step` to `step` + 1."""
        warm = min(1.0, (step + 1) / self.optim.warmup_steps) if self.optim.warmup_steps else 1.0
        warm = self.optim.warmup_start + (1 - self.optim.warmup_start) * warm
        return self.optim.lr * warm * 0.5 ** len(self.halvings)

    @property
    def at_floor(self) -> bool:
        return 0.5 ** (len(self.halvings) + 1) < self.config.floor

    def observe(self, loss: float, step: int) -> bool:
        if step < self.optim.warmup_steps:
            return False  # the loss of a warm-up says nothing about a plateau
        self._block.append(loss)
        if len(self._block) < self.config.block_steps:
            return False
        ordered = sorted(self._block)
        cut = len(ordered) // TRIM
        self._means.append(math.fsum(ordered[cut : len(ordered) - cut]) / (len(ordered) - 2 * cut))
        self._block = []
        if len(self._means) < 2 * self.config.min_blocks or len(self._means) % LOOK_EVERY:
            return False
        self._agreed = self._agreed + 1 if self._flat() else 0
        if self._agreed < self.config.looks or self.at_floor:
            return False
        self._means, self._agreed = [], 0
        self.halvings.append((step + 1, self.optim.lr * 0.5 ** (len(self.halvings) + 1)))
        return True

    def _flat(self) -> bool:
        """Whether the gain of the next horizon is proved to be under delta."""
        y = np.asarray(self._means[len(self._means) // 2 :])
        m = len(y)
        t = np.arange(m) - (m - 1) / 2
        spread = float((t * t).sum())
        slope = float((t * y).sum()) / spread
        residual = y - y.mean() - slope * t
        limit = 3 * 1.4826 * float(np.median(np.abs(residual)))
        residual = np.clip(residual, -limit, limit)
        power = float((residual * residual).sum())
        rho = max(0.0, float((residual[1:] * residual[:-1]).sum()) / power) if power > 0 else 0.0
        error = math.sqrt(power / (m - 2) / spread * (1 + rho) / (1 - min(rho, 0.9)))
        scale = self.config.horizon_blocks / abs(float(y.mean()))
        gain, doubt = -slope * scale, error * scale
        return doubt <= self.config.delta / 2 and gain + Z * doubt < self.config.delta

    def state_dict(self) -> dict[str, Any]:
        return {
            "halvings": [list(h) for h in self.halvings],
            "block": list(self._block),
            "means": list(self._means),
            "agreed": self._agreed,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.halvings = [(int(step), float(rate)) for step, rate in saved["halvings"]]
        self._block, self._means, self._agreed = list(saved["block"]), list(saved["means"]), int(saved["agreed"])
