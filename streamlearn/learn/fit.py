"""How the model is computed on this machine: precision, memory and kernels.  What it computes stays the same up to rounding."""

import ctypes
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamlearn.contract.config import Config
from streamlearn.learn.backbones import build
from streamlearn.learn.backbones.regnet import RegNetY, padded, plain
from streamlearn.learn.backbones.remade import bottleneck
from streamlearn.learn.model import Model
from streamlearn.learn.tuning import tune

CACHE = "kernels.json"  # in the home
KINDS = 64  # of blocks to compile: eight at each of a few resolutions, with and without gradient; torch gives up at 8
Norm = nn.modules.batchnorm._BatchNorm
logger = logging.getLogger(__name__)


def fit(model: Model, config: Config, world: int = 1) -> None:
    """Set `model`, on its device, to be computed as `config.train` says.  State dict, parameters and their order stay as they are."""
    train, trunk = config.train, model.trunk
    assert isinstance(trunk, RegNetY)
    model.precision = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
    if train.pad_groups:
        padded(trunk, train.pad_groups)
    if train.kernels == "measured":
        with torch.device("meta"):
            bare = build(config.model.backbone, config.model.stem)
        assert isinstance(bare, RegNetY)
        if train.pad_groups:
            padded(bare, train.pad_groups)
        images = (train.micro_batch or train.batch // world) if world else train.batch
        sizes = [(crop.count * images, crop.size) for crop in config.stream.crops]
        torch.backends.cudnn.benchmark = True  # among the library's own kernels, likewise
        tune(trunk, bare, sizes, Path(config.home) / CACHE, model.precision)
    trunk.run = {"none": plain, "selective": bottleneck, "full": whole_again}[train.recompute]
    if train.compile:
        trunk.run = compiled(trunk.run)
    if torch.device(train.device).type == "cpu":
        keep_pages()


def whole_again(block: nn.Module, x_NCHW: Tensor) -> Tensor:
    """Nothing inside the block is kept: its forward pass is run again in the backward pass."""
    if not torch.is_grad_enabled():
        return plain(block, x_NCHW)
    again = partial(_contexts, [m for m in block.modules() if isinstance(m, Norm)])
    y: Tensor = checkpoint(plain, block, x_NCHW, use_reentrant=False, preserve_rng_state=False, context_fn=again)
    return y


def _contexts(norms: Sequence[Norm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """(of the forward pass, of the same pass made again)."""
    return nullcontext(), unmoved(norms)


@contextmanager
def unmoved(norms: Sequence[Norm]) -> Iterator[None]:
    """The norms normalise by the batch, as in training, and their running statistics do not move: they have seen this batch."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def compiled(run: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """`run` through torch.compile, a graph for each kind of block and shape; without gradient as it is."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6 has the second
    setattr(torch._dynamo.config, limit, max(KINDS, getattr(torch._dynamo.config, limit)))
    fast = torch.compile(run, dynamic=False)
    return lambda block, x: fast(block, x) if torch.is_grad_enabled() else run(block, x)


def keep_pages() -> None:
    """glibc: memory that is freed stays with the process.  Else each activation is pages from the kernel, which zeroes them every time."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option in (_M_MMAP_MAX, _M_TRIM_THRESHOLD):
        mallopt(*option)


_M_MMAP_MAX = (-4, 0)  # no allocation is a mapping of its own
_M_TRIM_THRESHOLD = (-1, 2**31 - 1)  # the heap's end is not given back
