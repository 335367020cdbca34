"""Weighted k-nearest-neighbour probe.  Shapes: N bank images, M test images, D features, C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode()
def knn(bank_ND: Tensor, labels_N: Tensor, test_MD: Tensor, *, k: int = 20, temperature: float = 0.07, chunk: int = 512) -> Tensor:
    """(M,) predicted classes: cosine similarity, votes exp(s / T) of the k nearest (Wu et al. 2018; DINO's protocol: k = 20, T = 0.07)."""
    bank_ND, test_MD = F.normalize(bank_ND.float(), dim=1), F.normalize(test_MD.float(), dim=1)
    classes = int(labels_N.max()) + 1
    found = []
    for part_PD in test_MD.split(chunk):
        s_Pk, at_Pk = (part_PD @ bank_ND.T).topk(min(k, len(bank_ND)), dim=1)
        votes_PC = torch.zeros(len(part_PD), classes).scatter_add_(1, labels_N[at_Pk], (s_Pk / temperature).exp())
        found.append(votes_PC.argmax(1))
    return torch.cat(found)


def accuracy(predicted_M: Tensor, labels_M: Tensor) -> float:
    return float((predicted_M == labels_M).double().mean())
