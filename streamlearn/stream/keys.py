"""Counter-based randomness: every draw is a hash of what it is for, so nothing depends on who draws first.

numpy's generators may change their streams between versions (NEP 19); splitmix64 and BLAKE2b will not.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


def mix(x: U64) -> U64:
    """splitmix64's finaliser, elementwise."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key(*parts: object) -> np.uint64:
    """One key from a tuple of plain values."""
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little"))


def draws(k: np.uint64, count: int) -> U64:
    """`count` independent 64-bit draws under one key."""
    return mix(np.arange(count, dtype=np.uint64) ^ k)


def permutation(k: np.uint64, n: int) -> NDArray[np.int64]:
    """A keyed permutation of 0..n-1: sorting by hash."""
    return np.argsort(draws(k, n), kind="stable")


def uniform(keys_B: U64, salt: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each key; another `salt` gives an independent one.  A column of salts gives a row for each."""
    return (mix(keys_B ^ mix(np.array(salt, dtype=np.uint64))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def among(numbers_N: NDArray[np.int64], rising_M: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) whether each is one of these, which rise: a search, where numpy's isin would sort or hash both."""
    if not len(rising_M):
        return np.zeros(len(numbers_N), bool)
    return rising_M[np.minimum(np.searchsorted(rising_M, numbers_N), len(rising_M) - 1)] == numbers_N
