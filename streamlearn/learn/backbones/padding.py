"""Channels that are computed in multiples of what the hardware likes, while weights keep their published shapes.

RegNetY-256GF has groups of 373 channels, a prime, and a stage of 4103: rows that begin at odd bytes, for which tensor cores have no good
kernels.  Here every group is computed 376 wide: weights get rows and columns of zeros on their way into each product, gain and bias of a
norm zeros, so that what is padded is 0 behind every norm and never reaches a true channel.  Parameters, their gradients, running statistics
and so state dict, optimizer and snapshots are those of the published shapes.  A group is padded at its end, so groups stay groups.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Spread:
    """`groups` of `width` channels, each computed as `wide_width`."""

    groups: int
    width: int
    wide_width: int

    @property
    def group(self) -> "Spread":
        """One of them."""
        return Spread(1, self.width, self.wide_width)

    def wide(self, x: Tensor, dim: int, value: float = 0.0) -> Tensor:
        """`dim` of groups x width -> groups x wide_width, `value` at the end of each."""
        split = x.unflatten(dim, (self.groups, self.width))
        behind = [0, 0] * (split.dim() - dim - 2)
        return F.pad(split, [*behind, 0, self.wide_width - self.width], value=value).flatten(dim, dim + 1)

    def true(self, x: Tensor, dim: int) -> Tensor:
        """The inverse."""
        return x.unflatten(dim, (self.groups, self.wide_width)).narrow(dim + 1, 0, self.width).flatten(dim, dim + 1)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, over padded channels."""

    spread: Spread

    @classmethod
    def of(cls, norm: nn.BatchNorm2d, spread: Spread) -> "BatchNorm2d":
        """The same layer, the very same parameters and buffers."""
        with torch.device("meta"):
            made = cls(norm.num_features, norm.eps, norm.momentum)
        made.weight, made.bias, made.spread = norm.weight, norm.bias, spread
        made.running_mean, made.running_var, made.num_batches_tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
        return made.train(norm.training)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        learn = self.training and self.track_running_stats
        assert self.running_mean is not None and self.running_var is not None
        if learn and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked or 1)
        mean, var = self.spread.wide(self.running_mean, 0), self.spread.wide(self.running_var, 0, 1.0)
        gain, bias = self.spread.wide(self.weight, 0), self.spread.wide(self.bias, 0)
        unmoved = self.training and not learn
        y = F.batch_norm(x_NCHW, None if unmoved else mean, None if unmoved else var, gain, bias, self.training, share, self.eps)
        if learn:
            with torch.no_grad():
                self.running_mean.copy_(self.spread.true(mean, 0))
                self.running_var.copy_(self.spread.true(var, 0))
        return y


def spread_of(groups: int, width: int, multiple: int) -> Spread | None:
    """None where nothing is to be padded."""
    wide_width = -(-width // multiple) * multiple
    return Spread(groups, width, wide_width) if wide_width != width else None
