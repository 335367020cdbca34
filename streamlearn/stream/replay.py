"""The replay reservoir: uniform over everything ever admitted.

Algorithm R (Vitter 1985) with counter-based draws: its content after n samples is a pure function of (seed, n), so a resumed run has
the same one without keeping a generator.  Compact: two integers a sample, and the table of shards they point into.
"""

from collections.abc import Mapping
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
        room = max(0, self.capacity - len(self))
        kept = np.concatenate([self.refs_N2, refs_M2[:room]])
        late = refs_M2[room:]
        if len(late):
            number = np.arange(self.count + room, self.count + len(refs_M2), dtype=np.uint64)  # of each late sample, from 0
            slot = (mix(number ^ key(self.seed, "reservoir")) % (number + np.uint64(1))).astype(np.int64)
            chosen = slot < self.capacity
            kept[slot[chosen]] = late[chosen]  # in order: of two that draw one slot the later stays
        return Reservoir(self.seed, self.capacity, self.count + len(refs_M2), kept)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "refs": torch.from_numpy(self.refs_N2)}

    @classmethod
    def from_state(cls, seed: int, capacity: int, saved: Mapping[str, Any]) -> "Reservoir":
        return cls(seed, capacity, int(saved["count"]), saved["refs"].numpy())
