"""The replay reservoir: uniform over everything ever admitted.

Algorithm R (Vitter 1985) with counter-based draws: its content after n samples is a pure function of (seed, n), so a resumed run has
the same one without keeping a generator.  Compact: two integers a sample, and the table of shards they point into.

What was taken down or has expired is dropped and leaves a hole, which is filled only by a sample that algorithm R would have put into some
slot anyway: so those that remain and those that come later are drawn with equal probability, and the pool is smaller for a while.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlearn.stream.keys import key, mix


class Reservoir:
    """At most `capacity` references (shard number, index in the shard).  Immutable: `admitted` returns a new one."""

    def __init__(self, seed: int, capacity: int, count: int = 0, refs_N2: NDArray[np.int64] | None = None):
        self.seed, self.capacity, self.count = seed, capacity, count
        self.refs_N2 = np.empty((0, 2), np.int64) if refs_N2 is None else refs_N2

    def __len__(self) -> int:
        return len(self.refs_N2)

    def admitted(self, refs_M2: NDArray[np.int64]) -> "Reservoir":
        if len(self) < min(self.count, self.capacity):
            return self._admitted_with_holes(refs_M2)
        room = max(0, self.capacity - len(self))
        kept = np.concatenate([self.refs_N2, refs_M2[:room]])
        late = refs_M2[room:]
        if len(late):
            slot = self._slots(len(refs_M2))[room:]
            chosen = slot < self.capacity
            kept[slot[chosen]] = late[chosen]  # in order: of two that draw one slot the later stays
        return Reservoir(self.seed, self.capacity, self.count + len(refs_M2), kept)

    def without(self, refs: Collection[tuple[int, int]]) -> "Reservoir":
        """As it is, less these."""
        if not refs:
            return self
        gone = set(refs)
        stay = np.array([(number, index) not in gone for number, index in self.refs_N2.tolist()], dtype=bool)
        return Reservoir(self.seed, self.capacity, self.count, self.refs_N2[stay])

    def _admitted_with_holes(self, refs_M2: NDArray[np.int64]) -> "Reservoir":
        """One after another: which slots are holes changes as they are filled."""
        kept = self.refs_N2.tolist()
        for slot, ref in zip(self._slots(len(refs_M2)).tolist(), refs_M2.tolist(), strict=True):
            if slot < len(kept):
                kept[slot] = ref
            elif slot < self.capacity:
                kept.append(ref)
        return Reservoir(self.seed, self.capacity, self.count + len(refs_M2), np.array(kept, np.int64).reshape(-1, 2))

    def _slots(self, count: int) -> NDArray[np.int64]:
        """The slots that the next samples draw; the first ones have one each."""
        number = np.arange(self.count, self.count + count, dtype=np.uint64)  # of each sample, from 0
        drawn = (mix(number ^ key(self.seed, "reservoir")) % (number + np.uint64(1))).astype(np.int64)
        return np.where(number < self.capacity, number.astype(np.int64), drawn)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "refs": torch.from_numpy(self.refs_N2)}

    @classmethod
    def from_state(cls, seed: int, capacity: int, saved: Mapping[str, Any]) -> "Reservoir":
        return cls(seed, capacity, int(saved["count"]), saved["refs"].numpy())
