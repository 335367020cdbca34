"""RegNetY on pycls's AnyNet, without its classifier.

Parameters: Radosavovic et al., Designing Network Design Spaces (arXiv:2003.13678), table of RegNetY models, as in pycls's
configs; 64GF and above as released with SEER (VISSL's yaml files).  State-dict keys are pycls's: stem.*, s1.b1.f.a.weight, ...

The SEER paper (arXiv:2103.01988, section 3.2) quotes depths (2,7,17,1) and widths (528,1056,2904,7392) for its
"RegNetY-256GF"; those are the 128GF model's.  The released 256GF model has widths (746,1492,4103,10444).  `regnety-256gf` here is
the released one, `regnety-128gf` the one whose widths the paper quotes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pycls.models.anynet import AnyNet
from pycls.models.regnet import adjust_ws_gs_comp, generate_regnet, get_stages_from_blocks
from torch import Tensor, nn

from streamlearn.learn.backbones.forms import Conv2d
from streamlearn.learn.backbones.norms import without_batchnorm
from streamlearn.learn.backbones.padding import BatchNorm2d, Spread, spread_of

SE_RATIO = 0.25  # of the block's input width
STEMS = {"imagenet": "simple_stem_in", "cifar": "res_stem_cifar"}


@dataclass(frozen=True)
class Stages:
    """What AnyNet needs: per stage depth, width and group width."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_widths: tuple[int, ...]
    stem_width: int = 32
    strides: tuple[int, ...] = (2, 2, 2, 2)


def quantised(depth: int, w_0: int, w_a: float, w_m: float, group: int) -> Stages:
    """Stages from the four numbers of a RegNet: u_j = w_0 + w_a j, quantised to powers of w_m (section 3.3, equations 2 to 4)."""
    blocks, stages, _, _ = generate_regnet(w_a, w_0, w_m, depth)
    widths, depths = get_stages_from_blocks(blocks, blocks)
    widths, groups = adjust_ws_gs_comp(widths, [1.0] * stages, [group] * stages)
    return Stages(tuple(depths), tuple(int(w) for w in widths), tuple(int(g) for g in groups))


REGNETY = {
    # 200MF's widths, shallower, and a stride less: for images of 32-64 px (the demo, CIFAR)
    "regnety-tiny": Stages((1, 1, 2, 2), (24, 56, 152, 368), (8, 8, 8, 8), strides=(1, 2, 2, 2)),
    "regnety-200mf": quantised(13, 24, 36.44, 2.49, 8),
    "regnety-400mf": quantised(16, 48, 27.89, 2.09, 8),
    "regnety-600mf": quantised(15, 48, 32.54, 2.32, 16),
    "regnety-800mf": quantised(14, 56, 38.84, 2.4, 16),
    "regnety-1.6gf": quantised(27, 48, 20.71, 2.65, 24),
    "regnety-3.2gf": quantised(21, 80, 42.63, 2.66, 24),
    "regnety-4gf": quantised(22, 96, 31.41, 2.24, 64),
    "regnety-6.4gf": quantised(25, 112, 33.22, 2.27, 72),
    "regnety-8gf": quantised(17, 192, 76.82, 2.19, 56),
    "regnety-12gf": quantised(19, 168, 73.36, 2.37, 112),
    "regnety-16gf": quantised(18, 200, 106.23, 2.48, 112),
    "regnety-32gf": quantised(20, 232, 115.89, 2.53, 232),
    "regnety-64gf": quantised(20, 352, 147.48, 2.4, 328),
    "regnety-128gf": quantised(27, 456, 160.83, 2.52, 264),
    "regnety-256gf": quantised(27, 640, 230.83, 2.53, 373),
    "regnety-10b": quantised(27, 1744, 620.83, 2.52, 1010),
}


def anynet(stages: Stages, stem: str) -> AnyNet:
    """The bare pycls model, classifier and all."""
    return AnyNet(
        stem_type=STEMS[stem],
        stem_w=stages.stem_width,
        block_type="res_bottleneck_block",
        ds=stages.depths,
        ws=stages.widths,
        ss=stages.strides,
        bms=[1.0] * len(stages.depths),
        gws=stages.group_widths,
        se_r=SE_RATIO,
        nc=1,
    )


class RegNetY(nn.Module):
    """Stem, stages, global average pool."""

    run: Callable[[nn.Module, Tensor], Tensor]

    def __init__(self, stages: Stages, stem: str, norm: str = "bn"):
        super().__init__()
        model = anynet(stages, stem)
        if norm == "gn_ws":
            without_batchnorm(model)
        self.width = stages.widths[-1]
        self.spread: Spread | None = None  # of the last stage's channels, where they are padded
        self.run = plain  # how a block is gone through: what is kept, what is compiled (learn/fit.py)
        for name, child in model.named_children():
            if name != "head":
                self.add_module(name, child)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.4 x faster on CPUs (bench/step.py)

    def blocks(self) -> Iterator[nn.Module]:
        return (block for name, stage in self.named_children() if name != "stem" for block in stage.children())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.stem(images_BCHW.contiguous(memory_format=torch.channels_last))  # type: ignore[operator]
        for block in self.blocks():
            x = self.run(block, x)
        features = x.mean((2, 3))
        return features if self.spread is None else self.spread.true(features, 1)


def padded(trunk: RegNetY, multiple: int) -> None:
    """From now on `trunk` computes its groups in multiples of `multiple` channels (padding.py).

    Raises TypeError, with nothing changed, for other norms than BatchNorm.
    """
    other = [m for m in trunk.modules() if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and type(m) is not nn.BatchNorm2d]
    if other:
        raise TypeError(f"{type(other[0]).__name__} cannot be padded")
    before: Spread | None = None
    for block in trunk.blocks():
        f: Any = block.f
        spread = spread_of(f.b.groups, f.b.weight.shape[1], multiple)
        convs = [(f, "a", before, spread), (f, "b", spread, spread), (f, "c", spread, spread)]
        convs += [(f.se.f_ex, "0", spread, None), (f.se.f_ex, "2", None, spread)]
        norms = [(f, "a_bn"), (f, "b_bn"), (f, "c_bn")]
        if block.proj_block:
            convs.append((block, "proj", before, spread))
            norms.append((block, "bn"))
        for parent, name, ins, outs in convs:
            conv = Conv2d.of(getattr(parent, name))
            conv.ins, conv.outs = ins, outs
            setattr(parent, name, conv)
        for parent, name in norms if spread is not None else ():
            assert spread is not None
            setattr(parent, name, BatchNorm2d.of(getattr(parent, name), spread))
        before = trunk.spread = spread


def plain(block: nn.Module, x_BCHW: Tensor) -> Tensor:
    return block(x_BCHW)
