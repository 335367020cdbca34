"""One convolution in several forms: the same sums, in the way that suits a layer and a machine best.

  library     as torch has it, on whatever layout its input has
  nchw        the same on the other memory layout: for a library whose channels-last kernel is poor (grouped, backward)
  matmul      1 x 1: one matrix product over all pixels, without the convolution's own packing
  merge-<m>   m neighbouring groups as one of m times the width, zeros off the diagonal blocks: more arithmetic on wider rows
  split       a dense convolution for each group, side by side

A form changes the order of additions and adds exact zeros, so results differ by float rounding and nothing else; where an input is not
finite, `merge` spreads that over its neighbours, and such a step is not learnt anyway.  Padding is that of RegNetY: half the kernel.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamlearn.learn.backbones.padding import Spread

LIBRARY = "library"
MERGED_AT_MOST = 128  # channels of a merged group; beyond it the zeros cost more than any library loses on narrow groups
SPLIT_AT_MOST = 32  # groups: each is a launch of its own


def convolve(x_NCHW: Tensor, weight: Tensor, stride: int, groups: int, form: str = LIBRARY) -> Tensor:
    """(N,C,H,W) -> (N,C',H',W'), channels last in memory if the input is.  `form` is one of `forms_of`."""
    if form == "nchw":
        y = F.conv2d(x_NCHW.contiguous(), weight.contiguous(), None, stride, weight.shape[-1] // 2, 1, groups)
        return y.contiguous(memory_format=torch.channels_last)
    if form == "matmul":
        return F.linear(x_NCHW[:, :, ::stride, ::stride].permute(0, 2, 3, 1), weight[:, :, 0, 0]).permute(0, 3, 1, 2)
    if form == "split":
        pairs = zip(x_NCHW.chunk(groups, 1), weight.chunk(groups), strict=True)
        return torch.cat([F.conv2d(x, w, None, stride, weight.shape[-1] // 2) for x, w in pairs], dim=1)
    if form.startswith("merge-"):
        times = int(form.removeprefix("merge-"))
        weight, groups = merged(weight, groups, times), groups // times
    return F.conv2d(x_NCHW, weight, None, stride, weight.shape[-1] // 2, 1, groups)


def merged(weight: Tensor, groups: int, times: int) -> Tensor:
    """(g w',w,k,k) of g groups -> (g w',times w,k,k) of g / times groups that compute the same."""
    out, width, *kernel = weight.shape
    blocks = weight.view(groups // times, times, out // groups, 1, width, *kernel)
    diagonal = torch.eye(times, dtype=weight.dtype, device=weight.device).view(1, times, 1, times, 1, 1, 1)
    return (blocks * diagonal).reshape(out, times * width, *kernel).contiguous(memory_format=torch.channels_last)


def forms_of(weight: Tensor, groups: int) -> list[str]:
    """What is worth measuring for a layer, the library first."""
    width, kernel = weight.shape[1], weight.shape[-1]
    forms = [LIBRARY, "nchw"]
    if groups == 1:
        return [*forms, "matmul"] if kernel == 1 else forms
    forms += [f"merge-{m}" for m in range(2, groups + 1) if groups % m == 0 and m * width <= max(MERGED_AT_MOST, 2 * width)]
    return [*forms, "split"] if groups <= SPLIT_AT_MOST else forms


class Conv2d(nn.Conv2d):
    """torch's, half padded, in the form that is set for its input's shape (elsewhere in its usual one), and on padded channels (padding.py)."""

    forms: Mapping[tuple[int, ...], str]
    usual: str
    ins: Spread | None  # how the input's channels lie; None: as the weight's
    outs: Spread | None

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Conv2d":
        """The same layer, the very same parameters."""
        if isinstance(conv, cls):
            return conv
        with torch.device("meta"):
            made = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups)  # type: ignore[arg-type]
        made.weight, made.bias = conv.weight, conv.bias
        made.forms, made.usual, made.ins, made.outs = {}, LIBRARY, None, None
        return made.train(conv.training)

    def computed_weight(self) -> Tensor:
        """With the zeros that padded channels meet."""
        weight = self.weight
        if self.ins is not None:
            weight = self.ins.group.wide(weight, 1) if self.groups > 1 else self.ins.wide(weight, 1)
        return weight if self.outs is None else self.outs.wide(weight, 0)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        form = self.forms.get(tuple(x_NCHW.shape), self.usual)
        y = convolve(x_NCHW, self.computed_weight(), int(self.stride[0]), self.groups, form)
        if self.bias is None:
            return y
        return y + (self.bias if self.outs is None else self.outs.wide(self.bias, 0)).view(-1, 1, 1)


def as_products(trunk: nn.Module) -> None:
    """From now on every 1 x 1 convolution of torch's in `trunk`, those of squeeze-and-excitation included, is usually a matrix product.

    On a CPU that took 0.43 to 0.9 of the library's time, forward and backward, in each layer that was measured (docs/speed.md).
    """
    found = [(name, m) for name, m in trunk.named_modules() if type(m) in (nn.Conv2d, Conv2d)]
    for name, conv in found:
        assert isinstance(conv, nn.Conv2d)
        if conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding == (0, 0) and len(set(conv.stride)) == 1:
            parent, _, leaf = name.rpartition(".")
            conv = Conv2d.of(conv)
            conv.usual = "matmul"
            setattr(trunk.get_submodule(parent), leaf, conv)


def suited(module: nn.Module) -> bool:
    """Whether forms can be chosen for it: a plain convolution without bias whose padding is half its kernel."""
    if type(module) not in (nn.Conv2d, Conv2d) or module.bias is not None:
        return False
    half = tuple(k // 2 for k in module.kernel_size)
    return module.padding == half and len(set(module.stride)) == 1 and module.dilation == (1, 1)
