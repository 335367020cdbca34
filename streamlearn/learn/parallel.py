"""One model on many ranks: DDP (every rank holds all of it) or FSDP2 (each holds a part of every tensor), SyncBN with both.

The objective stays whole on every rank: its prototypes are small (16,000 x 256: 16 MB) and float32 (VISSL keeps them apart, too), and its buffers
are the same everywhere.  The average of the weights is sharded as the weights are.

What is elementwise (momentum, averages) is done on each rank's own part, `local`; a norm of the whole is the root of the sum of the parts'
squares, `norms`: one reduction for many tensors.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pycls.models.anynet import AnyStage
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from streamlearn.contract.config import TrainConfig
from streamlearn.learn.model import Model
from streamlearn.learn.ranks import neighbours
from streamlearn.learn.sync_norm import synced


def spread(model: Model, average: Model, config: TrainConfig) -> nn.Module:
    """Put a model and its average, the same on every rank, on all of them; what to call in place of the model.  A collective."""
    # none but the live model ever sees a batch in training: its average needs no statistics in step
    size = min(config.sync_bn_group, dist.get_world_size())
    if size != 1:
        synced(model, neighbours(size, "train.sync_bn_group", timeout_s=config.ranks_timeout_s))
    if config.parallel == "ddp":
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*broadcast_buffers", category=FutureWarning
            )  # what torch 2.13 has in its place, 2.6 has not
            # buffers are in step as it is, or are not meant to be
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    for one in (model, average):
        one.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # fully_shard takes no other
        for stage in one.trunk.children():
            for block in stage.children() if isinstance(stage, AnyStage) else ():
                fully_shard(block)
        fully_shard(one.head)
        fully_shard(one)
    return model


@contextmanager
def unaveraged(model: nn.Module) -> Iterator[None]:
    """Gradients of what runs inside stay on this rank until a backward pass outside: for all parts of a batch but the last."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor; all of one that is not sharded.  Writing to it writes to the tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(N,) the 2-norm of each whole tensor, without a host sync.  A collective where any is sharded."""
    own_N = torch.stack(torch._foreach_norm([local(x) for x in tensors]))
    if not any(isinstance(x, DTensor) for x in tensors):
        return own_N
    parts_N = torch.tensor([isinstance(x, DTensor) for x in tensors], device=own_N.device)
    squares_N = own_N.square()
    dist.all_reduce(squares_N)
    return torch.where(parts_N, squares_N.sqrt(), own_N)


def whole(model: nn.Module) -> dict[str, Tensor] | None:
    """The complete state dict, on the CPU of the first rank; None on the others, and None where the model is whole anyway.  A collective."""
    state = model.state_dict()
    if not any(isinstance(x, DTensor) for x in state.values()):
        return None
    found: dict[str, Tensor] = {}
    for name, x in state.items():  # one at a time: a rank need not have room for the model
        full = x.full_tensor() if isinstance(x, DTensor) else x
        if dist.get_rank() == 0:
            found[name] = full.cpu()
    return found


def sharded_as(saved: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """`saved` with every whole tensor sharded where its namesake is: a state of one process, taken up by many.  A collective there."""

    def fitted(x: Any, to: Any) -> Any:
        if isinstance(x, DTensor) or not isinstance(to, DTensor) or not isinstance(x, Tensor) or x.shape != to.shape:
            return x
        return distribute_tensor(x.to(to.device), to.device_mesh, to.placements)

    return {name: fitted(x, like.get(name)) for name, x in saved.items()}


@torch.no_grad()
def same_buffers(*models: nn.Module) -> None:
    """The first rank's on all: groups that normalise apart keep statistics of their own, and a checkpoint has one.  A collective."""
    for buffer in (b for model in models for b in model.buffers()):
        dist.broadcast(buffer, src=0)
