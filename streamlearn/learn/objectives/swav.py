"""SwAV: swapping assignments between views (Caron et al., arXiv:2006.09882)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamlearn.contract.config import ObjectiveConfig
from streamlearn.learn.losses import code_entropy, perplexity, sinkhorn, swapped_prediction
from streamlearn.learn.ranks import Ranks

USE_MEMORY = 0.99  # of the running count of prototype use: about the last hundred steps


class SwAV(nn.Module):
    """Prototypes, and the queue that stands behind a small batch.  All it remembers is in buffers and parameters.

    Shapes: z_VBD unit embeddings, the first A views assign codes; queue_AQD past embeddings of each assigning view, newest first.
    With several processes B is each one's own part.  The queue holds everybody's embeddings and is the same on every rank, as are
    prototypes and counts: the state of any rank is the whole state, and another number of ranks can go on from it.
    """

    use_K: Tensor
    queue_AQD: Tensor
    queued: Tensor
    entropy: Tensor

    def __init__(self, config: ObjectiveConfig, embedding: int, assign: int = 2, ranks: Ranks | None = None):
        super().__init__()
        self.config, self.ranks = config, ranks or Ranks()
        self.prototypes = nn.Linear(embedding, config.prototypes, bias=False)
        self.register_buffer("use_K", torch.zeros(config.prototypes))
        self.register_buffer("queue_AQD", torch.zeros(assign, config.queue, embedding))
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))  # rows of the queue that hold data
        self.register_buffer("entropy", torch.zeros(()))
        self._pending: tuple[Tensor, Tensor] | None = None
        self._full = False  # as far as this process knows: asking the device again and again would make the host wait for it
        self._to_sphere()

    def loss(self, z_VBD: Tensor, step: int, num_assign: int) -> tuple[Tensor, Tensor]:
        """((), (B,)) in nats, of a batch that is there at once: the mean, and each image's own without gradient."""
        loss_B = self.losses(z_VBD, self.targets(z_VBD[:num_assign], step))
        return loss_B.mean(), loss_B.detach()

    @torch.no_grad()
    def targets(self, z_ABD: Tensor, step: int) -> Tensor:
        """Codes (A,B,K) of the assigning views, over batch and queue of all ranks that assign together.  A collective.

        B is this rank's part of the whole batch, however many passes its gradient will take: codes of a part alone would be balanced
        over too few images.
        """
        z_ABD = z_ABD.detach()
        scores_ANK = self._scores(z_ABD)
        if self.config.queue and step >= self.config.queue_start and self._queue_is_full():
            # scores anew with today's prototypes; a queue that is not yet full of data is not used
            scores_ANK = torch.cat([scores_ANK, self._scores(self._own_queue(z_ABD.shape[1]))], dim=1)
        iterations, total = self.config.sinkhorn_iterations, self.ranks.total
        codes_ABK = sinkhorn(scores_ANK, epsilon=self.config.epsilon, iterations=iterations, total=total)[:, : z_ABD.shape[1]]
        if step < self.config.hard_steps:
            codes_ABK = torch.zeros_like(codes_ABK).scatter_(-1, codes_ABK.argmax(-1, keepdim=True), 1.0)
        self._pending = (z_ABD, codes_ABK)  # remembered only once the step proves sound
        return codes_ABK

    def losses(self, z_VBD: Tensor, codes_ABK: Tensor) -> Tensor:
        """(B,) in nats, with gradient.  The batch's loss is the mean over all ranks' images, so means of equal parts average to it."""
        return swapped_prediction(self._scores(z_VBD), codes_ABK, temperature=self.config.temperature)

    def before_step(self, step: int) -> None:
        """Frozen prototypes get no gradient at all: no momentum, no weight decay, no LARS."""
        if step < self.config.freeze_prototypes:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After a sound update: prototypes that moved go back to the unit sphere; the batch enters the memory.  A collective."""
        if step >= self.config.freeze_prototypes:  # frozen ones keep every bit: normalising again may round
            self._to_sphere()
        if self._pending is not None:
            self._remember(*self._pending)
            self._pending = None

    def measures(self) -> dict[str, float]:
        """Alarms for collapse, never scores: code entropy over ln K, perplexity of prototype use over K."""
        return {"code_entropy": float(self.entropy), "perplexity": float(perplexity(self.use_K))}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._full = False
        return super().load_state_dict(state_dict, strict, assign)

    @torch.no_grad()
    def _to_sphere(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def _scores(self, z_ABD: Tensor) -> Tensor:
        """In float32 whatever autocast says: VISSL calls it important for convergence (its swav_prototypes_head.py)."""
        with torch.autocast(z_ABD.device.type, enabled=False):
            scores: Tensor = self.prototypes(z_ABD.float())
        return scores

    def _queue_is_full(self) -> bool:
        self._full = self._full or int(self.queued) == self.config.queue
        return self._full

    def _own_queue(self, batch: int) -> Tensor:
        """(A,Q / world,D): the rows that this rank's own images left; together the ranks score every row once."""
        if self.ranks.world == 1:
            return self.queue_AQD
        batches = self.queue_AQD.unflatten(1, (-1, self.ranks.world, batch))  # it holds whole batches: build_objective sees to it
        return batches[:, :, self.ranks.rank].flatten(1, 2)

    def _remember(self, z_ABD: Tensor, codes_ABK: Tensor) -> None:
        chosen_K = torch.zeros_like(self.use_K)
        chosen = codes_ABK.argmax(-1).flatten()
        chosen_K.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=chosen_K.dtype))
        seen = self.ranks.total_of_all(torch.cat([chosen_K, code_entropy(codes_ABK.flatten(0, 1)).reshape(1)]))
        self.use_K.mul_(USE_MEMORY).add_(seen[:-1], alpha=1 - USE_MEMORY)
        self.entropy.copy_(seen[-1] / self.ranks.world)
        if self.config.queue:
            z_AND = self.ranks.gathered(z_ABD)
            self.queue_AQD.copy_(torch.cat([z_AND, self.queue_AQD], dim=1)[:, : self.config.queue])
            self.queued.add_(z_AND.shape[1]).clamp_(max=self.config.queue)
