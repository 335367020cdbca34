"""Whether a learner is still learning: signs of collapse, looked at every LOOK_EVERY steps.

A step whose loss or gradient is not finite is caught before the update (trainer.py).  What is caught here goes on for a while and is finite: the loss
of a model that knows nothing is ln K (every code equally likely), and a collapsed one goes back to it, or its embeddings to a point or a line.

  loss       the mean loss since the last look is at ln K, or above
  codes      their entropy is that of uniform codes
  rank       effective rank of the batch's embeddings
  spread     standard deviation of the embeddings, over that of points spread evenly on the sphere
  prototypes perplexity of their use

A learner is ill at a look when the loss is, or two of the others are.  Only one that was well before can have collapsed: a beginner's loss is near ln K too,
and going back to an earlier state of it would mend nothing.  After `guard_looks` ill looks in a row it is given up (Collapsed), and rollback.py acts.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamlearn.contract.errors import StreamlearnError
from streamlearn.contract.metrics import SIGNS
from streamlearn.learn.losses import effective_rank
from streamlearn.learn.parallel import local

if TYPE_CHECKING:
    from streamlearn.learn.state import TrainState

LOOK_EVERY = 10  # sound steps
AT_CHANCE = 0.99  # of ln K: SwAV that stalls sits within a part in a thousand of it
UNIFORM = 0.99  # code entropy over ln K; a learner that learns has 0.2 to 0.7
LEAST_RANK = 1.5  # a stalled SwAV has 1.5 to 3, but so may a beginner
LEAST_SPREAD = 0.05  # 1 is even
LEAST_PROTOTYPES = 2.0  # in use


class Ill(StreamlearnError):
    """The learner must not go on from here: rollback.py."""

    step = since = 0  # steps that were taken; up to which of them it was well
    halve = False  # whether the rate is to blame


class Collapsed(Ill):
    halve = True


def sound(state: "TrainState") -> bool:
    """Whether a state may be gone back to, and published: the last steps were sound, and they have left weights that are finite.

    A finite gradient can make weights that are not, and only the step after it would tell; a checkpoint may lie between.  One wait for the device.
    Of what is sharded this rank's part is looked at.
    """
    parts = (state.model, state.ema.model, state.objective)
    tensors = [local(t) for part in parts for t in part.state_dict().values() if t.is_floating_point()]
    return state.sound and bool(torch.stack([torch.isfinite(t).all() for t in tensors]).all())


class Guard:
    """Counts looks; its memory is in the checkpoint."""

    def __init__(self, prototypes: int, looks: int):
        self.ln_k, self.prototypes, self.looks = math.log(prototypes), prototypes, looks
        self.well = False  # ever
        self.ill = 0  # looks in a row
        self.signs: tuple[str, ...] = ()  # of the last look
        self.looked: dict[str, float] = {}  # what it found, by sign; for the record only
        self._losses: list[float] = []  # since then

    def observe(self, loss: float, z_BD: Tensor, measures: Mapping[str, float] | None) -> None:
        """After a sound step.  `measures`: the objective's, asked for where `due`.  Raises Collapsed."""
        self._losses.append(loss)
        if measures is None:
            return
        self.signs = self._look(math.fsum(self._losses) / len(self._losses), z_BD, measures)
        self._losses = []
        if "loss" not in self.signs and len(self.signs) < 2:
            self.well, self.ill = True, 0
            return
        self.ill += self.well
        if self.looks and self.ill >= self.looks:
            raise Collapsed(
                f"the learner has collapsed: {', '.join(self.signs)} over the last {self.ill * LOOK_EVERY} steps. Lower train.optim.lr or "
                "objective.epsilon, or look at what the sources sent"
            )

    @property
    def due(self) -> bool:
        """Whether the next step is looked at."""
        return len(self._losses) + 1 >= LOOK_EVERY

    def _look(self, loss: float, z_BD: Tensor, measures: Mapping[str, float]) -> tuple[str, ...]:
        z_BD = z_BD.detach().float()
        spread = float(torch.sqrt((z_BD.var(0, unbiased=False)).sum()))  # unit vectors: 1 where their mean is 0, whatever the width
        values = (loss / self.ln_k, measures["code_entropy"], float(effective_rank(z_BD)), spread, measures["perplexity"] * self.prototypes)
        found = (
            values[0] >= AT_CHANCE,
            values[1] >= UNIFORM,
            values[2] <= LEAST_RANK,
            spread <= LEAST_SPREAD,
            values[4] <= LEAST_PROTOTYPES,
        )
        self.looked = dict(zip(SIGNS, values, strict=True))
        return tuple(sign for sign, there in zip(SIGNS, found, strict=True) if there)

    def state_dict(self) -> dict[str, Any]:
        return {"well": self.well, "ill": self.ill, "signs": list(self.signs), "losses": list(self._losses)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.well, self.ill = saved.get("well", False), saved.get("ill", 0)
        self.signs, self._losses = tuple(saved.get("signs", ())), list(saved.get("losses", ()))
