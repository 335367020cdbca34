"""Closed-form linear probe.  Shapes: N bank images, M test images, D features, C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from streamlearn.probes.average_precision import mean_ap

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # per sample, on standardised features
HOLDOUT = 10  # every tenth bank image chooses among them


@torch.inference_mode()
def ridge_scores(bank_ND: Tensor, labels: Tensor, test_MD: Tensor, *, lambdas: tuple[float, ...] = LAMBDAS) -> Tensor:
    """(M,C) regressed targets: ridge regression to one-hot targets on standardised features, in float64, no iterations, no seed.

    The regularisation is chosen on every tenth bank image (accuracy; mAP of a multi-label bank), then all are fitted.
    `labels`: (N,) classes; or (N,C) of a multi-label bank: each class is fitted on the images in which it is judged.
    """
    mean, std = bank_ND.double().mean(0), bank_ND.double().std(0) + 1e-6
    X_ND, T_MD = (bank_ND.double() - mean) / std, (test_MD.double() - mean) / std
    held = torch.zeros(len(X_ND), dtype=torch.bool)
    held[::HOLDOUT] = True
    if len(lambdas) > 1:
        grades = [good(scores(X_ND[~held], labels[~held], X_ND[held], x, _classes(labels)), labels[held]) for x in lambdas]
        lambdas = (lambdas[grades.index(max(grades))],)
    return scores(X_ND, labels, T_MD, lambdas[0], _classes(labels))


def ridge(bank_ND: Tensor, labels_N: Tensor, test_MD: Tensor, *, lambdas: tuple[float, ...] = LAMBDAS) -> Tensor:
    """(M,) predicted classes."""
    return ridge_scores(bank_ND, labels_N, test_MD, lambdas=lambdas).argmax(1)


def scores(X_ND: Tensor, labels: Tensor, T_MD: Tensor, lam: float, classes: int) -> Tensor:
    """(M,C) at one regularisation."""
    if labels.ndim == 1:
        return _fit(X_ND, F.one_hot(labels, classes).double(), T_MD, lam)
    whole = (labels >= 0).all(0)
    out_MC = torch.zeros(len(T_MD), classes, dtype=torch.float64)
    if whole.any():
        out_MC[:, whole] = _fit(X_ND, labels[:, whole].double(), T_MD, lam)
    for c in torch.nonzero(~whole).flatten().tolist():
        judged = labels[:, c] >= 0
        if judged.any():
            out_MC[:, c] = _fit(X_ND[judged], labels[judged, c : c + 1].double(), T_MD, lam)[:, 0]
    return out_MC


def good(scores_MC: Tensor, labels: Tensor) -> float:
    """Accuracy, or mAP of a multi-label bank."""
    if labels.ndim == 1:
        return float((scores_MC.argmax(1) == labels).double().mean())
    return mean_ap(scores_MC.double().numpy(), labels.numpy())


def _classes(labels: Tensor) -> int:
    return int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def _fit(X_ND: Tensor, Y_NC: Tensor, T_MD: Tensor, lam: float) -> Tensor:
    """Normal equations with an intercept: what is not penalised is the mean of the targets."""
    mean_D, centre_C = X_ND.mean(0), Y_NC.mean(0)
    X_ND = X_ND - mean_D
    gram = X_ND.T @ X_ND / len(X_ND) + lam * torch.eye(X_ND.shape[1], dtype=torch.float64)
    weights_DC: Tensor = torch.linalg.solve(gram, X_ND.T @ (Y_NC - centre_C) / len(X_ND))
    predicted: Tensor = (T_MD - mean_D) @ weights_DC + centre_C
    return predicted
