"""A few steps of the whole learner on one process's part of each batch; run in processes of their own over gloo, and alone for comparison."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from streamlearn.learn.ranks import joined
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import train
from tests.learn.world import batch, flat, small_config

STEPS = 6
CASES = {
    "ddp": dict(),
    "fsdp": dict(parallel="fsdp"),
    "ddp, adamw": dict(kind="adamw", lr=1e-3),
    "fsdp, adamw": dict(parallel="fsdp", kind="adamw", lr=1e-3),
    "fsdp, sgd": dict(parallel="fsdp", kind="sgd", lr=0.05),
    "a batch that is not finite": dict(spoilt=(3,)),
    "fsdp, a batch that is not finite": dict(parallel="fsdp", spoilt=(3,)),
}


def config(parallel="ddp", kind="lars", lr=0.5, spoilt=(), **train):
    base = small_config(parallel=parallel, **train)
    optim = base.train.optim.model_copy(update={"kind": kind, "lr": lr})
    return base.model_copy(update={"train": base.train.model_copy(update={"optim": optim})})


def whole(value):
    """Shards put together.  A collective where there are any."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return [whole(v) for v in value] if isinstance(value, list | tuple) else value


def run(case):
    """(the loss, gradient norm and prequential loss of each step, everything that is remembered)."""
    ranks, state, seen = joined(), fresh_state(config(**CASES[case])), []
    spoilt = CASES[case].get("spoilt", ())
    parts = (batch(i, i in spoilt).part(ranks.rank, ranks.world) for i in range(STEPS))
    train(state, parts, [lambda _, step: seen.append((step.loss, step.grad_norm, step.prequential, len(step.z_BD)))])
    return seen, whole(state.state_dict())


def worker(rank, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine calls itself
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=120))
    torch.save({case: run(case) for case in CASES}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def furthest(a, b):
    """Over all tensors of two states: the largest difference, and where."""
    right = dict(flat(b))
    gaps = [(float((x.double() - right[at].double()).abs().max()), at) for at, x in flat(a) if isinstance(x, torch.Tensor) and x.numel()]
    return max(gaps)
