"""The exponential moving average that is published, and BatchNorm's statistics for it."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from streamlearn.learn.parallel import local

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """A second copy of the model.  Weights are averaged; buffers (BatchNorm's running statistics) are copied."""

    def __init__(self, model: M, decay: float):
        self.model, self.decay = copy.deepcopy(model), decay
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After the update that made `step`.  Early steps count for more: min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([local(p) for p in self.model.parameters()], [local(p.detach()) for p in model.parameters()], 1 - decay)
        self._copy_buffers(model, self.model)

    def undo_buffers(self, model: nn.Module) -> None:
        """Give the model back the buffers of its last sound step: a forward pass over bad data has spoilt them."""
        self._copy_buffers(self.model, model)

    @staticmethod
    @torch.no_grad()
    def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
        for to, at in zip(target.buffers(), source.buffers(), strict=True):
            to.copy_(at)


@torch.no_grad()
def calibrated(trunk: nn.Module, images_NCHW: Tensor, batch: int = 128) -> nn.Module:
    """A copy of `trunk` whose BatchNorm statistics are true averages over the images (N,3,H,W), in eval mode.

    Averaged weights never saw the activations whose statistics were averaged with them; without this the published model is
    measurably worse.  Batches are equal in size, so the cumulative average is exact; a smaller rest is left out.
    """
    trunk = copy.deepcopy(trunk)
    norms = [m for m in trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative
    trunk.train()
    batch = min(batch, len(images_NCHW))
    for start in range(0, len(images_NCHW) - batch + 1, batch):
        trunk(images_NCHW[start : start + batch])
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return trunk.eval()
