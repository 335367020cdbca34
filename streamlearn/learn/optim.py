"""Optimizers: LARS as SwAV uses it, and SGD."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from streamlearn.contract.config import OptimConfig


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., arXiv:1708.03888) with the arithmetic of apex's LARC, clip off, around SGD.

    For each tensor with |p| > 0 and |g| > 0:  g <- (g + wd p) * trust |p| / (|g| + wd |p| + eps); any other tensor keeps its plain
    gradient, without weight decay.  Then momentum, then the learning rate, so halving the rate does not rescale the buffer.
    Nothing is excluded: BatchNorm, biases and prototypes are scaled and decayed like the rest (VISSL's SwAV).
    In foreach form, with the choice made by `where`: no `.item()`, so a GPU never waits for the host.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float, trust: float, eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = _adapted(params, [p.grad for p in params], group)
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])


def _adapted(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Gradients as LARC rescales them."""
    decay, p_norms, g_norms = group["weight_decay"], torch._foreach_norm(params), torch._foreach_norm(grads)
    rates = [group["trust"] * p / (g + p * decay + group["eps"]) for p, g in zip(p_norms, g_norms, strict=True)]
    moved = [(p > 0) & (g > 0) for p, g in zip(p_norms, g_norms, strict=True)]
    decayed = list(torch._foreach_add(grads, torch._foreach_mul(params, decay)))
    torch._foreach_mul_(decayed, rates)
    return [torch.where(m, d, g) for m, d, g in zip(moved, decayed, grads, strict=True)]


def build_optimizer(config: OptimConfig, params: list[Tensor]) -> torch.optim.Optimizer:
    if config.kind == "lars":
        return LARS(params, config.lr, config.momentum, config.weight_decay, config.trust)
    return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True)
