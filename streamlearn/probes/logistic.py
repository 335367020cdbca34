"""Logistic probe: L-BFGS in float64, its regularisation swept; and few labels.  Shapes: N bank images, M test images, D features, C classes.

`sweep` follows DINOv2's logistic protocol: L2-normalised features, C = 10^linspace(-6, 5, 45), at most 1,000 iterations, the best C on held-out
bank images (here a tenth), then a fit on all.  The loss is scikit-learn's: C sum_i loss_i + |W|^2 / 2, the intercept free; the same C
means the same.  From small C to large each fit starts where the last ended: the optimum is the same, reached in fewer iterations.

`low_shot` follows MSN: logistic regression with |W|^2 lambda / 2 + the mean loss, lambda = 0.0025, on a share of the bank, drawn evenly from the classes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from streamlearn.probes.linear import good, held_out
from streamlearn.probes.statistics import spread

SWEEP = tuple(10 ** (-6 + 11 * i / 44) for i in range(45))
ITERATIONS = 1000
MSN_LAMBDA = 0.0025
SHARES = {"low_shot_1": 0.01, "low_shot_10": 0.10}
_FLAT = 1e-4  # times the tolerance: a change of the loss in one iteration that ends a fit too


Check = Callable[[], object]  # raises what shall end a fit that is under way: a sweep takes minutes, and a role has two to end in


def go_on() -> None:
    """Nobody ends it."""


@dataclass
class Logistic:
    """Weights (D+1,C): the last row is the intercept."""

    weights_DC: Tensor

    def scores(self, X_MD: Tensor) -> Tensor:
        """(M,C) logits."""
        X_MD = F.normalize(X_MD.double(), dim=1)
        return X_MD @ self.weights_DC[:-1] + self.weights_DC[-1]


def fit(
    bank_ND: Tensor,
    labels: Tensor,
    classes: int,
    C: float,
    *,
    start: Logistic | None = None,
    iterations: int = ITERATIONS,
    tolerance: float = 1e-5,
    check: Check = go_on,
) -> Logistic:
    """Softmax for (N,) classes; one sigmoid a class for (N,C) labels, over the images in which it is judged.

    `tolerance`: largest gradient of the mean loss, per component, at which a fit ends.  `check` is called before each evaluation of the loss.
    """
    X_ND = F.normalize(bank_ND.double(), dim=1)
    D = X_ND.shape[1]
    W_DC = start.weights_DC.clone() if start else torch.zeros(D + 1, classes, dtype=torch.float64)
    W_DC.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [W_DC],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=tolerance,
        tolerance_change=tolerance * _FLAT,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    decay = 1 / (2 * C * len(X_ND))

    def loss() -> Tensor:
        check()
        optimizer.zero_grad()
        logits = X_ND @ W_DC[:-1] + W_DC[-1]
        value = _mean_loss(logits, labels) + decay * W_DC[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Logistic(W_DC.detach())


def _mean_loss(logits_NC: Tensor, labels: Tensor) -> Tensor:
    if labels.ndim == 1:
        return F.cross_entropy(logits_NC, labels)
    # C independent problems in one: each class's loss counts the images in which it is judged; the sum is over N, as the softmax's
    losses = F.binary_cross_entropy_with_logits(logits_NC, (labels == 1).double(), reduction="none")
    return (losses * (labels >= 0)).sum() / len(labels)


def sweep(bank_ND: Tensor, labels: Tensor, test_MD: Tensor, *, grid: Sequence[float] = SWEEP, check: Check = go_on) -> tuple[Tensor, float]:
    """(M,C) logits, and the C that was chosen.  No seed: the same features give the same figures."""
    classes = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
    held = held_out(labels)
    best, best_grade, best_C, current = None, -math.inf, sorted(grid)[len(grid) // 2], None
    for C in sorted(grid):
        current = fit(bank_ND[~held], labels[~held], classes, C, start=current, check=check)
        grade = good(current.scores(bank_ND[held]), labels[held])
        if grade > best_grade:
            best, best_grade, best_C = current, grade, C
    return fit(bank_ND, labels, classes, best_C, start=best, check=check).scores(test_MD), best_C


def draws(labels: Tensor, share: float, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Indices of each draw: of (N,) classes at least one of each, the same number of all; of (N,C) labels images at random."""
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        if labels.ndim == 2:
            yield torch.randperm(len(labels), generator=g)[: max(1, round(share * len(labels)))].sort().values
            continue
        groups = [torch.nonzero(labels == c).flatten() for c in range(int(labels.max()) + 1)]
        each = max(1, round(share * len(labels) / len(groups)))
        yield torch.cat([group[torch.randperm(len(group), generator=g)[:each]] for group in groups]).sort().values


def low_shot(
    bank_ND: Tensor, labels: Tensor, test_MD: Tensor, truth: Tensor, *, share: float, seeds: int, check: Check = go_on
) -> dict[str, float]:
    """Mean, standard deviation over `seeds` draws, images in each.  Accuracy, or mAP of a multi-label bank."""
    classes = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
    grades, images = [], 0
    for some in draws(labels, share, range(seeds)):
        images = len(some)
        model = fit(bank_ND[some], labels[some], classes, 1 / (MSN_LAMBDA * images), check=check)
        grades.append(good(model.scores(test_MD), truth))
    mean, deviation = spread(grades)
    return {"mean": mean, "deviation": deviation, "seeds": seeds, "images": images}
