"""Closed-form linear probe.  Shapes: N bank images, M test images, D features, C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from streamlearn.probes.average_precision import mean_ap

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # per sample, on standardised features
HOLDOUT = 10  # one bank image of ten chooses among them


@torch.inference_mode()
def ridge_scores(bank_ND: Tensor, labels: Tensor, test_MD: Tensor, *, lambdas: tuple[float, ...] = LAMBDAS) -> Tensor:
    """(M,C) regressed targets: ridge regression to one-hot targets on standardised features, in float64, no iterations, no seed.

    The regularisation is chosen on a tenth of the bank (accuracy; mAP of a multi-label bank), then all are fitted.
    `labels`: (N,) classes; or (N,C) of a multi-label bank: each class is fitted on the images in which it is judged.
    """
    mean, std = bank_ND.double().mean(0), bank_ND.double().std(0) + 1e-6
    X_ND, T_MD = (bank_ND.double() - mean) / std, (test_MD.double() - mean) / std
    held = held_out(labels)
    if len(lambdas) > 1:
        tried = scores(X_ND[~held], labels[~held], X_ND[held], lambdas, _classes(labels))
        grades = [good(scores_HC, labels[held]) for scores_HC in tried]
        lambdas = (lambdas[grades.index(max(grades))],)
    return scores(X_ND, labels, T_MD, lambdas, _classes(labels))[0]


def ridge(bank_ND: Tensor, labels_N: Tensor, test_MD: Tensor, *, lambdas: tuple[float, ...] = LAMBDAS) -> Tensor:
    """(M,) predicted classes."""
    return ridge_scores(bank_ND, labels_N, test_MD, lambdas=lambdas).argmax(1)


def scores(X_ND: Tensor, labels: Tensor, T_MD: Tensor, lambdas: tuple[float, ...], classes: int) -> list[Tensor]:
    """(M,C) at each regularisation."""
    if labels.ndim == 1:
        return _fits(X_ND, F.one_hot(labels, classes).double(), T_MD, lambdas)
    whole = (labels >= 0).all(0)
    out = [torch.zeros(len(T_MD), classes, dtype=torch.float64) for _ in lambdas]
    # one fit for the classes that are judged in every image, one for each of the others
    groups = [torch.nonzero(whole).flatten(), *torch.nonzero(~whole)]
    for c in groups:
        judged = (labels[:, c] >= 0).all(1)
        if len(c) and judged.any():
            for out_MC, found in zip(out, _fits(X_ND[judged], labels[judged][:, c].double(), T_MD, lambdas), strict=True):
                out_MC[:, c] = found
    return out


def held_out(labels: Tensor) -> Tensor:
    """(N,) a tenth of the images: of (N,) classes every tenth of each that has two or more, of (N,C) labels by a fixed draw.

    Whatever order they are in: in banks whose classes take turns, every tenth image would be of one class.
    """
    N = len(labels)
    held = torch.zeros(N, dtype=torch.bool)
    if labels.ndim == 2:
        held[torch.randperm(N, generator=torch.Generator().manual_seed(0))[: max(1, N // HOLDOUT)]] = True
        return held
    for c in range(_classes(labels)):
        own = torch.nonzero(labels == c).flatten()
        if len(own) > 1:
            held[own[::HOLDOUT]] = True
    return held


def good(scores_MC: Tensor, labels: Tensor) -> float:
    """Accuracy, or mAP of a multi-label bank."""
    if labels.ndim == 1:
        return float((scores_MC.argmax(1) == labels).double().mean())
    return mean_ap(scores_MC.double().numpy(), labels.numpy())


def _classes(labels: Tensor) -> int:
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def _fits(X_ND: Tensor, Y_NC: Tensor, T_MD: Tensor, lambdas: tuple[float, ...]) -> list[Tensor]:
    """(M,C) for each: normal equations with an intercept, which is not penalised.  With fewer images than features, their dual: the same answer."""
    N, D = X_ND.shape
    mean_D, centre_C = X_ND.mean(0), Y_NC.mean(0)
    X_ND, Y_NC, T_MD = X_ND - mean_D, Y_NC - centre_C, T_MD - mean_D
    dual = N < D
    gram = X_ND @ X_ND.T / N if dual else X_ND.T @ X_ND / N
    right = Y_NC / N if dual else X_ND.T @ Y_NC / N
    found = []
    for lam in lambdas:
        root = torch.linalg.cholesky(gram + lam * torch.eye(len(gram), dtype=torch.float64))
        solved = torch.cholesky_solve(right, root)
        found.append(T_MD @ (X_ND.T @ solved if dual else solved) + centre_C)
    return found
