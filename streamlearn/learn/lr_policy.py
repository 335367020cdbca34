"""The learning rate of a stream that never ends: warm-up once, constant, halved when a plateau is proved.

SEER (arXiv:2103.01988, section 3) divides its rate by 2 when the loss stops falling; it names no test.  Here that takes

1. a loss that is proved to be flat (plateau.py), and
2. where a bank is configured, a probe that is proved to be flat too: the error on fixed, labelled images, over the snapshots since the last
   change.  The content of the stream cannot fool it.  It is waited for as long as it takes, and that is said.

Without a probe the loss must stay flat while the window grows by PATIENCE: cycles of the content pass for plateaus while they are longer than the
window, so a longer window is the only other witness.

The window restarts when the rate changes, when a generation is cut (refresh), when the drift watch finds that a source has changed, and when a run
goes on with another configuration of what the loss is made of.  At the floor nothing is halved any more; that is an alert, not an end.
An operator's word goes before all of it: `streamlearn train lr` (inputs.py).  Never against an all-time best: streams drift upwards.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from streamlearn.contract.config import OptimConfig, PlateauConfig
from streamlearn.learn.plateau import Plateau, Trend, trend

PATIENCE = 1.25  # growth of a window without a probe
MIN_PROBES = 6  # snapshots in the window before the probe is judged
MOST_PROBES = 400  # kept: then every other is forgotten


class LrPolicy(Protocol):
    """A rate for every step; never told a total."""

    def rate(self, step: int, /) -> float: ...
    def observe(self, loss: float, step: int, /) -> bool:
        """Take the prequential loss of a step; True if the rate changes from the next step on."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any], /) -> None: ...


