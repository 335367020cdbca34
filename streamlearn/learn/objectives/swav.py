"""SwAV: swapping assignments between views (Caron et al., arXiv:2006.09882)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamlearn.contract.config import ObjectiveConfig
from streamlearn.learn.losses import code_entropy, perplexity, sinkhorn, swapped_prediction

USE_MEMORY = 0.99  # of the running count of prototype use: about the last hundred steps


class SwAV(nn.Module):
    """Prototypes, and the queue that stands behind a small batch.  All it remembers is in buffers and parameters.

    Shapes: z_VBD unit embeddings, the first A views assign codes; queue_AQD past embeddings of each assigning view.
    """

    use_K: Tensor
    queue_AQD: Tensor
    queued: Tensor
    entropy: Tensor

    def __init__(self, config: ObjectiveConfig, embedding: int, assign: int = 2):
        super().__init__()
        self.config = config
        self.prototypes = nn.Linear(embedding, config.prototypes, bias=False)
        self.register_buffer("use_K", torch.zeros(config.prototypes))
        self.register_buffer("queue_AQD", torch.zeros(assign, config.queue, embedding))
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))  # rows of the queue that hold data
        self.register_buffer("entropy", torch.zeros(()))
        self._pending: tuple[Tensor, Tensor] | None = None
        self._to_sphere()

    def loss(self, z_VBD: Tensor, step: int, num_assign: int) -> tuple[Tensor, Tensor]:
        """((), (B,)) in nats: the mean, and each image's own without gradient.

        Codes are assigned for each of the first `num_assign` views over batch and queue.
        """
        scores_VBK = self.prototypes(z_VBD)
        codes_ABK = torch.stack([self._codes(scores_VBK[a].detach(), a, step) for a in range(num_assign)])
        self._pending = (z_VBD[:num_assign].detach(), codes_ABK)  # remembered only once the step proves sound
        loss_B = swapped_prediction(scores_VBK, codes_ABK, temperature=self.config.temperature)
        return loss_B.mean(), loss_B.detach()

    def before_step(self, step: int) -> None:
        """Frozen prototypes get no gradient at all: no momentum, no weight decay, no LARS."""
        if step < self.config.freeze_prototypes:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After a sound update: prototypes that moved go back to the unit sphere; the batch enters the memory."""
        if step >= self.config.freeze_prototypes:  # frozen ones keep every bit: normalising again may round
            self._to_sphere()
        if self._pending is not None:
            self._remember(*self._pending)
            self._pending = None

    def measures(self) -> dict[str, float]:
        """Alarms for collapse, never scores: code entropy over ln K, perplexity of prototype use over K."""
        return {"code_entropy": float(self.entropy), "perplexity": float(perplexity(self.use_K))}

    @torch.no_grad()
    def _to_sphere(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def _codes(self, scores_BK: Tensor, view: int, step: int) -> Tensor:
        B = len(scores_BK)
        if self.config.queue and step >= self.config.queue_start and int(self.queued) == self.config.queue:
            # scores anew with today's prototypes; a queue that is not yet full of data is not used
            queued_QK = self.prototypes(self.queue_AQD[view]).detach()
            scores_BK = torch.cat([scores_BK, queued_QK])
        return sinkhorn(scores_BK, epsilon=self.config.epsilon, iterations=self.config.sinkhorn_iterations)[:B]

    def _remember(self, z_ABD: Tensor, codes_ABK: Tensor) -> None:
        chosen_K = torch.bincount(codes_ABK.argmax(-1).flatten(), minlength=self.config.prototypes)
        self.use_K.mul_(USE_MEMORY).add_(chosen_K, alpha=1 - USE_MEMORY)
        self.entropy.copy_(code_entropy(codes_ABK.flatten(0, 1)))
        if self.config.queue:
            self.queue_AQD.copy_(torch.cat([z_ABD, self.queue_AQD], dim=1)[:, : self.config.queue])
            self.queued.add_(z_ABD.shape[1]).clamp_(max=self.config.queue)
