"""All that a crash must not lose, in one value."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from streamlearn.contract.config import Config
from streamlearn.learn.ema import Ema
from streamlearn.learn.fit import fit
from streamlearn.learn.guard import Guard
from streamlearn.learn.lr_policy import HalveOnPlateau
from streamlearn.learn.model import Model
from streamlearn.learn.objectives import SwAV, build_objective
from streamlearn.learn.optim import build_optimizer, load_optimizer
from streamlearn.learn.parallel import sharded_as, spread
from streamlearn.learn.ranks import device_of, joined


@dataclass
class TrainState:
    """A step draws no random number: the order and the augmentations are functions of `stream`, so no generator is kept."""

    model: Model  # trunk and head
    ema: Ema[Model]
    objective: SwAV  # prototypes, queue, use: buffers
    optimizer: torch.optim.Optimizer
    policy: HalveOnPlateau
    guard: Guard
    spread: nn.Module | None = None  # to be called in place of the model, where it is on many ranks (learn/parallel.py)
    step: int = 0  # batches taken
    images: int = 0
    fresh: int = 0  # of them learnt for the first time
    bad_steps: int = 0  # batches whose loss or gradient was not finite: taken, not learnt
    bad_in_a_row: int = 0
    skipped: int = 0  # batches of a bad stretch: likewise
    skip_until: int = 0  # step up to which they are
    rollbacks: list[list[Any]] = field(default_factory=list)  # [step gone back to, step it was found at, why]
    stream: dict[str, Any] = field(default_factory=dict)  # where the stream stands, after the last batch taken

    inputs: dict[str, Any] = field(default_factory=dict)  # how far what comes from outside was heeded (learn/inputs.py)
    origin: dict[str, Any] = field(default_factory=dict)  # what it began as (learn/warm.py); empty: random weights

    COUNTERS: ClassVar = ("step", "images", "fresh", "bad_steps", "bad_in_a_row", "stream")
    LATER: ClassVar = ("origin", "inputs", "skipped", "skip_until", "rollbacks")  # checkpoints of version 0.1 have none of them

    @property
    def sound(self) -> bool:
        """As far as is known: nothing is suspected of the last steps."""
        return not self.bad_in_a_row and not self.guard.ill

    def state_dict(self) -> dict[str, Any]:
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "policy": self.policy.state_dict(),
            "guard": self.guard.state_dict(),
        }
        return parts | {name: getattr(self, name) for name in (*self.LATER, *self.COUNTERS)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for model, part in ((self.model, saved["model"]), (self.ema.model, saved["ema"])):
            model.load_state_dict(sharded_as(part, model.state_dict()))
        self.objective.load_state_dict(saved["objective"])
        load_optimizer(self.optimizer, self._sharded(saved["optimizer"]))
        self.policy.load_state_dict(saved["policy"])
        self.guard.load_state_dict(saved.get("guard", {}))
        for name in self.LATER:
            setattr(self, name, saved.get(name, getattr(self, name)))
        for name in self.COUNTERS:
            setattr(self, name, saved[name])

    def room(self) -> Callable[[str, Sequence[int], torch.dtype], Tensor]:
        """Makes empty tensors for what a sharded checkpoint holds (learn/sharded.py), by name: where the state's own lie, and sharded as they are."""
        parts = {"model": self.model, "ema": self.ema.model, "objective": self.objective}
        own = {f"{part}/{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def empty(name: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
            like = own.get(name)
            if name.startswith("optimizer/state/") and (number := int(name.split("/")[2])) < len(parameters):
                like = parameters[number]
            if like is None or like.shape != torch.Size(size):
                return torch.empty(tuple(size), dtype=dtype)  # the state will refuse it, or takes it as it is
            return torch.empty_like(like.detach(), dtype=dtype)

        return empty

    def _sharded(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state, each buffer as its parameter is."""
        places = [i for group in saved["param_groups"] for i in group["params"]]
        like = dict(zip(places, (p for group in self.optimizer.param_groups for p in group["params"]), strict=False))
        state = {i: sharded_as(buffers, dict.fromkeys(buffers, like.get(i))) for i, buffers in saved["state"].items()}
        return {**saved, "state": state}


def fresh_state(config: Config, begin: Callable[[TrainState], None] | None = None) -> TrainState:
    """Step 0, from `train.seed` alone: the same on every rank.  A collective where torch.distributed is initialised.

    `begin` may change its weights, before they are put on many ranks.
    """
    train, ranks = config.train, joined(config.objective.assign_ranks, timeout_s=config.train.ranks_timeout_s)
    assign = config.stream.crops[0].count
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        model = Model(config.model)
        objective = build_objective(config.objective, model.embedding, assign=assign, batch=train.batch, ranks=ranks)
    model.to(device_of(train.device))
    objective.to(device_of(train.device))
    fit(model, config, ranks.world)
    optim = train.optim.for_batch(train.batch)
    policy = HalveOnPlateau(optim, train.plateau, probed=bool(config.plateau_bank), made_of=made_of(config))
    guard = Guard(config.objective.prototypes, train.guard_looks)
    ema = Ema(model, train.ema_decay, train.ema_share, train.ema_decay_most)
    state = TrainState(model, ema, objective, build_optimizer(optim, model, objective), policy, guard)
    if begin is not None:
        begin(state)
    if dist.is_available() and dist.is_initialized():
        state.spread = spread(model, state.ema.model, train)
        state.optimizer = build_optimizer(optim, model, objective)  # of the parameters as they are now
    return state


def made_of(config: Config) -> str:
    """A digest of what the loss is made of, besides the weights and the rate: with another, old losses say nothing about new ones."""
    of_stream = config.stream.model_dump(mode="json", include={"crops", "jitter", "blur", "mean", "std", "fresh_fraction", "replay"})
    of_train = config.train.model_dump(mode="json", include={"batch", "plateau", "optim"})
    of_train["optim"].pop("lr")  # the policy knows it
    of_model = [config.model.model_dump(mode="json"), config.objective.model_dump(mode="json")]
    told = json.dumps([of_stream, of_train, *of_model], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
