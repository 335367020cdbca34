"""Fréchet-64: has a source changed?  The distance between two clouds of features, in the 64 principal components of the first.

    d = |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)             Fréchet 1957, Dowson & Landau 1982; as in FID (arXiv:1706.08500)

Features are of one frozen snapshot, so what changes is the source and not the model.  The threshold is what windows of the same size show
when there is no drift: reference and window are both drawn from the reference, with replacement, again and again; the quantile of their distances
is the threshold.  On CIFAR-10 windows of 4,096 find two of ten classes gone, 20 % more of one class, or 5 % more brightness every time
(reference/learning.md, 2.2).  Shapes: N images of the reference, n of a window, D features, P components.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

COMPONENTS = 64
ROUNDS = 200  # of the bootstrap


@dataclass(frozen=True)
class Moments:
    mean_P: Tensor
    covariance_PP: Tensor

    @classmethod
    def of(cls, x_NP: Tensor) -> "Moments":
        mean = x_NP.mean(0)
        centred = x_NP - mean
        return cls(mean, centred.T @ centred / (len(x_NP) - 1))


def frechet(one: Moments, other: Moments) -> float:
    """Squared Fréchet distance of two Gaussians with these moments; 0 for equal ones, never below."""
    root = _root(one.covariance_PP)
    # C1^1/2 C2 C1^1/2 is symmetric, so its root comes from real eigenvalues; a general matrix root would be complex by rounding
    cross = torch.linalg.eigvalsh(root @ other.covariance_PP @ root).clamp_min(0).sqrt().sum()
    away = (one.mean_P - other.mean_P).square().sum()
    return max(0.0, float(away + one.covariance_PP.trace() + other.covariance_PP.trace() - 2 * cross))


def _root(C_PP: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(C_PP)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class Reference:
    """The first window of a source, and the space it spans."""

    def __init__(self, features_ND: Tensor, components: int = COMPONENTS):
        x = features_ND.double()
        self.mean_D = x.mean(0)
        _, _, Vt = torch.linalg.svd(x - self.mean_D, full_matrices=False)
        self.axes_PD = Vt[:components]
        self.points_NP = self.project(x)
        self.moments = Moments.of(self.points_NP)

    def project(self, features_ND: Tensor) -> Tensor:
        projected: Tensor = (features_ND.double() - self.mean_D) @ self.axes_PD.T
        return projected

    def distance(self, window_nD: Tensor) -> float:
        return frechet(self.moments, Moments.of(self.project(window_nD)))

    def threshold(self, window: int, *, false_alarm: float, seed: int, rounds: int = ROUNDS) -> float:
        """The distance that a window of this many images exceeds without drift in `false_alarm` of cases."""
        g = torch.Generator().manual_seed(seed)
        N = len(self.points_NP)
        found = []
        for _ in range(rounds):
            one, other = (self.points_NP[torch.randint(N, (count,), generator=g)] for count in (N, window))
            found.append(frechet(Moments.of(one), Moments.of(other)))
        return float(torch.tensor(found, dtype=torch.float64).quantile(1 - false_alarm))
