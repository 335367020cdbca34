"""Loss and assignment against an independent float64 reference, written from the paper's equations with loops and nothing of ours."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlearn.contract.config import ObjectiveConfig
from streamlearn.learn.losses import sinkhorn, swapped_prediction
from streamlearn.learn.objectives import SwAV


def reference_codes(scores, epsilon, iterations):
    """arXiv:2006.09882, equations 3 to 5: Q* = Diag(u) exp(C'Z / eps) Diag(v), by alternating normalisation; float64, shifted per matrix."""
    scores = np.asarray(scores, np.float64)
    q = np.exp((scores - scores.max()) / epsilon).T  # K x B
    K, B = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * K
        q /= q.sum(axis=0, keepdims=True) * B
    return (q * B).T


def reference_loss(scores_VBK, epsilon, iterations, temperature, assign):
    """Equations 1 and 2 with multi-crop: every assigning view against every other view."""
    scores = np.asarray(scores_VBK, np.float64)
    total, terms = 0.0, 0
    for a in range(assign):
        q = reference_codes(scores[a], epsilon, iterations)
        for v in range(len(scores)):
            if v == a:
                continue
            p = np.exp(scores[v] / temperature)
            p /= p.sum(axis=1, keepdims=True)
            total += -(q * np.log(p)).sum(axis=1).mean()
            terms += 1
    return total / terms


def scores(views, batch, prototypes, seed=0, width=16):
    g = torch.Generator().manual_seed(seed)
    z = torch.nn.functional.normalize(torch.randn(views, batch, width, generator=g), dim=-1)
    c = torch.nn.functional.normalize(torch.randn(prototypes, width, generator=g), dim=-1)
    return z @ c.T


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 0.015])
@pytest.mark.parametrize("iterations", [3, 10])
def test_codes_equal_the_papers_equations(epsilon, iterations):
    s = scores(1, 64, 48)[0]
    ours = sinkhorn(s, epsilon=epsilon, iterations=iterations).double().numpy()
    np.testing.assert_allclose(ours, reference_codes(s, epsilon, iterations), atol=1e-6)


@pytest.mark.parametrize(("views", "assign"), [(2, 2), (6, 2), (4, 1)])
def test_the_loss_equals_the_papers_equations(views, assign):
    s = scores(views, 32, 40)
    codes = torch.stack([sinkhorn(s[a], epsilon=0.05, iterations=3) for a in range(assign)])
    ours = float(swapped_prediction(s, codes, temperature=0.1).mean())
    assert ours == pytest.approx(reference_loss(s, 0.05, 3, 0.1, assign), rel=1e-6)


def test_the_objective_end_to_end_equals_the_papers_equations():
    objective = SwAV(ObjectiveConfig(prototypes=24, epsilon=0.05, freeze_prototypes=0), 16)
    z = torch.nn.functional.normalize(torch.randn(6, 20, 16, generator=torch.Generator().manual_seed(3)), dim=-1)
    loss, each = objective.loss(z, 0, 2)
    expected = reference_loss((z @ objective.prototypes.weight.T).detach(), 0.05, 3, 0.1, 2)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6) and float(each.mean()) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_equals_finite_differences_with_the_codes_held():
    s = scores(3, 6, 5).double()
    codes = torch.stack([sinkhorn(s[a], epsilon=0.05, iterations=3).double() for a in range(2)])

    def loss(x):
        log_p = torch.log_softmax(x / 0.1, -1)  # float64 twin of the loss, for the check
        return -sum((codes[a] * log_p[v]).sum(-1).mean() for a in range(2) for v in range(3) if v != a) / 4

    x = s.clone().requires_grad_()
    loss(x).backward()
    y = s.float().requires_grad_()
    swapped_prediction(y, codes.float(), temperature=0.1).mean().backward()
    torch.testing.assert_close(y.grad.double(), x.grad, atol=1e-7, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(2, 9), st.integers(0, 10**6))
def test_every_image_is_wholly_assigned_whatever_the_scores(batch, prototypes, seed):
    q = sinkhorn(scores(1, batch, prototypes, seed)[0], epsilon=0.05, iterations=3)
    torch.testing.assert_close(q.sum(1), torch.ones(batch))


def test_prototypes_are_balanced_when_given_time():
    q = sinkhorn(scores(1, 64, 16)[0], epsilon=0.25, iterations=200)
    torch.testing.assert_close(q.sum(0), torch.full((16,), 4.0), rtol=1e-3, atol=1e-3)


