"""All that a crash must not lose, in one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from streamlearn.contract.config import Config
from streamlearn.learn.ema import Ema
from streamlearn.learn.lr_policy import HalveOnPlateau
from streamlearn.learn.model import Model
from streamlearn.learn.objectives import SwAV, build_objective
from streamlearn.learn.optim import build_optimizer, load_optimizer
from streamlearn.learn.ranks import joined


@dataclass
class TrainState:
    """A step draws no random number: the order and the augmentations are functions of `stream`, so no generator is kept."""

    model: Model  # trunk and head
    ema: Ema[Model]
    objective: SwAV  # prototypes, queue, use: buffers
    optimizer: torch.optim.Optimizer
    policy: HalveOnPlateau
    step: int = 0  # batches taken
    images: int = 0
    fresh: int = 0  # of them learnt for the first time
    bad_steps: int = 0  # batches whose loss or gradient was not finite: taken, not learnt
    bad_in_a_row: int = 0
    stream: dict[str, Any] = field(default_factory=dict)  # where the stream stands, after the last batch taken

    origin: dict[str, Any] = field(default_factory=dict)  # what it began as (learn/warm.py); empty: random weights

    COUNTERS: ClassVar = ("step", "images", "fresh", "bad_steps", "bad_in_a_row", "stream")

    def state_dict(self) -> dict[str, Any]:
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "policy": self.policy.state_dict(),
        }
        return parts | {"origin": self.origin} | {name: getattr(self, name) for name in self.COUNTERS}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.ema.model.load_state_dict(saved["ema"])
        self.objective.load_state_dict(saved["objective"])
        load_optimizer(self.optimizer, saved["optimizer"])
        self.policy.load_state_dict(saved["policy"])
        self.origin = saved.get("origin", {})  # checkpoints of version 0.1 have none
        for name in self.COUNTERS:
            setattr(self, name, saved[name])


def fresh_state(config: Config) -> TrainState:
    """Step 0, from `train.seed` alone: the same on every rank.  A collective where torch.distributed is initialised."""
    train, ranks = config.train, joined(config.objective.assign_ranks)
    assign = config.stream.crops[0].count
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        model = Model(config.model)
        objective = build_objective(config.objective, model.embedding, assign=assign, batch=train.batch, ranks=ranks)
    model.to(train.device)
    objective.to(train.device)
    optim = train.optim.for_batch(train.batch)
    policy = HalveOnPlateau(optim, train.plateau)
    return TrainState(model, Ema(model, train.ema_decay), objective, build_optimizer(optim, model, objective), policy)
