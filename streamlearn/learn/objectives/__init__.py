"""What is minimised.  An objective's loss, what it does after the optimizer, and all it must remember."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from streamlearn.contract.config import ObjectiveConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.learn.objectives.swav import SwAV
from streamlearn.learn.ranks import Ranks

__all__ = ["Objective", "SwAV", "build_objective"]


class Objective(Protocol):
    """Targets of a whole batch, losses of any part of it; all memory in `state_dict`."""

    def targets(self, z_ABD: Tensor, step: int, /) -> Tensor:
        """(A,B,K): what the assigning views ask of the others, without gradient.  Of this rank's whole part of the batch, once a step."""

    def losses(self, z_VBD: Tensor, targets_ABK: Tensor, /) -> Tensor:
        """(B,): each image's loss in nats, with gradient; of all images, or of those at hand with their targets."""

    def before_step(self, step: int, /) -> None: ...
    def after_step(self, step: int, /) -> None: ...
    def measures(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, saved: Mapping[str, Any], /) -> Any: ...


def build_objective(config: ObjectiveConfig, embedding: int, *, assign: int = 2, batch: int = 0, ranks: Ranks | None = None) -> SwAV:
    """`assign` views assign codes; `batch` are the images of a step on all ranks.  Raises ConfigError."""
    if ranks is not None and ranks.world > 1 and batch and config.queue % batch:
        raise ConfigError(
            f"objective.queue = {config.queue} is no multiple of train.batch = {batch}, and {ranks.world} processes share whole batches of it; "
            f"set it to {config.queue // batch * batch} or {(config.queue // batch + 1) * batch}"
        )
    return {"swav": SwAV}[config.kind](config, embedding, assign, ranks)


def parameters_of(*modules: nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters()]
