"""A trunk without BatchNorm: GroupNorm and standardised weights, in pycls's own blocks.

BatchNorm normalises an image by the others in its batch.  Where these are alike, frames of one video or photos of one day, its statistics are theirs
and not those of the images that the snapshot will meet, and its running averages follow whatever the source sends.  GroupNorm (Wu and He,
arXiv:1803.08494) normalises each image by itself; with the weights of the convolutions standardised (Qiao et al., arXiv:1903.10520) it trains
as well as BatchNorm does at large batches, and better at small ones: Big Transfer (Kolesnikov et al., arXiv:1912.11370, section 4.3) is
built so.  No running statistics: nothing is re-estimated for a snapshot, a batch of one image is a batch, ranks need no SyncBN.

`without_batchnorm` changes what AnyNet has built.  Every convolution that has no bias is followed by a norm, and is standardised; those of
squeeze-and-excitation have one and no norm, and stay.  Names and shapes of the weights stay pycls's, the running statistics are gone; but pycls,
timm and VISSL have no such network, and under their names another one would be computed from these weights (snapshots/keys.py).
"""

import math

import torch
from torch import Tensor, nn

GROUP = 16  # channels of a group, about: of the widths that Wu and He tried (table 3) the best on ImageNet
LEAST = 8  # fewer come near to InstanceNorm, which lost 4 points there
EPS = 1e-10  # of the variance of a filter's weights, as BiT has it


def standardised(weight_OIHW: Tensor) -> Tensor:
    """(O,I,H,W) -> the same with each filter of mean 0 and variance 1 / fan_in.

    Qiao et al. and BiT have variance 1; a norm follows, to which the scale is all one.  1 / fan_in is Brock et al.'s (arXiv:2101.08692, equation 1,
    without their gain): activations keep about the variance of the input, large against GroupNorm's epsilon and small against the range of float16.
    """
    fan_in = weight_OIHW[0].numel()
    variance_O111, mean_O111 = torch.var_mean(weight_OIHW, dim=(1, 2, 3), correction=0, keepdim=True)
    return (weight_OIHW - mean_O111) * torch.rsqrt(fan_in * (variance_O111 + EPS))


class StandardisedConv2d(nn.Conv2d):
    """`weight` is what is learnt; what the images meet is standardised at each forward pass."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self._conv_forward(images_BCHW, standardised(self.weight), self.bias)


def group_width(channels: int) -> int:
    """Channels of a group: the divisor of `channels` that is nearest to GROUP, as a ratio, and not under LEAST.

    Wu and He's constant 32 groups do not divide RegNet's widths (24, 152, 746, …).
    """
    divisors = [d for d in range(min(LEAST, channels), channels + 1) if channels % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / GROUP)))


def without_batchnorm(module: nn.Module) -> None:
    """In place: GroupNorm for every BatchNorm2d, weights 1 and biases 0; standardised weights for every convolution without a bias.

    The weights are those that the module had, so the same seed begins with the same ones.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            setattr(module, name, nn.GroupNorm(channels // group_width(channels), channels, eps=child.eps))
        elif isinstance(child, nn.Conv2d) and child.bias is None:
            setattr(module, name, _standardising(child))
        else:
            without_batchnorm(child)


def _standardising(conv: nn.Conv2d) -> StandardisedConv2d:
    with torch.device("meta"):  # no weight is drawn that would be thrown away
        new = StandardisedConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # pairs, all of them
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=False,
        )
    new.weight = conv.weight
    return new
