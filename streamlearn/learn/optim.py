"""Optimizers: LARS as SwAV uses it, SGD and AdamW; what they leave alone, and how their state is taken up again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from streamlearn.contract.config import OptimConfig
from streamlearn.learn.parallel import local, norms

RUN = 2**26  # elements: 256 MiB put aside; a run costs a dozen launches
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., arXiv:1708.03888) with the arithmetic of apex's LARC, clip off, around SGD.

    For each tensor with |p| and |g| not 0:  g <- (g + wd p) * trust |p| / (|g| + wd |p| + eps); any other tensor keeps its plain
    gradient, without weight decay.  Then momentum, then the learning rate, so halving the rate does not rescale the buffer.
    Every operation and its order is LARC's, so on a CPU the result is the same to the last bit; CUDA's fused norms add up in
    another order.  In a group whose `adapt` is False the rate stays the gradient's own, as in SGD.

    In foreach form: a handful of launches and one small one a tensor (its own rate), and never a look at a value, so that a GPU
    does not wait for the host; the loop does that twice a tensor.  As in LARC, `.grad` is left rescaled.

    Of sharded tensors (FSDP) each rank moves its own part; norms are those of the whole, one reduction a run.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, weight_decay: float, trust: float, eps: float = 1e-8):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "eps": eps, "adapt": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "LARS takes no closure"
        for group in self.param_groups:
            for params in runs([p for p in group["params"] if p.grad is not None]):
                grads = [p.grad for p in params if p.grad is not None]
                if group["adapt"]:
                    _adapt_(params, grads, group)
                elif group["weight_decay"]:
                    torch._foreach_add_([local(g) for g in grads], torch._foreach_mul([local(p) for p in params], group["weight_decay"]))
                buffers = self._momentum(params, grads, group["momentum"])
                torch._foreach_add_([local(p) for p in params], [local(b) for b in buffers], alpha=-group["lr"])

    def _momentum(self, params: list[Tensor], grads: list[Tensor], momentum: float) -> list[Tensor]:
        """The buffers, this step's gradients in them.  The first gradient is a tensor's first buffer; frozen ones come later."""
        known = ["momentum_buffer" in self.state[p] for p in params]
        going = [local(self.state[p]["momentum_buffer"]) for p, k in zip(params, known, strict=True) if k]
        if going:
            torch._foreach_mul_(going, momentum)
            torch._foreach_add_(going, [local(g) for g, k in zip(grads, known, strict=True) if k])
        for p, g, k in zip(params, grads, known, strict=True):
            if not k:
                self.state[p]["momentum_buffer"] = g.clone()
        return [self.state[p]["momentum_buffer"] for p in params]


def runs(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours, up to RUN elements together: a step puts aside as much as one run, or one tensor, is large."""
    run: list[Tensor] = []
    room = 0
    for p in params:
        if run and p.numel() > room:
            yield run
            run = []
        if not run:
            room = RUN
        run.append(p)
        room -= p.numel()
    if run:
        yield run


def _adapt_(params: list[Tensor], grads: list[Tensor], group: Mapping[str, Any]) -> None:
    """Gradients as LARC rescales them, in place.  The norms stand in two vectors, so what is chosen by value is chosen by `where`."""
    decay, p_norms, g_norms = group["weight_decay"], *norms([*params, *grads]).chunk(2)
    params, grads = [local(p) for p in params], [local(g) for g in grads]
    moved = (p_norms != 0) & (g_norms != 0)
    rates = torch.where(moved, group["trust"] * p_norms / (g_norms + p_norms * decay + group["eps"]), 1.0)
    decays = torch.where(moved, torch.full_like(rates, decay), 0.0)
    torch._foreach_add_(grads, torch._foreach_mul(params, decays.unbind()))
    torch._foreach_mul_(grads, rates.unbind())


def build_optimizer(config: OptimConfig, *modules: nn.Module) -> torch.optim.Optimizer:
    """Over all parameters of `modules`, in their order; what `exclude` names comes after, in a group of its own."""
    whole, left_out = parted(modules, config.exclude)
    groups: list[dict[str, Any]] = [{"params": whole}]
    if left_out:
        groups.append({"params": left_out, "weight_decay": 0.0} | ({"adapt": False} if config.kind == "lars" else {}))
    if config.kind == "lars":
        return LARS(groups, config.lr, config.momentum, config.weight_decay, config.trust)
    foreach = not any(isinstance(p, DTensor) for p in whole)  # torch's do not take shards and whole tensors in one list
    if config.kind == "adamw":
        betas = (config.momentum, config.second_beta)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, foreach=foreach)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, foreach=foreach)


def parted(modules: Sequence[nn.Module], exclude: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """(the others, those that `exclude` names): "norm" is weight and bias of a normalisation, "bias" the bias of anything else."""
    whole: list[Tensor] = []
    left_out: list[Tensor] = []
    for module in (inner for outer in modules for inner in outer.modules()):
        norm = isinstance(module, NORMS)
        for name, parameter in module.named_parameters(recurse=False):
            named = "norm" if norm else "bias" if name == "bias" else ""
            (left_out if named in exclude else whole).append(parameter)
    return whole, left_out


def kind_of(groups: Sequence[Mapping[str, Any]]) -> str:
    """Of a saved state, by what its groups hold: none ever named itself."""
    return "lars" if "trust" in groups[0] else "adamw" if "betas" in groups[0] else "sgd"


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Take up the buffers of a saved state.  Rates, decay and momentum are the configuration's, not the state's.

    Raises ValueError where the buffers are another optimizer's, or of other parameters.
    """
    was, now = kind_of(saved["param_groups"]), kind_of(optimizer.param_groups)
    if was != now:
        raise ValueError(f"its optimizer is train.optim.kind = {was!r}, here it is {now!r}")
    sizes, wanted = [len(g["params"]) for g in saved["param_groups"]], [len(g["params"]) for g in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = [i for group in saved["param_groups"] for i in group["params"]]
    if sizes != wanted or any(_misfits(saved["state"].get(i, {}), p) for i, p in zip(places, parameters, strict=True)):
        raise ValueError(f"its optimizer has groups of {sizes} parameters, here {wanted}: train.optim.exclude, or the model, differs")
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


def _misfits(state: Mapping[str, Any], parameter: Tensor) -> bool:
    return any(isinstance(v, Tensor) and v.dim() and v.shape != parameter.shape for v in state.values())
