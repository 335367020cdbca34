"""RegNetY's block with little memory: what is cheap to make again is not kept for the backward pass.

Of norm -> ReLU (-> squeeze and excite) -> convolution torch keeps the norm's input, what the ReLU gave, and what the convolution was
given.  Here only the norm's input is kept: the others are one multiply-add and one maximum away, and are made again when the backward
pass first asks for them.  The operations, and so the gradients, are torch's own; only what is kept changes (saved_tensors_hooks).  A
block keeps four tensors where it kept seven.  What is made again is the same to the last bit on a CPU: the scale and shift of the
forward pass are applied in its order of multiplication.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pycls.models.anynet import ResBottleneckBlock
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Again:
    """A tensor of the forward pass, made again in the backward pass: once, when first asked for."""

    def __init__(self, make: Callable[[], Tensor]):
        self.make = make
        self.made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            self.made = self.make()
        return self.made


class Forgetful:
    """What lies in the storage of a tensor that was `forget`-ted is not kept for the backward pass, while `hooks` are entered.

    The hooks know the table and not this object: a cycle would keep what was made again until Python collects garbage.
    """

    def __init__(self) -> None:
        self.again: dict[int, Again] = {}
        self.hooks = saved_tensors_hooks(partial(_pack, self.again), _unpack)

    def forget(self, tensor: Tensor, make: Callable[[], Tensor]) -> Again:
        """`make` gives a tensor of the same values, shape and strides."""
        again = self.again[tensor.untyped_storage().data_ptr()] = Again(make)
        return again


def _pack(table: Mapping[int, Again], tensor: Tensor) -> Any:
    again = table.get(tensor.untyped_storage().data_ptr())
    if (
        again is None
    ):  # without its history: a node that keeps its own result, such as sigmoid's, would keep itself, and no collector sees that
        return tensor.detach()
    return again, tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    again, size, stride, offset = packed
    return again().as_strided(size, stride, offset)


def bottleneck(block: nn.Module, x_NCHW: Tensor) -> Tensor:
    """What `block` makes of (N,C,H,W).

    Only a plain ResBottleneckBlock of pycls is gone through in this way.  FSDP2 gives a block another class, whose call gathers the weights: it is called.
    """
    if type(block) is not ResBottleneckBlock:
        return block(x_NCHW)  # type: ignore[no-any-return]
    f: Any = block.f
    y = normed(f.a(x_NCHW), f.a_bn, None, f.b)
    y = f.c_bn(normed(y, f.b_bn, getattr(f, "se", None), f.c))
    skip = block.bn(block.proj(x_NCHW)) if block.proj_block else x_NCHW  # type: ignore[operator]
    return torch.relu_(y.add_(skip))


def normed(x: Tensor, norm: nn.Module, gate: nn.Module | None, conv: nn.Module) -> Tensor:
    """conv(gate(relu(norm(x)))), where gate(y) = y * gate.f_ex(mean of y)."""
    if type(norm) is not nn.BatchNorm2d or not norm.training or norm.momentum is None or not torch.is_grad_enabled():
        y = torch.relu_(norm(x))
        return conv(y if gate is None else gate(y))
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    y, mean, scale = torch.native_batch_norm(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps)
    kept, mean, factor, shift = x.detach(), mean.detach(), (norm.weight * scale).detach(), norm.bias.detach()
    forgetful = Forgetful()

    def rectified() -> Tensor:  # a variance of 1 and no epsilon: the factor as it is
        return torch.native_batch_norm(kept, factor, shift, mean, torch.ones_like(mean), False, 0.0, 0.0)[0].relu_()

    again = forgetful.forget(y, rectified)
    with forgetful.hooks:
        torch.relu_(y)
        if gate is None:
            return conv(y)
        share = gate.f_ex(gate.avg_pool(y))  # type: ignore[operator]
        z = y * share
        share = share.detach()
        forgetful.forget(z, lambda: again() * share)
        return conv(z)
