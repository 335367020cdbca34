"""Label-free measures: alarms for collapse, never scores.  All in float64.

They compare snapshots of one run at best; a random network has a high rank too.  Shapes: N images, D features, Q views of an image, K prototypes.
Eigenvalues lambda_1 >= lambda_2 ... are those of the centred covariance, 1/N sum (z - mean)(z - mean)'; sigma are singular values of Z itself.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

RANKME_EPSILON = 1e-7
LIDAR_DELTA = 1e-4
ALPHA_FROM, ALPHA_TO = 11, 500  # eigenvalues of the fit, counted from 1
PAIRS = 4096  # images, at most, whose pairs the uniformity is taken over


def eigenvalues(features_ND: Tensor) -> Tensor:
    """(min(N,D),) of the centred covariance, the largest first."""
    x = features_ND.double()
    return torch.linalg.svdvals(x - x.mean(0)) ** 2 / len(x)


def effective_rank(features_ND: Tensor) -> float:
    """exp H(p), p_k = lambda_k / sum lambda (Roy & Vetterli, The effective rank, EUSIPCO 2007, on the covariance).  1: collapsed."""
    return _exp_entropy(eigenvalues(features_ND))


def participation_ratio(features_ND: Tensor) -> float:
    """(sum lambda)^2 / sum lambda^2 (Gao et al., bioRxiv 214262, 2017).  Between 1 and D; D for an isotropic cloud."""
    power = eigenvalues(features_ND)
    return float(power.sum() ** 2 / (power**2).sum().clamp_min(1e-300))


def rankme(features_ND: Tensor) -> float:
    """exp(-sum p log p), p_k = sigma_k / |sigma|_1 + 1e-7, not centred (Garrido et al., arXiv:2210.02885, equations 1 and 2)."""
    return _rank_of(torch.linalg.svdvals(features_ND.double()), RANKME_EPSILON)


def alpha_req(features_ND: Tensor) -> float:
    """Exponent of lambda_i ~ i^-alpha: minus the least-squares slope of log lambda_i on log i (Agrawal et al., alpha-ReQ, NeurIPS 2022).

    Over i = 11 ... 500 as in Stringer et al. 2019, whom they follow, less what is numerically zero; over all of them where that leaves under
    ten.  About 1 is good; 0: isotropic; large: collapsed.  NaN with fewer than two eigenvalues.
    """
    power = eigenvalues(features_ND)
    power = power[power > power[:1] * 1e-10]
    first = ALPHA_FROM - 1 if len(power) - (ALPHA_FROM - 1) >= 10 else 0
    power = power[first:ALPHA_TO]
    if len(power) < 2:
        return math.nan
    x, y = torch.arange(first + 1, first + 1 + len(power)).double().log(), power.log()
    x = x - x.mean()
    return -float((x * y).sum() / (x * x).sum())


def lidar(views_NQD: Tensor) -> float:
    """exp(-sum p log p) of the eigenvalues of S_w^-1/2 S_b S_w^-1/2, p as RankMe's (Thilak et al., LiDAR, arXiv:2312.04000, section 3).

    S_b: covariance of the images' means over their views; S_w: mean covariance of the views about their image's mean, plus 1e-4 I.
    The paper takes 1,000 images and 50 views.  Between 1 and min(N-1, D).
    """
    z = views_NQD.double()
    mean_ND = z.mean(1)
    between = mean_ND - mean_ND.mean(0)
    within = (z - mean_ND[:, None]).flatten(0, 1)
    S_b, S_w = between.T @ between / len(between), within.T @ within / len(within)
    # the eigenvalues of S_w^-1/2 S_b S_w^-1/2 by a Cholesky factor of S_w: L^-1 S_b L^-T has the same
    L = torch.linalg.cholesky(S_w + LIDAR_DELTA * torch.eye(z.shape[2], dtype=torch.float64))
    half = torch.linalg.solve_triangular(L, S_b, upper=False)
    power = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.T, upper=False))
    return _rank_of(power.clamp_min(0), RANKME_EPSILON)


def uniformity(features_ND: Tensor) -> float:
    """log of the mean of exp(-2 |z_i - z_j|^2) over pairs i < j on the unit sphere (Wang & Isola, arXiv:2005.10242, equation 3, t = 2).

    0: all in one place; about -4 at best.  Over the first 4,096 images.
    """
    z = F.normalize(features_ND[:PAIRS].double(), dim=1)
    squared = torch.nn.functional.pdist(z) ** 2
    return float(torch.logsumexp(-2 * squared, 0) - math.log(len(squared)))


def alignment(views_NQD: Tensor) -> float:
    """Mean of |z_1 - z_2|^2 over pairs of views of one image, on the unit sphere (Wang & Isola, arXiv:2005.10242, equation 2, alpha = 2).

    0 is best, and what a collapsed network has: read it with uniformity.
    """
    z = F.normalize(views_NQD.double(), dim=2)
    Q = z.shape[1]
    # over ordered pairs of different views: sum |z_a - z_b|^2 = 2 Q sum |z_a|^2 - 2 |sum z_a|^2
    total = 2 * Q * z.square().sum((1, 2)) - 2 * z.sum(1).square().sum(1)
    return float((total / (Q * (Q - 1))).mean())


def prototype_perplexity(codes_BK: Tensor) -> float:
    """exp H(u) / K, u the share of images whose largest code is each prototype's (SwAV's clusters).  1: all used alike; 1/K: one takes all."""
    K = codes_BK.shape[1]
    use = torch.bincount(codes_BK.argmax(1), minlength=K).double()
    return _exp_entropy(use) / K


def code_entropy(codes_BK: Tensor) -> float:
    """Mean of H(q_i) / ln K over the assignments q_i.  1: every image is everything, the codes say nothing, the loss is ln K exactly."""
    q = codes_BK.double()
    q = q / q.sum(1, keepdim=True)
    return float(torch.special.entr(q).sum(1).mean() / math.log(q.shape[1]))


# name -> (below, or above, which value it is raised).  reference/learning.md, 1.3 and 4: rank 1.5 to 3 whenever SwAV had stalled
ALARMS: dict[str, tuple[str, float]] = {
    "effective_rank": ("below", 3.0),
    "rankme": ("below", 3.0),
    "participation_ratio": ("below", 1.5),
    "uniformity": ("above", -0.05),
    "alpha_req": ("above", 5.0),
    "lidar": ("below", 2.0),
    "prototype_perplexity": ("below", 0.02),
    "code_entropy": ("above", 0.98),
}


def alarms(measured: Mapping[str, float]) -> list[str]:
    """Names of the measures that say `collapsed`; what was not measured, or is no number, says nothing."""
    raised = []
    for name, (side, limit) in ALARMS.items():
        value = measured.get(name)
        if value is not None and (value < limit if side == "below" else value > limit):
            raised.append(name)
    return raised


def _rank_of(weights: Tensor, epsilon: float) -> float:
    p = weights / weights.sum().clamp_min(1e-300) + epsilon
    return float((-(p * p.log()).sum()).exp())


def _exp_entropy(weights: Tensor) -> float:
    p = weights / weights.sum().clamp_min(1e-300)
    return float(torch.special.entr(p).sum().exp())
