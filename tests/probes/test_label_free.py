"""Label-free measures equal their formulas, written again in numpy, and the answers known in closed form."""

import math

import numpy as np
import pytest
import torch

from streamlearn.probes.label_free import (
    alarms,
    alignment,
    alpha_req,
    code_entropy,
    effective_rank,
    lidar,
    participation_ratio,
    prototype_perplexity,
    rankme,
    uniformity,
)


def orthogonal(n, r, seed=0):
    """n centred rows whose covariance has r equal eigenvalues."""
    x = np.random.default_rng(seed).standard_normal((n, r))
    q, _ = np.linalg.qr(x - x.mean(0))
    return torch.from_numpy(q)


def cloud(n=300, d=12, seed=0):
    """Correlated, off centre."""
    g = np.random.default_rng(seed)
    return g.standard_normal((n, d)) @ g.standard_normal((d, d)) + g.standard_normal(d)


def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("r", [1, 3, 10])
def test_ranks_of_known_data(r):
    z = orthogonal(200, r) @ torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0][:r])
    assert effective_rank(z) == pytest.approx(r, rel=1e-9) and participation_ratio(z) == pytest.approx(r, rel=1e-9)
    assert rankme(z) == pytest.approx(r, rel=1e-3)


def test_ranks_equal_their_formulas():
    x = cloud()
    z = torch.from_numpy(x)
    power = np.linalg.eigvalsh(np.cov(x.T, bias=True))
    p = power / power.sum()
    assert effective_rank(z) == pytest.approx(math.exp(entropy(p)), rel=1e-9)
    assert participation_ratio(z) == pytest.approx(1 / (p**2).sum(), rel=1e-9)
    sigma = np.sqrt(np.linalg.eigvalsh(x.T @ x))
    q = sigma / sigma.sum() + 1e-7
    assert rankme(z) == pytest.approx(math.exp(-(q * np.log(q)).sum()), rel=1e-9)


def test_an_isotropic_cloud_has_nearly_all_of_its_dimensions_and_no_slope():
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((60_000, 32)))
    assert effective_rank(z) == pytest.approx(32, rel=1e-3) and participation_ratio(z) == pytest.approx(32, rel=2e-3)
    assert abs(alpha_req(z)) < 0.05


def test_a_collapsed_network_is_seen():
    z = torch.ones(100, 8) + 1e-6 * torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 8)
    assert effective_rank(z) < 1.1 and rankme(z) < 1.01 and uniformity(z) > -1e-3
    assert {"effective_rank", "rankme", "uniformity"} <= set(
        alarms({n: f(z) for n, f in (("effective_rank", effective_rank), ("rankme", rankme), ("uniformity", uniformity))})
    )
    nothing = torch.ones(100, 8)
    assert participation_ratio(nothing) == 0.0 and math.isnan(alpha_req(nothing)) and effective_rank(nothing) == 1.0


def test_a_healthy_network_and_missing_measures_raise_no_alarm():
    assert (
        alarms(
            {
                "effective_rank": 40.0,
                "rankme": 90.0,
                "uniformity": -2.5,
                "code_entropy": 0.5,
                "prototype_perplexity": 0.7,
                "alpha_req": math.nan,
            }
        )
        == []
    )
    assert alarms({}) == [] and alarms({"code_entropy": 0.999, "prototype_perplexity": 0.005}) == ["prototype_perplexity", "code_entropy"]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(alpha):
    z = orthogonal(400, 60) * torch.arange(1, 61).double() ** (-alpha / 2)
    assert alpha_req(z) == pytest.approx(alpha, abs=1e-6)


def test_the_exponent_equals_a_least_squares_fit_over_eigenvalues_11_and_on():
    x = cloud(500, 40)
    power = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))[::-1]
    slope = np.polyfit(np.log(np.arange(11, 41)), np.log(power[10:]), 1)[0]
    assert alpha_req(torch.from_numpy(x)) == pytest.approx(-slope, rel=1e-9)


def test_uniformity_and_alignment_equal_their_formulas():
    x, y = cloud(60, 6), cloud(60, 6, seed=1)
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    pairs = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(60) for j in range(i)]
    assert uniformity(torch.from_numpy(x)) == pytest.approx(math.log(np.mean(pairs)), rel=1e-9)
    views = torch.from_numpy(np.stack([x, y], 1))
    assert alignment(views) == pytest.approx(np.mean(((u - v) ** 2).sum(1)), rel=1e-9)
    third = cloud(60, 6, seed=2)
    w = third / np.linalg.norm(third, axis=1, keepdims=True)
    every = np.mean([((a - b) ** 2).sum(1) for a, b in ((u, v), (u, w), (v, w))])
    assert alignment(torch.from_numpy(np.stack([x, y, third], 1))) == pytest.approx(every, rel=1e-9)


def test_uniformity_of_the_uniform_sphere_and_of_two_points():
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((3000, 128)))
    assert uniformity(z) == pytest.approx(
        -4 + 8 / 128, abs=0.01
    )  # |z_i - z_j|^2 is about 2 with variance 4 / D: log E exp = -4 + 2^2 * 4 / D / 2
    assert uniformity(torch.tensor([[1.0, 0], [-1.0, 0]])) == pytest.approx(-8.0)
    assert alignment(torch.ones(5, 3, 4)) == pytest.approx(0.0, abs=1e-12)


def test_lidar_equals_its_formula():
    g = np.random.default_rng(0)
    z = g.standard_normal((40, 1, 6)) @ np.diag([3, 2, 1, 1, 0.5, 0.1]) + 0.3 * g.standard_normal((40, 7, 6))
    mean = z.mean(1)
    between = np.cov(mean.T, bias=True)
    within = np.mean([np.outer(v - m, v - m) for m, views in zip(mean, z, strict=True) for v in views], 0) + 1e-4 * np.eye(6)
    values, vectors = np.linalg.eigh(within)
    half = vectors @ np.diag(values**-0.5) @ vectors.T
    power = np.abs(np.linalg.eigvalsh(half @ between @ half))
    p = power / power.sum() + 1e-7
    assert lidar(torch.from_numpy(z)) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-7)


@pytest.mark.parametrize("r", [1, 4])
def test_lidar_counts_the_directions_in_which_images_differ_more_than_their_views(r):
    noise = torch.randn(50, 8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - noise.mean(1, keepdim=True)
    between = torch.zeros(50, 10, dtype=torch.float64)
    between[:, :r] = 100 * orthogonal(50, r)
    white = torch.linalg.cholesky(torch.linalg.inv(noise.flatten(0, 1).T @ noise.flatten(0, 1) / 400))
    assert lidar(between[:, None] + noise @ white) == pytest.approx(r, rel=1e-2)


def test_prototypes_and_codes_in_closed_form():
    even = torch.eye(8).repeat(5, 1)
    one = torch.zeros(40, 8)
    one[:, 3] = 1
    assert prototype_perplexity(even) == pytest.approx(1.0) and prototype_perplexity(one) == pytest.approx(1 / 8)
    assert code_entropy(even) == pytest.approx(0.0, abs=1e-12) and code_entropy(torch.full((4, 8), 1 / 8)) == pytest.approx(1.0)
    half = torch.zeros(4, 8)
    half[:, :2] = 0.5
    assert code_entropy(half) == pytest.approx(math.log(2) / math.log(8))
