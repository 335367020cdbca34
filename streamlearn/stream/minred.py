"""MinRed: a replay buffer of minimum redundancy, for sources whose samples resemble their neighbours in time.

Source: Purushwalkam, Morgado, Gupta, "The Challenges of Continuous Self-Supervised Learning", ECCV 2022 (arXiv:2203.12710), section 4.2.
Newcomers are all admitted.  What is over the capacity is let go one by one: each time the sample whose nearest neighbour among those left is
nearest (cosine).  Only samples that were seen by the learner can be judged; while they are fewer than twice what must go, the oldest go.
A sample's feature is a moving average of what the learner made of it, each time normalised.  Two that are nearest to each other are redundant
alike; the paper leaves open which one goes.  Here the newer: with the older one gone each time, what is kept drifts along with the stream
(bench/correlated.py, 512 kept of 2,048 frames, two seeds: 8.4 and 8.9 classes in effect, against 7.4 and 6.8).

Which features a round may go by is fixed, so that batches can be made ahead and yet nothing depends on how far: the evictions in the record of
round r go by what was learnt up to the end of round r - 2.  They are written into the record, so the order of a recorded round is the same on
another machine or number of ranks, where the same features would come out a bit different.

The paper compares all pairs; of 65,536 features that is 17 GB.  Here up to GROUP features are compared exactly, and more are first split by
nearest pivot, so that near-duplicates meet: 65,536 cost as much as 32 times GROUP.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlearn.stream.keys import among, key, permutation
from streamlearn.stream.replay import I64, codes

DECAY = 0.5  # of the moving average; the authors' code has gamma = 0.5
GROUP = 2048  # features that are compared with each other
F32 = NDArray[np.float32]


class Features:
    """What the learner made of the samples that replay may keep: a settled average, and what came in since."""

    def __init__(self, codes_M: I64 | None = None, features_MD: NDArray[np.float16] | None = None):
        self._codes = np.empty(0, np.int64) if codes_M is None else codes_M  # rising
        self._features = np.empty((0, 0), np.float16) if features_MD is None else features_MD
        self._recent: list[tuple[int, I64, NDArray[np.float16]]] = []  # round, codes, features; in the order of learning

    def observe(self, round_: int, refs_B2: I64, features_BD: F32) -> None:
        """After a batch of this round.  Rows that are zero or not finite tell nothing."""
        norm = np.linalg.norm(features_BD, axis=1)
        told = np.isfinite(norm) & (norm > 0)
        unit = (features_BD[told] / norm[told, None]).astype(np.float16)
        self._recent.append((round_, codes(refs_B2[told]), unit))

    def settle(self, through: int, refs_N2: I64) -> None:
        """Bring the averages up to the end of round `through`, a round at a time; forget all but these samples."""
        while self._recent and self._recent[0][0] <= through:
            done = [r for r in self._recent if r[0] == self._recent[0][0]]
            self._recent = self._recent[len(done) :]
            self._fold(np.concatenate([r[1] for r in done]), np.concatenate([r[2] for r in done]))
        stay = among(self._codes, np.sort(codes(refs_N2)))
        if not stay.all():
            self._codes, self._features = self._codes[stay], self._features[stay]

    def of(self, refs_N2: I64) -> tuple[NDArray[np.bool_], F32]:
        """((N,) seen, (N,D)): the settled averages of these samples."""
        wanted = codes(refs_N2)
        seen = among(wanted, self._codes)
        found = np.zeros((len(wanted), self._features.shape[1]), np.float32)
        found[seen] = self._features[np.searchsorted(self._codes, wanted[seen])]
        return seen, found

    def _fold(self, codes_B: I64, features_BD: NDArray[np.float16]) -> None:
        """Each sample's features one after another, in their order."""
        every = np.union1d(self._codes, codes_B)
        known = among(every, self._codes)
        average = np.zeros((len(every), features_BD.shape[1]), np.float32)
        average[known] = self._features.reshape(-1, features_BD.shape[1])
        by_code = np.argsort(codes_B, kind="stable")
        start = np.flatnonzero(np.diff(codes_B[by_code], prepend=-1))
        turn = np.empty(len(codes_B), np.int64)  # how often the sample had come before
        turn[by_code] = np.arange(len(codes_B)) - np.repeat(start, np.diff(start, append=len(codes_B)))
        for t in range(int(turn.max(initial=-1)) + 1):
            at, new = np.searchsorted(every, codes_B[turn == t]), features_BD[turn == t].astype(np.float32)
            mean = np.where(known[at, None], DECAY * average[at] + (1 - DECAY) * new, new)
            average[at] = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
            known[at] = True
        self._codes, self._features = every, average.astype(np.float16)

    def state_dict(self) -> dict[str, Any]:
        """No copies: arrays are never written to again."""
        recent = [(r, torch.from_numpy(c), torch.from_numpy(f)) for r, c, f in self._recent]
        return {"codes": torch.from_numpy(self._codes), "features": torch.from_numpy(self._features), "recent": recent}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> "Features":
        features = cls(saved["codes"].numpy(), saved["features"].numpy())
        recent: Sequence[Any] = saved["recent"]
        features._recent = [(int(r), c.numpy(), f.numpy()) for r, c, f in recent]
        return features


def redundant(seen_N: NDArray[np.bool_], features_ND: F32, count: int) -> I64:
    """The places of `count` samples to let go; the samples stand oldest first."""
    if count <= 0:
        return np.empty(0, np.int64)
    candidates = np.flatnonzero(seen_N)
    if len(candidates) < 2 * count:
        return np.arange(count)
    features = np.ascontiguousarray(features_ND[candidates])
    groups = split(features, np.arange(len(features)))
    nearest, partner, group_of = np.empty(len(features), np.float32), np.empty(len(features), np.int64), np.empty(len(features), np.int64)
    left = np.ones(len(features), bool)
    for g, members in enumerate(groups):
        group_of[members] = g
        nearest[members], partner[members] = _nearest(features, members, members)
    gone = []
    for _ in range(count):
        worst = int(nearest.argmax())
        worst = max(worst, int(partner[worst]))  # of the pair the newer one, whichever way the rounding went
        gone.append(worst)
        left[worst], nearest[worst] = False, -np.inf
        members = groups[group_of[worst]]
        orphans = members[left[members] & (partner[members] == worst)]
        if len(orphans):
            nearest[orphans], partner[orphans] = _nearest(features, orphans, members[left[members]])
    return np.sort(candidates[gone])


def _nearest(features_ND: F32, of: I64, among: I64) -> tuple[F32, I64]:
    """The cosine to the nearest other one, and which it is."""
    cosine = features_ND[of] @ features_ND[among].T
    cosine[of[:, None] == among[None, :]] = -2.0
    best = cosine.argmax(axis=1)
    return cosine[np.arange(len(of)), best], among[best]


def split(features_ND: F32, members: I64) -> list[I64]:
    """Groups of at most GROUP, of which each holds what is nearest to one of some pivots."""
    if len(members) <= GROUP:
        return [members]
    pivots = members[permutation(key("pivots", len(members)), len(members))[: 2 * -(-len(members) // GROUP)]]
    nearest = (features_ND[members] @ features_ND[pivots].T).argmax(axis=1)
    parts = [members[nearest == p] for p in range(len(pivots))]
    if max(len(p) for p in parts) > len(members) // 2:  # they resemble each other too much to be told apart: by age then
        parts = np.array_split(members, 2)
    return [group for part in parts if len(part) for group in split(features_ND, part)]
