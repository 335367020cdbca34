"""The gradient of one batch, at once or in parts.

In parts, where the batch is larger than memory: adding up the gradients of small losses is not enough, because SwAV's codes are
balanced over the batch, and over 256 images K = 3000 prototypes cannot be (swav's issue 12: it does not converge).  So

  1. embed    the assigning views of every part, without gradient; BatchNorm's running statistics stay as they were
  2. assign   codes over the whole batch, all ranks and the queue
  3. learn    every part again, with gradient, against its codes; the gradients add up to that of the mean over the batch

The price is step 1, a forward pass of the large crops: 24 % of the arithmetic of a step at 2 x 224 + 4 x 96, 33 % where the head has
BatchNorm and needs all crops.  Loss, codes and gradients are those of the whole batch taken at once, with one exception:
BatchNorm normalises over the part at hand.  So did SEER's, over the 128 to 2,048 images of a SyncBN group (8 to 64 GPUs): a part here
is a group there, so keep it at a few hundred images.  In both passes a part's statistics are the same: codes and predictions
come of the same network.  Running statistics take one step of their average a part; what is published has them estimated anew.
Without BatchNorm nothing differs from the whole batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from streamlearn.learn.model import Model
from streamlearn.learn.objectives import Objective
from streamlearn.learn.parallel import unaveraged


def backward(
    model: Model, objective: Objective, crops: Sequence[Tensor], step: int, *, part: int = 0, spread: nn.Module | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the gradient of the mean loss over the batch to `.grad`; `part` images at a time, 0: all at once.

    crops: one (V_r,B,3,S_r,S_r) a resolution, the first resolution's views assign.  Returns the loss (), each image's (B,), both in
    nats, and the embeddings (V,B,D), without gradient.  `spread`: what to call in place of the model where it is on many ranks
    (parallel.py); the model's gradient is then the mean over them.
    """
    learning = spread or model
    device = next(model.parameters()).device
    num_assign, batch = crops[0].shape[:2]
    if not part or part >= batch:
        z_VBD = learning([crop.to(device, non_blocking=True) for crop in crops])
        loss_B = objective.losses(z_VBD, objective.targets(z_VBD[:num_assign], step))
        loss = loss_B.mean()
        loss.backward()
        return loss.detach(), loss_B.detach(), z_VBD.detach()

    def embedded(at: int, resolutions: int, by: nn.Module) -> Tensor:
        embeddings: Tensor = by([crop[:, at : at + part].to(device, non_blocking=True) for crop in crops[:resolutions]])
        return embeddings

    assigning = 1 if model.views_apart else len(crops)  # resolutions that the codes depend on
    with torch.no_grad(), buffers_kept(model):
        z_ABD = torch.cat([embedded(at, assigning, model)[:num_assign] for at in range(0, batch, part)], dim=1)
    codes_ABK = objective.targets(z_ABD, step)
    losses, embeddings = [], []
    for at in range(0, batch, part):
        with unaveraged(learning) if at + part < batch else nullcontext():
            z_VbD = embedded(at, len(crops), learning)
            loss_b = objective.losses(z_VbD, codes_ABK[:, at : at + part])
            (loss_b.sum() / batch).backward()
        losses.append(loss_b.detach())
        embeddings.append(z_VbD.detach())
    loss_B = torch.cat(losses)
    return loss_B.mean(), loss_B, torch.cat(embeddings, dim=1)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """What a forward pass does to buffers is undone."""
    before = [b.clone() for b in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
