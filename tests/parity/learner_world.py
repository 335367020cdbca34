"""A few steps of the whole learner on one process's part of each batch; run in processes of their own over gloo, and alone for comparison.

In float64 throughout: at random weights and eight small images a step magnifies a rounding error by a hundred, and after a few of them
float32 could not tell a wrong sum from another order of adding up.
"""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from streamlearn.learn.ranks import joined, neighbours
from streamlearn.learn.state import fresh_state
from streamlearn.learn.sync_norm import synced
from streamlearn.learn.trainer import train
from tests.learn.world import FakeBatch, batch, flat, small_config

STEPS, B = 4, 8
CASES = {
    "ddp": dict(group=32),  # more than there are: all
    "fsdp": dict(parallel="fsdp"),
    "fsdp, adamw, gn_ws": dict(parallel="fsdp", kind="adamw", lr=1e-3, norm="gn_ws"),
    "ddp, in parts": dict(parts=2),
    "fsdp, not finite": dict(parallel="fsdp", spoilt=(2,)),
}


def config(ranks, parallel="ddp", kind="lars", lr=0.5, parts=0, spoilt=(), group=0, norm="bn"):
    base = small_config(parallel=parallel, sync_bn_group=group, micro_batch=B // ranks.world // parts if parts else 0)
    optim = base.train.optim.model_copy(update={"kind": kind, "lr": lr})
    objective = base.objective.model_copy(update={"queue": 0 if parts else base.objective.queue})  # its order is the batch's
    model = base.model.model_copy(update={"norm": norm})
    return base.model_copy(update={"model": model, "objective": objective, "train": base.train.model_copy(update={"optim": optim})})


def own_part(place, ranks, parts=0, spoilt=(), **_):
    """In parts, a part of all ranks together holds the images that it holds in one process: BatchNorm is over them."""
    whole = batch(place, place in spoilt)
    size = B // ranks.world
    order = torch.arange(B).view(parts or 1, ranks.world, -1).transpose(0, 1).flatten()[ranks.rank * size : (ranks.rank + 1) * size]
    return FakeBatch(tuple(crop[:, order].double() for crop in whole.crops), whole.fresh[order], whole.state)


def whole(value):
    """Shards put together.  A collective where there are any."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return [whole(v) for v in value] if isinstance(value, list | tuple) else value


def run(case):
    """(loss, gradient norm, prequential loss and rows of embeddings of each step; everything that is remembered)."""
    ranks, seen = joined(), []
    state = fresh_state(config(ranks, **CASES[case]))
    train(
        state,
        (own_part(i, ranks, **CASES[case]) for i in range(STEPS)),
        [lambda _, step: seen.append((step.loss, step.grad_norm, step.prequential, len(step.z_BD)))],
        micro_batch=config(ranks, **CASES[case]).train.micro_batch,
    )
    return seen, whole(state.state_dict())


def norm_of(group_size):
    """BatchNorm of each of `group_size` ranks' images together: output, gradients of input, weight and bias, statistics."""
    ranks, found = joined(), []
    for shape in ((4, 3, 5, 5), (6, 3)):
        x = (
            torch.randn(shape, generator=torch.Generator().manual_seed(10 + ranks.rank), dtype=torch.float64)
            .mul(3)
            .add(50)
            .requires_grad_()
        )
        norm = nn.Sequential(nn.BatchNorm2d(3) if len(shape) == 4 else nn.BatchNorm1d(3))
        with torch.no_grad():
            norm[0].weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        synced(norm, neighbours(group_size, "train.sync_bn_group"))
        y = norm(x)
        (y * torch.arange(y.numel()).view(y.shape).sin()).sum().backward()
        found.append(
            {"x": x.detach(), "y": y.detach(), "dx": x.grad, "dw": norm[0].weight.grad, "db": norm[0].bias.grad} | norm[0].state_dict()
        )
    return found


def in_float64():
    """For this process: there is no way to ask the learner for it, since nobody should."""
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def worker(rank, world, folder):
    """`world` 0: alone, without a process group."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine calls itself
    torch.set_num_threads(1)
    in_float64()
    if world:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    found = {case: run(case) for case in CASES}
    if world > 1:
        found["norms"] = {size: norm_of(size) for size in (0, 2)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    if world:
        dist.barrier()
        dist.destroy_process_group()


def furthest(a, b):
    """Over all tensors of two states: the largest difference relative to the tensor's largest element, or to 1, and where."""
    right = dict(flat(b))
    pairs = [(x.double(), right[at].double(), at) for at, x in flat(a) if isinstance(x, torch.Tensor) and x.numel()]
    return max((float((x - y).abs().max() / y.abs().max().clamp(min=1)), at) for x, y, at in pairs)
