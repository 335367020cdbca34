"""A few steps of SwAV on one process's part of each batch; run in processes of their own over gloo, and alone for comparison."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from streamlearn.contract.config import ObjectiveConfig, OptimConfig
from streamlearn.learn.objectives import build_objective, parameters_of
from streamlearn.learn.optim import build_optimizer
from streamlearn.learn.ranks import joined

B, V, A, D, STEPS = 16, 5, 2, 6, 5
CASES = {
    "plain": dict(),
    "ten iterations, sharp": dict(epsilon=0.005, sinkhorn_iterations=10),
    "queue": dict(queue=2 * B, queue_start=1),
    "hard at first": dict(hard_steps=3),
    "pairs": dict(assign_ranks=2),
    "pairs with queue": dict(assign_ranks=2, queue=2 * B),
}


def config(case):
    return ObjectiveConfig(**(dict(prototypes=12, epsilon=0.05, freeze_prototypes=2) | CASES[case]))


def images(step):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(V, B, 10, generator=g)


def run(case, ranks, parts=1):
    """(loss of each step, everything that is remembered): of the whole batch, on this rank's part of it.

    `parts` > 1, in one process only: so many objectives with shared prototypes, each assigning its part of the batch alone.
    """
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, D))
    own = config(case).model_copy(update={"queue": config(case).queue // parts})
    objective = build_objective(own, D, batch=B, ranks=ranks)
    every = [objective, *(build_objective(own, D) for _ in range(parts - 1))]
    for other in every[1:]:
        other.prototypes = objective.prototypes
    optimizer = build_optimizer(OptimConfig(kind="lars", lr=2.0, weight_decay=1e-4, trust=0.1), net, objective)
    losses, size = [], B // ranks.world
    for step in range(STEPS):
        z_VBD = F.normalize(net(images(step)[:, ranks.rank * size : (ranks.rank + 1) * size]), dim=-1)
        loss = torch.stack([o.loss(z, step, A)[0] for o, z in zip(every, z_VBD.chunk(parts, 1), strict=True)]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for p in parameters_of(net, objective):
            ranks.total_of_all(p.grad).div_(ranks.world)  # what DDP does
        objective.before_step(step)
        optimizer.step()
        for o in every:
            o.after_step(step)
        losses.append(float(ranks.total_of_all(loss.detach().clone()) / ranks.world))
    return losses, {"net": net.state_dict(), "objective": objective.state_dict()}


def count_reductions(ranks):
    """How many collectives one step's assignment takes."""
    seen = []
    objective = build_objective(config("ten iterations, sharp"), D, batch=B, ranks=ranks)
    plain = dist.all_reduce

    def counted(x, **more):
        seen.append(tuple(x.shape))
        return plain(x, **more)

    dist.all_reduce = counted
    try:
        objective.targets(F.normalize(torch.randn(A, B // ranks.world, D), dim=-1), 0)
    finally:
        dist.all_reduce = plain
    return seen


def worker(rank, world, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine calls itself
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = {case: run(case, joined(config(case).assign_ranks)) for case in CASES if world % (config(case).assign_ranks or 1) == 0}
    found["reductions"] = count_reductions(joined())
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