class HalveOnPlateau:
    def __init__(self, optim: OptimConfig, plateau: PlateauConfig, *, probed: bool = False, made_of: str = ""):
        """`probed`: a probe will be told of, and is waited for.  `made_of`: a digest of what the loss is made of."""
        self.optim, self.config, self.probed, self.made_of = optim, plateau, probed, made_of
        self.base = optim.lr  # the rate after warm-up and before `halved`
        self.halved = 0  # since `base` was set
        self.halvings: list[tuple[int, float]] = []  # (step, rate from then on): all there ever were
        self.held = False  # by an operator
        self.anneal: tuple[int, int] | None = None  # (first step, number of them): linear to zero; only on a branch
        self.loss = Plateau(plateau)
        self.probes: list[tuple[int, float]] = []  # (step, error) since the last change of the rate
        self.changed_at = 0  # step of that
        self.waits = ""  # "", or why a plateau of the loss that is proved does not halve the rate: probe, floor, hold
        self._events: list[dict[str, Any]] = []  # not yet told; a kill may lose them, the state it cannot

    def rate(self, step: int) -> float:
        """Of the update that takes the learner from `step` to `step` + 1."""
        warm = min(1.0, (step + 1) / self.optim.warmup_steps) if self.optim.warmup_steps else 1.0
        warm = self.optim.warmup_start + (1 - self.optim.warmup_start) * warm
        rate = self.base * warm * 0.5**self.halved
        if self.anneal is None:
            return rate
        first, steps = self.anneal
        return rate * min(1.0, max(0.0, 1 - (step - first) / steps))

    @property
    def steady_since(self) -> int:
        """The step from which on the rate has been what it is: while it warms up, or falls on a branch, the end or the beginning of that."""
        first = self.anneal[0] if self.anneal is not None else 0
        return max(self.changed_at, self.optim.warmup_steps, first)

    @property
    def at_floor(self) -> bool:
        return self.base * 0.5 ** (self.halved + 1) < self.optim.lr * self.config.floor

    def observe(self, loss: float, step: int) -> bool:
        if step < self.optim.warmup_steps or self.anneal is not None:
            return False  # the loss of a warm-up says nothing about a plateau
        if not self.loss.observe(loss, looks=self.config.looks, patience=1.0 if self.probed else PATIENCE):
            if self.waits and not self.loss.flat:
                self.waits = ""
            return False
        waits = "hold" if self.held else "floor" if self.at_floor else "probe" if self.probed and not self.confirmed() else ""
        if waits:
            if waits != self.waits:
                self._say(step + 1, "plateau", waits=waits)
            self.waits = waits
            return False
        self._halve(step + 1, "plateau")
        return True

    def confirmed(self) -> bool:
        """Whether the probe is proved to be flat as well."""
        found = self.probe_trend()
        return found is not None and found.proves_less_than(self.config.probe_delta)

    def probe_trend(self) -> Trend | None:
        """Of the error over the newest half of the snapshots, per horizon; None while they are too few."""
        window = self.probes[len(self.probes) // 2 :]
        if len(window) < MIN_PROBES:
            return None
        at, error = np.asarray(window, dtype=np.float64).T
        return trend(error, at, self.config.horizon_blocks * self.config.block_steps)

    def probe(self, step: int, error: float) -> None:
        """The error (0-1) of the snapshot of `step` on the fixed bank."""
        if step > max(self.changed_at, self.optim.warmup_steps) and all(step != known for known, _ in self.probes):
            self.probes = sorted([*self.probes, (step, error)])
        if len(self.probes) >= MOST_PROBES:
            self.probes = self.probes[::-2][::-1]

    def restart(self, step: int, why: str) -> None:
        """The content has changed, not the rate: the loss is judged anew, the fixed probe goes on."""
        self.loss.restart()
        self.waits = ""
        self._say(step, "window_restarted", why=why)

    def command(self, kind: str, value: float | None, step: int) -> None:
        """An operator's word: halve, set (to `value`), hold, release.  In force from `step` on, below the floor too."""
        if kind == "halve":
            self._halve(step, "operator")
        elif kind == "set":
            assert value is not None
            self.base, self.halved = value, 0
            self._changed(step)
            self._say(step, "lr_set", why="operator", lr=value)
        else:
            self.held = kind == "hold"
            self._say(step, "lr_held" if self.held else "lr_released", why="operator")

    def retreat(self, step: int) -> None:
        """After a collapse: this rate was too high, whatever the floor."""
        self._halve(step, "rollback")

    def told(self) -> list[dict[str, Any]]:
        """What has happened since this was last asked, for the history: each with `event` and `step`."""
        events, self._events = self._events, []
        return events

    def _halve(self, step: int, why: str) -> None:
        found = self.loss.trend
        reasons = {} if found is None else {"gain": round(found.gain, 6), "doubt": round(found.doubt, 6)}
        self.halved += 1
        rate = self.base * 0.5**self.halved
        self.halvings.append((step, rate))
        self._changed(step)
        self._say(step, "halved", why=why, lr=rate, **reasons)

    def _changed(self, step: int) -> None:
        self.loss.restart()
        self.probes, self.changed_at, self.waits = [], step, ""

    def _say(self, step: int, event: str, **more: Any) -> None:
        self._events.append({"event": event, "step": step, **more})

    def state_dict(self) -> dict[str, Any]:
        return {
            "halvings": [list(h) for h in self.halvings],
            "base": self.base,
            "halved": self.halved,
            "configured": self.optim.lr,
            "made_of": self.made_of,
            "held": self.held,
            "anneal": None if self.anneal is None else list(self.anneal),
            "probes": [list(p) for p in self.probes],
            "changed_at": self.changed_at,
            "waits": self.waits,
            **self.loss.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Another rate in the configuration than the one that was saved is an operator's word too: its halvings stay, what `--set` said goes."""
        self.halvings = [(int(step), float(rate)) for step, rate in saved["halvings"]]
        self.base, self.halved = saved.get("base", self.optim.lr), saved.get("halved", len(self.halvings))  # version 0.1 has neither
        self.held, self.waits = saved.get("held", False), saved.get("waits", "")
        self.anneal = None if saved.get("anneal") is None else (saved["anneal"][0], saved["anneal"][1])
        self.probes = [(int(step), float(error)) for step, error in saved.get("probes", [])]
        self.changed_at = saved.get("changed_at", self.halvings[-1][0] if self.halvings else 0)
        self.loss.load_state_dict(saved)

    def reconfigured(self, saved: Mapping[str, Any], step: int) -> None:
        """After a load: what the configuration says otherwise than the one that was saved."""
        if saved.get("configured", self.optim.lr) != self.optim.lr:
            self.base, self.halved = self.optim.lr, len(self.halvings)
            self._changed(step)
            self._say(step, "window_restarted", why="train.optim.lr has changed", lr=self.rate(step))
        elif saved.get("made_of", self.made_of) != self.made_of:
            self._changed(step)
            self._say(step, "window_restarted", why="the configuration of what the loss is made of has changed")
