"""Weighted k-nearest-neighbour probe.  Shapes: N bank images, M test images, D features, C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode()
def knn_scores(bank_ND: Tensor, labels: Tensor, test_MD: Tensor, *, k: int = 20, temperature: float = 0.07, chunk: int = 512) -> Tensor:
    """(M,C) votes: cosine similarity, exp(s / T) of the k nearest (Wu et al. 2018; DINO's protocol: k = 20, T = 0.07).

    `labels`: (N,) classes; or (N,C) of a multi-label bank, whose votes are shares of the neighbours that are judged (0.5 where none is).
    """
    bank_ND, test_MD = F.normalize(bank_ND.float(), dim=1), F.normalize(test_MD.float(), dim=1)
    found = []
    for part_PD in test_MD.split(chunk):
        s_Pk, at_Pk = (part_PD @ bank_ND.T).topk(min(k, len(bank_ND)), dim=1)
        votes_Pk = (s_Pk / temperature).exp()
        if labels.ndim == 1:
            found.append(torch.zeros(len(part_PD), int(labels.max()) + 1).scatter_add_(1, labels[at_Pk], votes_Pk))
            continue
        near_PkC = labels[at_Pk]
        yes, judged = ((votes_Pk[..., None] * mask).sum(1) for mask in (near_PkC == 1, near_PkC >= 0))
        found.append(torch.where(judged > 0, yes / judged, 0.5))
    return torch.cat(found)


def knn(bank_ND: Tensor, labels_N: Tensor, test_MD: Tensor, *, k: int = 20, temperature: float = 0.07, chunk: int = 512) -> Tensor:
    """(M,) predicted classes."""
    return knn_scores(bank_ND, labels_N, test_MD, k=k, temperature=temperature, chunk=chunk).argmax(1)


def accuracy(predicted_M: Tensor, labels_M: Tensor) -> float:
    return float((predicted_M == labels_M).double().mean())
