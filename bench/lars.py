"""One LARS step: ours against the loop of apex's LARC, on the parameters of a whole model (trunk, head, prototypes).

    python -m bench.lars --preset seer-regnety-16gf --threads 1            # --device cuda on a GPU

Prints the milliseconds of a step (median, the two taking turns), calls into torch, and looks at a value, each of which makes the host wait
for a GPU (both of a first step); and whether the parameters are equal to the last bit afterwards.  On a CPU foreach is a loop too: no gain is expected there.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamlearn.contract.config_file import load
from streamlearn.learn.model import Model
from streamlearn.learn.objectives import build_objective, parameters_of
from streamlearn.learn.optim import LARS

LR, RATES = 0.3, {"momentum": 0.9, "weight_decay": 1e-6, "trust": 0.001}
LOOKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.looks += func.overloadpacket in LOOKS
        return func(*args, **(kwargs or {}))


def shapes_of(preset: str) -> list[torch.Size]:
    config = load(None, env={}, overrides={"preset": preset})
    with torch.device("meta"):
        model = Model(config.model)
        objective = build_objective(config.objective, model.embedding)
    return [p.shape for p in parameters_of(model, objective)]


@torch.no_grad()
def larc_step(params: list[Tensor], buffers: dict[int, Tensor]) -> None:
    """apex's LARC with clip off and SGD, as they read: two looks a tensor."""
    trust, decay = RATES["trust"], RATES["weight_decay"]
    for i, p in enumerate(params):
        assert p.grad is not None
        p_norm, g_norm = torch.norm(p), torch.norm(p.grad)
        if p_norm != 0 and g_norm != 0:
            rate = trust * p_norm / (g_norm + p_norm * decay + 1e-8)
            p.grad += decay * p
            p.grad *= rate
        if i in buffers:
            buffers[i].mul_(RATES["momentum"]).add_(p.grad)
        else:
            buffers[i] = p.grad.clone()
        p.add_(buffers[i], alpha=-LR)


def timed(step: Callable[[], None], device: str) -> float:
    """Milliseconds until the device is done."""
    began = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    g = torch.Generator(args.device).manual_seed(0)
    ours = [torch.randn(s, generator=g, device=args.device).requires_grad_() for s in shapes_of(args.preset)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer, buffers = LARS(ours, lr=LR, **RATES), dict[int, Tensor]()
    steps: dict[str, tuple[list[Tensor], Callable[[], None]]] = {
        "loop": (theirs, lambda: larc_step(theirs, buffers)),
        "ours": (ours, optimizer.step),  # type: ignore[dict-item]
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    counts = {}
    for i in range(args.warmup + args.steps + 1):
        for name, (params, step) in steps.items():
            g.manual_seed(i)
            for p in params:
                p.grad = torch.randn(p.shape, generator=g, device=args.device)
            if i == 0:  # counting slows it down: a step of its own
                with Counter() as counts[name]:
                    step()
            elif (spent := timed(step, args.device)) and i > args.warmup:
                times[name].append(spent)
    size = sum(p.numel() for p in ours)
    print(
        f"{args.preset}: {len(ours)} tensors, {size / 1e6:.1f} M parameters, {args.device}, {args.threads} thread(s), torch {torch.__version__}"
    )
    for name, found in times.items():
        print(f"  {name:5s} {statistics.median(found):9.2f} ms/step   {counts[name].calls:6d} calls   {counts[name].looks:4d} looks")
    print(f"  ratio {statistics.median(times['loop']) / statistics.median(times['ours']):9.2f} x")
    equal = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    print(f"  equal to the last bit after {args.warmup + args.steps + 1} steps: {equal} (largest difference {apart:.1e})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="seer-regnety-8gf")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    main(parser.parse_args())
