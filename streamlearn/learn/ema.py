"""The moving average that is published, and BatchNorm's statistics for it.

How far back an average should reach depends on how long the rate has stood: shortly after a change the weights still move, and an average over
much of the past lags behind them; long after it they only jitter about where they have settled, and the longer the average the less of that is
left.  No constant horizon is right for both, so it grows:

    horizon  =  share x updates since the rate last changed,  at least 1 / (1 - least),  at most 1 / (1 - most)

With horizon = share x t the average over t updates is Shamir and Zhang's polynomial-decay averaging (arXiv:1212.1824) with eta = 1 / share - 1,
eta updates later: its weights are binomials, which the tests hold it to, and its mean age is always the same part of t.  When the rate changes
(halved, set by an operator, lowered after a collapse, configured anew, annealed on a branch) the horizon begins anew at its least, and what was
averaged so far is forgotten at that pace: it is never thrown away at once, for bare weights would then be published.

On a quadratic whose loss is known (bench.averages) the longer average is the better one at every stop, and a share of 0.1 leaves half the loss of
a constant 0.999 after 24,000 steps; beginning anew costs about a tenth there, where nothing ever drifts, against the rest of an older rate's lag.

The count of updates is no state of its own: it follows from the step and from the step of the last change, which the policy's state has.
Going back to a checkpoint brings both back.
"""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Ema(Generic[M]):
    """A second copy of the model.  Weights are averaged; buffers (BatchNorm's running statistics) are copied."""

    def __init__(self, model: M, decay: float, share: float = 0.0, most: float = 0.9999):
        """`decay`: at least; `share`: what the horizon grows by per update, 0 for a constant one; `most`: never beyond this decay."""
        self.model, self.decay, self.share, self.most = copy.deepcopy(model), decay, share, most
        self.model.requires_grad_(False)

    def decay_at(self, step: int, since: int = 0) -> float:
        """Of the update from `step` to `step` + 1, where the rate stands as it is since step `since`."""
        updates = max(1, step + 1 - since)
        grown = min(self.most, 1 - 1 / max(1.0, self.share * updates))
        return min(max(self.decay, grown), (1 + step) / (10 + step))  # the random beginning is forgotten fast

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, since: int = 0) -> None:
        """After the update from `step` to `step` + 1."""
        decay = self.decay_at(step, since)
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        self._copy_buffers(model, self.model)

    def undo_buffers(self, model: nn.Module) -> None:
        """Give the model back the buffers of its last sound step: a forward pass over bad data has spoilt them."""
        self._copy_buffers(self.model, model)

    @staticmethod
    @torch.no_grad()
    def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
        for to, at in zip(target.buffers(), source.buffers(), strict=True):
            to.copy_(at)


def batchnorms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """What has statistics of the images, SyncBatchNorm included."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def calibrated(trunk: nn.Module, images_NCHW: Tensor, batch: int = 128) -> nn.Module:
    """A copy of `trunk` whose BatchNorm statistics are true averages over the images (N,3,H,W), in eval mode.

    Averaged weights never saw the activations whose statistics were averaged with them; without this the published model is
    measurably worse.  Batches are equal in size, so the cumulative average is exact; a smaller rest is left out.  A trunk without
    BatchNorm has nothing to estimate: no image is looked at.
    """
    trunk = copy.deepcopy(trunk)
    norms = batchnorms(trunk)
    if not norms:
        return trunk.eval()
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
