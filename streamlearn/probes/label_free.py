"""Label-free measures of features (N,D): alarms for collapse, never scores.  All in float64.

They compare snapshots of one run at best; a random network has a high rank too.
"""

import torch
from torch import Tensor


def effective_rank(features_ND: Tensor) -> float:
    """exp H(lambda / sum lambda) over the eigenvalues of the centred covariance (Roy & Vetterli 2007).  1: collapsed."""
    x = features_ND.double()
    power = torch.linalg.svdvals(x - x.mean(0)) ** 2
    return _exp_entropy(power)


def rankme(features_ND: Tensor) -> float:
    """exp H(sigma / |sigma|_1 + 1e-7) over the singular values, not centred (Garrido et al., arXiv:2210.02885, equation 1)."""
    sigma = torch.linalg.svdvals(features_ND.double())
    p = sigma / sigma.sum().clamp_min(1e-300) + 1e-7
    return float((-(p * p.log()).sum()).exp())


def participation_ratio(features_ND: Tensor) -> float:
    """(sum lambda)^2 / sum lambda^2 of the centred covariance."""
    x = features_ND.double()
    power = torch.linalg.svdvals(x - x.mean(0)) ** 2
    return float(power.sum() ** 2 / (power**2).sum().clamp_min(1e-300))


def _exp_entropy(weights: Tensor) -> float:
    p = weights / weights.sum().clamp_min(1e-300)
    return float(torch.special.entr(p).sum().exp())
