"""The processes that learn together, as an objective sees them: sums and gathers, and nothing of how they were started."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamlearn.contract.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """One process's view of its fellows.  Every rank holds an equal part of each batch, in rank order.

    Every method but the properties is a collective: all ranks call it, in the same order, or none.
    """

    rank: int = 0
    world: int = 1
    assigners: int = 1  # ranks that assign together with this one, itself among them
    group: Any = None  # their process group; None: the whole world

    @property
    def total(self) -> Callable[[Tensor], Tensor] | None:
        """Sums a tensor, in place, over the ranks that assign together; None where there is nobody else."""
        return self._total if self.assigners > 1 else None

    def _total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def total_of_all(self, x: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gathered(self, z_ABD: Tensor) -> Tensor:
        """(A,B,D) of each rank -> (A,B * world,D), the parts in rank order: the whole batch as one process would have it."""
        if self.world == 1:
            return z_ABD
        parts = [torch.empty_like(z_ABD) for _ in range(self.world)]
        dist.all_gather(parts, z_ABD.contiguous())
        return torch.cat(parts, dim=1)


def joined(assign_ranks: int = 0) -> Ranks:
    """The ranks of torch.distributed, if it was initialised; else one process alone.  A collective where it was.

    `assign_ranks` neighbours assign codes together, as neighbours share a SyncBN group; 0: all.  Raises ConfigError.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    if assign_ranks in (0, world):
        return Ranks(rank, world, world)
    if world % assign_ranks:
        raise ConfigError(
            f"objective.assign_ranks = {assign_ranks} does not divide the {world} processes: set it to a divisor, or to 0 (all together)"
        )
    # everyone makes every group: torch.distributed asks for it
    groups = [dist.new_group(list(range(first, first + assign_ranks))) for first in range(0, world, assign_ranks)]
    return Ranks(rank, world, assign_ranks, groups[rank // assign_ranks])
