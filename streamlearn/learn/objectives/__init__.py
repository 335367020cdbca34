"""What is minimised.  An objective's loss, what it does after the optimizer, and all it must remember."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from streamlearn.contract.config import ObjectiveConfig
from streamlearn.learn.objectives.swav import SwAV

__all__ = ["Objective", "SwAV", "build_objective"]


class Objective(Protocol):
    """`loss` of a batch of embeddings; all memory in `state_dict`."""

    def loss(self, z_VBD: Tensor, step: int, num_assign: int, /) -> tuple[Tensor, Tensor]:
        """((), (B,)): the loss in nats, and each image's own, without gradient."""

    def before_step(self, step: int, /) -> None: ...
    def after_step(self) -> None: ...
    def measures(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any], /) -> Any: ...


def build_objective(config: ObjectiveConfig, embedding: int) -> SwAV:
    return {"swav": SwAV}[config.kind](config, embedding)


def parameters_of(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters()]
