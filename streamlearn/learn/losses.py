"""Objective maths: tensors in, tensors out.  No modules, no config, no process group.

Shapes, in the suffix of every tensor's name:
  B = images in the batch   K = prototypes   D = embedding width   V = views of one image   A = views that assign codes
  N = rows that are assigned together: the batch, and the queue behind it
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def sinkhorn(scores_ANK: Tensor, *, epsilon: float, iterations: int, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Balanced soft assignments (...,N,K), for each leading index alone: every row sums to 1, every column to about N/K.

    Sinkhorn-Knopp of SwAV (arXiv:2006.09882, section 3.1), on logarithms and in float32: exp(1 / 0.0113) is already float32's
    largest number, so the plain form overflows at the epsilon that small batches need, and in float16 at 0.05; VISSL's form, shifted
    by the one largest score, stays finite, but a prototype far from every image underflows to nothing, and the codes are wrong.
    The constants 1/N and 1/K of the marginals cancel and are left out.

    `total` sums in place over the processes whose rows are assigned together; it is called once an iteration, with all of (...,1,K).
    What it sums is exponentials in float64, not shifted by a maximum that would have to be agreed on first: with |score| <= 1 a prototype's
    sum over images that are each normalised moves by less than exp(2 / epsilon + ln N) an iteration, and float64 holds that for
    every epsilon from 0.003 on.
    """
    scores_ANK = scores_ANK.float()
    # a column's shift cancels in the first normalisation; of 1 / epsilon = 67 float32 rounds off 4e-6, which the largest codes would be wrong by
    shift_A1K = scores_ANK.amax(-2, keepdim=True)
    logits_ANK = (scores_ANK - shift_A1K).div_(epsilon)
    work_ANK, off_A1K = torch.empty_like(logits_ANK), shift_A1K.double() / epsilon
    for _ in range(iterations):
        own_A1K = _exp(logits_ANK, -2, work_ANK)[1]
        logits_ANK.sub_(own_A1K if total is None else (total((own_A1K.double() + off_A1K).exp()).log() - off_A1K).float())
        off_A1K = torch.zeros_like(off_A1K)
        sums_AN1, rows_AN1 = _exp(logits_ANK, -1, work_ANK)
        logits_ANK.sub_(rows_AN1)
    return work_ANK.div_(sums_AN1)


def _exp(x: Tensor, dim: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """`out` becomes exp(x - its largest along `dim`); the sums of that, at least 1, and ln of the sums of exp(x)."""
    top = x.amax(dim, keepdim=True)
    sums = torch.sub(x, top, out=out).exp_().sum(dim, keepdim=True)
    return sums, top + sums.log()


def swapped_prediction(scores_VBK: Tensor, codes_ABK: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of every view's prediction against every *other* view's code, mean over pairs; (B,) in nats.

    SwAV, equation 2, with multi-crop (section 3.2): the codes come from the first A views only.  Sum of targets per view first:
    one product a view instead of one a pair, the same number.
    """
    V, A = len(scores_VBK), len(codes_ABK)
    log_p_VBK = F.log_softmax(scores_VBK.float() / temperature, dim=-1)
    targets_BK = codes_ABK.sum(0)
    total_B = scores_VBK.new_zeros(scores_VBK.shape[1], dtype=torch.float32)
    for v in range(V):
        others_BK = targets_BK - codes_ABK[v] if v < A else targets_BK
        total_B = total_B - (others_BK * log_p_VBK[v]).sum(-1)
    return total_B / (A * (V - 1))


def code_entropy(codes_NK: Tensor) -> Tensor:
    """Mean entropy of the codes over ln K, in [0, 1].  1 means uniform codes, that is collapse."""
    entropy_N = torch.special.entr(codes_NK.float()).sum(-1)
    share: Tensor = entropy_N.mean() / math.log(codes_NK.shape[1])
    return share


def perplexity(use_K: Tensor) -> Tensor:
    """Perplexity of prototype use over K, in (0, 1]; `use_K` are counts or probabilities."""
    p_K = use_K.float() / use_K.sum().clamp_min(1e-12)
    share: Tensor = torch.special.entr(p_K).sum().exp() / len(use_K)
    return share


def effective_rank(features_BD: Tensor) -> Tensor:
    """exp of the entropy of the normalised eigenvalues of the centred covariance (Roy & Vetterli 2007); 1 means collapse."""
    centred_BD = features_BD.double() - features_BD.double().mean(0)
    power = torch.linalg.svdvals(centred_BD) ** 2
    p = power / power.sum().clamp_min(1e-300)
    rank: Tensor = torch.special.entr(p).sum().exp()
    return rank
