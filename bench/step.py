"""One training step on a CPU: ours against a plain eager step, same model, crops, batch and threads, in one run.

    python -m bench.step --backbone regnety-200mf --batch 16 --threads 1

The peer is how SwAV is commonly written (as in lightly): one forward for each crop, NCHW, exp-domain Sinkhorn, LARS tensor by tensor with
its host syncs.  Prints images/s (median over the timed steps, the two taking turns) and peak memory of each, measured in processes of their own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from streamlearn.contract.config import Config, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from streamlearn.learn.objectives import parameters_of
from streamlearn.learn.state import fresh_state

CROPS = {"small": ((2, 96), (4, 48)), "full": ((2, 224), (4, 96))}


def make(backbone: str, batch: int) -> Config:
    return Config(
        model=ModelConfig(backbone=backbone, head=(2048, 128)),
        objective=ObjectiveConfig(prototypes=3000, freeze_prototypes=0),
        train=TrainConfig(batch=batch, optim=OptimConfig(kind="lars", lr=0.3, warmup_steps=0)),
    )


def ours(config: Config, crops: list[Tensor]) -> Callable[[], float]:
    state = fresh_state(config)

    def step() -> float:
        loss, _ = state.objective.loss(state.model(crops), state.step, len(crops[0]))
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        state.optimizer.step()
        state.objective.after_step(state.step)
        state.ema.update(state.model, state.step, state.policy.steady_since)
        return float(loss.detach())

    return step


def peer(config: Config, crops: list[Tensor]) -> Callable[[], float]:
    """The plain step."""
    state = fresh_state(config)
    trunk = state.model.trunk.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    head, prototypes = state.model.head, state.objective.prototypes
    params = parameters_of(state.model, state.objective)
    buffers = [torch.zeros_like(p) for p in params]
    views = [view for crop in crops for view in crop]

    def features(view: Tensor) -> Tensor:
        x = view
        for child in trunk.children():
            x = child(x)
        return x.mean((2, 3))

    def sinkhorn(scores: Tensor) -> Tensor:
        q = torch.exp(scores / 0.05).T
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * q.shape[0]
            q /= q.sum(0, keepdim=True) * q.shape[1]
        return (q * q.shape[1]).T

    def step() -> float:
        with torch.no_grad():
            prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))
        scores = [prototypes(F.normalize(head(features(view)), dim=1)) for view in views]
        terms = []
        for a in range(2):
            q = sinkhorn(scores[a].detach())
            terms += [-(q * F.log_softmax(s / 0.1, 1)).sum(1).mean() for v, s in enumerate(scores) if v != a]
        loss = torch.stack(terms).mean()
        for p in params:
            p.grad = None
        loss.backward()
        with torch.no_grad():
            for p, b in zip(params, buffers, strict=True):
                assert p.grad is not None
                p_norm, g_norm = p.norm(), p.grad.norm()
                grad = p.grad
                if p_norm.item() and g_norm.item():
                    grad = (grad + 1e-6 * p) * (0.001 * p_norm / (g_norm + 1e-6 * p_norm + 1e-8))
                b.mul_(0.9).add_(grad)
                p.add_(b, alpha=-0.3)
        return float(loss.detach())

    return step


STEPS = {"ours": ours, "plain": peer}


def measure(which: str, args: argparse.Namespace) -> dict[str, float]:
    """In this process: seconds of the median step, peak resident memory in MiB."""
    torch.set_num_threads(args.threads)
    config = make(args.backbone, args.batch)
    g = torch.Generator().manual_seed(0)
    crops = [torch.randn(count, args.batch, 3, size, size, generator=g) for count, size in CROPS[args.crops]]
    step, times = STEPS[which](config, crops), []
    for i in range(args.warmup + args.steps):
        began = time.perf_counter()
        step()
        if i >= args.warmup:
            times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times), "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def compare(args: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    for _ in range(args.rounds):  # taking turns: a noisy neighbour disturbs both
        for name in STEPS:
            out = subprocess.run(
                [sys.executable, "-m", "bench.step", *sys.argv[1:], "--only", name], capture_output=True, text=True, check=True
            )
            results[name].append(json.loads(out.stdout))
    print(f"{args.backbone}, crops {args.crops}, batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}")
    rate = {}
    for name, found in results.items():
        seconds, mib = statistics.median(r["seconds"] for r in found), max(r["mib"] for r in found)
        rate[name] = args.batch / seconds
        print(f"  {name:6s} {rate[name]:8.2f} images/s   {1000 * seconds:8.1f} ms/step   {mib:7.0f} MiB peak")
    print(f"  ratio  {rate['ours'] / rate['plain']:8.2f} x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="regnety-200mf")
    parser.add_argument("--crops", choices=CROPS, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=STEPS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
    else:
        compare(arguments)