def test_identical_features_get_uniform_codes_and_a_loss_of_at_least_ln_k():
    z = torch.nn.functional.normalize(torch.ones(2, 10, 8), dim=-1)
    objective = SwAV(ObjectiveConfig(prototypes=12, freeze_prototypes=0), 8)
    s = objective.prototypes(z)
    q = sinkhorn(s[0].detach(), epsilon=0.05, iterations=3)
    torch.testing.assert_close(q, torch.full_like(q, 1 / 12), atol=1e-6, rtol=0)
    assert float(objective.loss(z, 0, 2)[0].detach()) >= math.log(12) - 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.005, 0.01, 0.05])
def test_codes_are_finite_and_right_in_every_dtype_and_at_every_epsilon(dtype, epsilon):
    s = torch.linspace(-1, 1, 32 * 16).view(32, 16).to(dtype)
    q = sinkhorn(s, epsilon=epsilon, iterations=3)
    assert torch.isfinite(q).all()
    np.testing.assert_allclose(q.numpy(), reference_codes_in_logs(s.double().numpy(), epsilon, 3), atol=1e-5)


def reference_codes_in_logs(scores, epsilon, iterations):
    """The same equations on float64 logarithms: at epsilon 0.005 even float64 exponentials underflow."""
    logs = scores / epsilon
    B, K = logs.shape

    def lse(x, axis):
        top = x.max(axis=axis, keepdims=True)
        return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))

    for _ in range(iterations):
        logs = logs - lse(logs, 0) - math.log(K)
        logs = logs - lse(logs, 1) - math.log(B)
    return np.exp(logs + math.log(B))


def test_a_queue_is_used_only_once_it_is_full_and_changes_the_codes():
    config = ObjectiveConfig(prototypes=8, queue=12, freeze_prototypes=0)
    objective, g = SwAV(config, 6), torch.Generator().manual_seed(0)

    def batch():
        return torch.nn.functional.normalize(torch.randn(2, 4, 6, generator=g), dim=-1)

    for filled in (4, 8, 12):
        z = batch()
        plain = sinkhorn(objective.prototypes(z)[0].detach(), epsilon=0.05, iterations=3)
        torch.testing.assert_close(objective.targets(z, 0)[0], plain)
        objective.loss(z, 0, 2)
        objective.after_step(0)
        assert int(objective.queued) == filled
    z = batch()
    s = objective.prototypes(z)[0].detach()
    stacked = torch.cat([s, objective.prototypes(objective.queue_AQD[0]).detach()])
    torch.testing.assert_close(objective.targets(z, 0)[0], sinkhorn(stacked, epsilon=0.05, iterations=3)[:4])


def test_the_queue_holds_the_newest_of_each_view_and_lets_the_oldest_go():
    objective = SwAV(ObjectiveConfig(prototypes=8, queue=10, freeze_prototypes=0), 6)
    seen = torch.nn.functional.normalize(torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    for z_VBD in seen:  # five batches of three views, of which two assign
        objective.loss(z_VBD, 0, 2)
        objective.after_step(0)
    for a in range(2):
        assert torch.equal(objective.queue_AQD[a], torch.cat([seen[i, a] for i in (4, 3, 2)])[:10])
    objective.loss(seen[0], 0, 2)  # of a step that does not prove sound nothing is remembered
    assert torch.equal(objective.queue_AQD[0, :4], seen[4, 0])


def official_step(z_VBD, prototypes_KD, queue_AQD, epsilon, iterations, temperature):
    """swav's training step re-derived in float64: codes over queue and batch of each assigning view, held; log-softmax of all others."""
    A, B = len(queue_AQD), z_VBD.shape[1]
    total = 0.0
    for a in range(A):
        scores = torch.cat([queue_AQD[a], z_VBD[a].detach()]) @ prototypes_KD.detach().T
        q = torch.from_numpy(reference_codes(scores.numpy(), epsilon, iterations))[-B:]
        others = [v for v in range(len(z_VBD)) if v != a]
        sub = 0.0
        for v in others:
            p = torch.softmax(z_VBD[v] @ prototypes_KD.T / temperature, dim=1)
            sub = sub - (q * torch.log(p)).sum(1).mean()
        total = total + sub / len(others)
    return total / A


@pytest.mark.parametrize("queue", [0, 40])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.03, 10)])
def test_loss_and_gradient_equal_the_official_step(queue, epsilon, iterations):
    """Tolerances of the reference: loss 1e-6 relative, gradient 1e-7 absolute, of 64 images, 300 prototypes, 6 views."""
    config = ObjectiveConfig(prototypes=300, epsilon=epsilon, sinkhorn_iterations=iterations, queue=queue, freeze_prototypes=0)
    objective, g = SwAV(config, 32), torch.Generator().manual_seed(5)
    if queue:
        objective.queue_AQD.copy_(torch.nn.functional.normalize(torch.randn(2, queue, 32, generator=g), dim=-1))
        objective.queued.fill_(queue)
    z = torch.nn.functional.normalize(torch.randn(6, 64, 32, generator=g), dim=-1).requires_grad_()
    loss, _ = objective.loss(z, 0, 2)
    loss.backward()
    z64 = z.detach().double().requires_grad_()
    c64 = objective.prototypes.weight.detach().double().requires_grad_()
    expected = official_step(z64, c64, objective.queue_AQD.double(), epsilon, iterations, 0.1)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(z.grad.double(), z64.grad, atol=1e-7, rtol=0)
    torch.testing.assert_close(objective.prototypes.weight.grad.double(), c64.grad, atol=1e-7, rtol=0)


