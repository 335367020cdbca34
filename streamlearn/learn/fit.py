"""How the model is computed on this machine: precision, memory and kernels.  What it computes stays the same up to rounding."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.learn.backbones import build
from streamlearn.learn.backbones.forms import as_products
from streamlearn.learn.backbones.regnet import RegNetY, padded, plain
from streamlearn.learn.backbones.remade import bottleneck
from streamlearn.learn.model import Model
from streamlearn.learn.tuning import tune

Run = Callable[[nn.Module, Tensor], Tensor]
CACHE = "kernels.json"  # in the home
KINDS = 64  # of blocks to compile: eight at each of a few resolutions, with and without gradient; torch gives up at 8
logger = logging.getLogger(__name__)


def fit(model: Model, config: Config, world: int = 1) -> None:
    """Set `model`, on its device, to be computed as `config.train` says, in each of `world` processes.  Raises ConfigError.

    State dict, parameters and their order stay as they are.
    """
    train, trunk = config.train, model.trunk
    assert isinstance(trunk, RegNetY)
    model.precision = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
    if train.pad_groups:
        try:
            padded(trunk, train.pad_groups)
        except TypeError as e:
            raise ConfigError(f"train.pad_groups = {train.pad_groups}: {e}: only BatchNorm is made for it; set it to 0") from e
    if next(trunk.parameters()).device.type == "cpu":
        as_products(trunk)
    if train.kernels == "measured":
        with torch.device("meta"):
            bare = build(config.model.backbone, config.model.stem, config.model.norm)
        assert isinstance(bare, RegNetY)
        if train.pad_groups:
            padded(bare, train.pad_groups)
        images = min(train.micro_batch or train.batch, train.batch // world)
        sizes = [(crop.count * images, crop.size) for crop in config.stream.crops]
        torch.backends.cudnn.benchmark = True  # among the library's own kernels, likewise
        tune(trunk, bare, sizes, Path(config.home) / CACHE, model.precision)
    trunk.run = compiled(plain) if train.compile else plain
    if train.recompute == "selective" and not train.compile:  # a compiler chooses by itself what to make again, and norms are among it
        trunk.run = bottleneck
    elif train.recompute == "full":
        trunk.run = partial(whole_again, run=trunk.run)


def whole_again(block: nn.Module, x_NCHW: Tensor, run: Run = plain) -> Tensor:
    """Nothing inside the block is kept: its forward pass is run again in the backward pass."""
    if not torch.is_grad_enabled():
        return run(block, x_NCHW)
    twice = partial(_contexts, [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)])
    y: Tensor = checkpoint(run, block, x_NCHW, use_reentrant=False, preserve_rng_state=False, context_fn=twice)
    return y


def _contexts(norms: Sequence[nn.Module]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """(of the forward pass, of the same pass made again)."""
    return nullcontext(), unmoved(norms)


@contextmanager
def unmoved(norms: Sequence[nn.Module]) -> Iterator[None]:
    """The norms do as ever, but on copies of their running statistics: the true ones have seen this batch already."""
    true = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in true:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in true:
            setattr(norm, name, buffer)


def compiled(run: Run, backend: str = "inductor") -> Run:
    """`run` through torch.compile, a graph for each kind of block and shape; without gradient as it is."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6 has the second
    setattr(torch._dynamo.config, limit, max(KINDS, getattr(torch._dynamo.config, limit)))
    fast = torch.compile(run, dynamic=False, backend=backend)
    return lambda block, x: fast(block, x) if torch.is_grad_enabled() else run(block, x)
