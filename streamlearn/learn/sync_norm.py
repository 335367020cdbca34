"""BatchNorm whose statistics are those of all images of a group of processes.

torch's own SyncBatchNorm works on GPUs only, and stands there; on a CPU the same is done here.
Every rank holds as many images as any other (stream/rounds.py), so means over ranks are means over images.

Shapes: N = every position of every image of a channel, on this rank   C = channels   R = ranks of the group
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Of a CPU."""

    process_group: Any

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(x)
        y: Tensor
        y, mean_C, var_C = _Normalise.apply(x, self.weight, self.bias, self.eps, self.process_group)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            count = x.numel() // x.shape[1] * dist.get_world_size(self.process_group)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / int(self.num_batches_tracked)  # type: ignore[arg-type]
            self.running_mean.lerp_(mean_C, share)
            self.running_var.lerp_(var_C * (count / max(1, count - 1)), share)
        return y


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        ranks = dist.get_world_size(group)
        var_C, mean_C = torch.var_mean(x.float(), _but_channels(x), unbiased=False)
        parts = [torch.empty(2, len(mean_C)) for _ in range(ranks)]
        dist.all_gather(parts, torch.stack([mean_C, var_C]).contiguous(), group=group)
        means_RC, vars_RC = torch.stack(parts).unbind(1)
        mean_C = means_RC.mean(0)
        # the spread within the ranks, and that of their means: no difference of large numbers
        var_C = (vars_RC + (means_RC - mean_C) ** 2).mean(0)
        ctx.save_for_backward(x, weight_C, mean_C, torch.rsqrt(var_C + eps))
        ctx.group, ctx.ranks = group, ranks
        ctx.mark_non_differentiable(mean_C, var_C)
        return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, False, 0.0, eps), mean_C, var_C

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_C, mean_C, inverse_C = ctx.saved_tensors
        along, dims = (1, -1, *[1] * (x.dim() - 2)), _but_channels(x)
        unit = (x - mean_C.view(along)) * inverse_C.view(along)
        sums_2C = torch.stack([dy.sum(dims), (dy * unit).sum(dims)])
        own_2C = sums_2C.clone()  # the gradients of weight and bias are averaged with all others, later
        dist.all_reduce(sums_2C, group=ctx.group)
        means_2C = sums_2C / (x.numel() // x.shape[1] * ctx.ranks)
        dx = (dy - means_2C[0].view(along) - unit * means_2C[1].view(along)) * (weight_C * inverse_C).view(along)
        return dx, own_2C[1], own_2C[0], None, None


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def synced(module: nn.Module, group: Any) -> nn.Module:
    """`module` with every BatchNorm, of any depth, put in step over `group` (None: all); parameters, buffers and names stay the same."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            synced(child, group)
            continue
        kind = SyncBatchNorm if child.weight.device.type == "cpu" else nn.SyncBatchNorm
        norm = kind(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
        norm.process_group, norm._parameters, norm._buffers = group, child._parameters, child._buffers
        norm.train(child.training)
        setattr(module, name, norm)
    return module