@pytest.mark.parametrize("epsilon", [0.005, 0.008, 0.011])
def test_prototypes_far_from_every_image_keep_their_share(epsilon):
    """20 prototypes lie near the images and 280 far away: VISSL's shifted form empties those without a word, swav's overflows."""
    g = torch.Generator().manual_seed(2)
    s = torch.randn(64, 300, generator=g) * 0.02
    s[:, :20] = 0.9 + 0.1 * torch.rand(64, 20, generator=g)
    assert not torch.isfinite(torch.exp(s / epsilon)).all()
    q, truth = sinkhorn(s, epsilon=epsilon, iterations=10), reference_codes_in_logs(s.double().numpy(), epsilon, 10)
    np.testing.assert_allclose(q.numpy(), truth, atol=1e-5)
    np.testing.assert_allclose(q.sum(0).numpy(), truth.sum(0), rtol=1e-3)
    summed = sinkhorn(s, epsilon=epsilon, iterations=10, total=lambda x: x)  # the form that ranks use
    np.testing.assert_allclose(summed.numpy(), truth, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.005, 0.015, 0.05])
@pytest.mark.parametrize("iterations", [3, 10])
@pytest.mark.parametrize("total", [None, lambda x: x], ids=["one", "ranks"])
def test_codes_are_as_exact_at_a_small_epsilon_as_at_a_large_one(epsilon, iterations, total):
    """score / epsilon is 200 at 0.005, where float32 rounds 8e-6 off: what is normalised must be small."""
    for seed in range(20):
        s = scores(1, 64, 48, seed)[0]
        ours = sinkhorn(s, epsilon=epsilon, iterations=iterations, total=total).double().numpy()
        np.testing.assert_allclose(ours, reference_codes_in_logs(s.double().numpy(), epsilon, iterations), atol=1e-6, rtol=0)


def test_both_views_at_once_are_each_alone():
    s = scores(2, 32, 20)
    together = sinkhorn(s, epsilon=0.03, iterations=3)
    for a in range(2):
        assert torch.equal(together[a], sinkhorn(s[a], epsilon=0.03, iterations=3))


def test_hard_codes_are_the_likeliest_prototype_and_soft_ones_follow():
    objective = SwAV(ObjectiveConfig(prototypes=9, hard_steps=3, freeze_prototypes=0), 6)
    z = torch.nn.functional.normalize(torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    hard, soft = objective.targets(z, 2), objective.targets(z, 3)
    assert torch.equal(hard, torch.nn.functional.one_hot(soft.argmax(-1), 9).float()) and not torch.equal(hard, soft)


def test_autocast_leaves_scores_codes_and_loss_in_float32():
    objective = SwAV(ObjectiveConfig(prototypes=9, freeze_prototypes=0), 6)
    z = torch.nn.functional.normalize(torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    plain, _ = objective.loss(z, 0, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective.targets(z[:2], 0).dtype == torch.float32
        assert torch.equal(objective.loss(z, 0, 2)[0], plain)
