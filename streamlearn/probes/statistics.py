"""Error bars and paired comparisons.  All in float64 or exact integers; what draws takes a seed, so figures can be made again.

Two snapshots are compared on the same images: at 10,000 of them a paired test sees 0.3 points, where two separate intervals need 1.4.
"""

import base64
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution
BOOTSTRAPS = 1000
Floats = NDArray[np.float64]


def wilson(right: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927): sound near 0 and 1, where p ± z sqrt(p q / n) is not.  (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    p, share = right / total, z * z / total
    centre = (p + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(p * (1 - p) / total + share / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """One against the other on the same images."""

    images: int
    only_one: int  # right by the first alone
    only_other: int  # right by the second alone
    difference: float  # accuracy of the second minus the first's
    low: float  # 95 %
    high: float
    p: float  # exact two-sided McNemar


def mcnemar(one_M: NDArray[np.bool_], other_M: NDArray[np.bool_]) -> Paired:
    """Exact McNemar test: of the images that one of the two gets right, a fair coin would say which (McNemar 1947; binomial, not chi-squared).

    The interval of the difference is Wald's for paired proportions.  Raises ValueError unless both are of the same images.
    """
    if one_M.shape != other_M.shape or not len(one_M):
        raise ValueError(f"{one_M.shape} and {other_M.shape} answers: a paired test needs the same images, one or more")
    n = len(one_M)
    b, c = int((one_M & ~other_M).sum()), int((~one_M & other_M).sum())
    spread = Z95 * math.sqrt(max(0.0, b + c - (c - b) ** 2 / n)) / n
    d = (c - b) / n
    return Paired(n, b, c, d, max(-1.0, d - spread), min(1.0, d + spread), binomial_two_sided(min(b, c), b + c))


def binomial_two_sided(k: int, n: int) -> float:
    """min(1, 2 P(X <= k)), X ~ Binomial(n, 1/2), in whole numbers."""
    term = total = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, float(2 * total / 2**n)) if n < 1000 else min(1.0, 2.0 * _ratio(total, n))


def _ratio(total: int, n: int) -> float:
    """total / 2^n where 2^n is no float."""
    shift = max(0, total.bit_length() - 64)
    return math.ldexp(float(total >> shift), shift - n)


def bootstrap(values_M: Floats, *, seed: int, rounds: int = BOOTSTRAPS) -> tuple[float, float]:
    """95 % percentile interval of a mean (Efron 1979)."""
    g = np.random.default_rng(seed)
    means = [values_M[g.integers(0, len(values_M), len(values_M))].mean() for _ in range(rounds)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds."""
    x = np.array(values)
    return float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else 0.0


def packed(right_M: NDArray[np.bool_]) -> str:
    """Which test images were right, one bit each, for paired tests later on."""
    return base64.b64encode(np.packbits(right_M).tobytes()).decode()


def unpacked(text: str, images: int) -> NDArray[np.bool_]:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=images).astype(bool)
