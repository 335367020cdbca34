"""Closed-form linear probe.  Shapes: N bank images, M test images, D features, C classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

LAMBDAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # per sample, on standardised features
HOLDOUT = 10  # every tenth bank image chooses among them


@torch.inference_mode()
def ridge(bank_ND: Tensor, labels_N: Tensor, test_MD: Tensor, *, lambdas: tuple[float, ...] = LAMBDAS) -> Tensor:
    """(M,) predicted classes: ridge regression to one-hot targets on standardised features, in float64, no iterations, no seed.

    The regularisation is chosen on every tenth bank image, then all are fitted.
    """
    mean, std = bank_ND.double().mean(0), bank_ND.double().std(0) + 1e-6
    X_ND, T_MD = (bank_ND.double() - mean) / std, (test_MD.double() - mean) / std
    Y_NC = F.one_hot(labels_N, int(labels_N.max()) + 1).double()
    held = torch.zeros(len(X_ND), dtype=torch.bool)
    held[::HOLDOUT] = True
    scores = [float((_fit(X_ND[~held], Y_NC[~held], X_ND[held], x) == labels_N[held]).double().mean()) for x in lambdas]
    return _fit(X_ND, Y_NC, T_MD, lambdas[scores.index(max(scores))])


def _fit(X_ND: Tensor, Y_NC: Tensor, T_MD: Tensor, lam: float) -> Tensor:
    """Normal equations with an intercept (targets are centred, features are standardised)."""
    centre = Y_NC.mean(0)
    gram = X_ND.T @ X_ND / len(X_ND) + lam * torch.eye(X_ND.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, X_ND.T @ (Y_NC - centre) / len(X_ND))
    predicted: Tensor = (T_MD @ weights + centre).argmax(1)
    return predicted
