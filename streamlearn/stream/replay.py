"""What replay draws from: at most `capacity` samples of all that were ever learnt and are still in the window.

`reservoir` is uniform over them.  Without deletions it is algorithm R (Vitter 1985).  Samples leave by takedown and expiry, from the reservoir and
from the population it stands for; then it is random pairing (Gemulla, Lehner, Haas: "A dip in the reservoir", VLDB 2006): each newcomer
makes up for one deletion, and takes the place of one in the reservoir with the probability that the deletion was there.  So over a rolling
window the reservoir stays full, and every survivor and newcomer is in it with the same probability.  Draws are counter-based: the content
is a pure function of (seed, what was admitted and deleted, in which order), and no generator is kept.

`fifo` keeps the newest.  `minred` keeps what is least redundant (minred.py): newcomers are all admitted, and what leaves is in the next
round's record, because it depends on what the learner made of the images.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlearn.contract.errors import ConfigError
from streamlearn.stream.keys import U64, among, key, mix

RESERVOIR, FIFO, MINRED = "reservoir", "fifo", "minred"
I64 = NDArray[np.int64]


def codes(refs_N2: I64) -> I64:
    """One integer for each (shard number, index)."""
    return (refs_N2[:, 0] << 32) | refs_N2[:, 1]


@dataclass(frozen=True, eq=False)
class Reservoir:
    """References (shard number, index in the shard), oldest admission first where the policy has an order.  Immutable."""

    seed: int
    capacity: int
    policy: str = RESERVOIR
    refs_N2: I64 = field(default_factory=lambda: np.empty((0, 2), np.int64))
    uses_N: I64 = field(default_factory=lambda: np.empty(0, np.int64))  # replays of each since it was admitted
    count: int = 0  # samples ever admitted
    alive: int = 0  # of them neither taken down nor expired: the population
    holes: int = 0  # deletions from the reservoir that no newcomer has made up for ...
    others: int = 0  # ... and deletions from the rest of the population

    def __len__(self) -> int:
        return len(self.refs_N2)

    def admitted(self, refs_M2: I64, uses_M: I64 | None = None) -> "Reservoir":
        uses_M = np.zeros(len(refs_M2), np.int64) if uses_M is None else uses_M
        if self.policy == RESERVOIR:
            return self._paired(refs_M2, uses_M)
        keep = slice(-self.capacity if self.policy == FIFO else None, None)
        grown = replace(self, refs_N2=np.concatenate([self.refs_N2, refs_M2])[keep], uses_N=np.concatenate([self.uses_N, uses_M])[keep])
        return replace(grown, count=self.count + len(refs_M2), alive=self.alive + len(refs_M2))

    def without(self, gone: Collection[tuple[int, int]], alive: int = -1, evicted: Collection[int] = ()) -> "Reservoir":
        """As it is, less what was deleted, and then less the places `evicted`.  `alive`: the population after the deletions; -1: unknown."""
        stay = self
        if gone:
            stay = self._at(~among(codes(self.refs_N2), np.sort(codes(np.array(list(gone), np.int64)))))
        holes = len(self) - len(stay)
        deleted = max(holes, self.alive - alive if alive >= 0 else 0)
        if evicted:
            stay = stay._at(np.delete(np.arange(len(stay)), list(evicted)))
        return replace(stay, alive=self.alive - deleted, holes=self.holes + holes, others=self.others + deleted - holes)

    def replayed(self, drawn: I64) -> "Reservoir":
        """With the draws of a round counted."""
        return replace(self, uses_N=self.uses_N + np.bincount(drawn, minlength=len(self))) if len(drawn) else self

    def tickets(self, cap: int) -> int:
        """Replays that are left under a cap for each sample."""
        return int(np.maximum(0, cap - self.uses_N).sum())

    def _at(self, chosen: NDArray[Any]) -> "Reservoir":
        return replace(self, refs_N2=self.refs_N2[chosen], uses_N=self.uses_N[chosen])

    def _paired(self, refs_M2: I64, uses_M: I64) -> "Reservoir":
        number = np.arange(self.count, self.count + len(refs_M2), dtype=np.uint64)  # of each newcomer, from 0
        drawn = mix(number ^ key(self.seed, "reservoir"))
        paired, holes, others = [], self.holes, self.others
        for i, draw in enumerate(drawn[: holes + others].tolist()):
            if draw % (holes + others) < holes:
                paired.append(i)
                holes -= 1
            else:
                others -= 1
        made_up = min(len(refs_M2), self.holes + self.others)
        refs, uses = np.concatenate([self.refs_N2, refs_M2[paired]]), np.concatenate([self.uses_N, uses_M[paired]])
        room = max(0, self.capacity - len(refs)) if not holes + others else 0
        direct = slice(made_up, made_up + room)
        refs, uses = np.concatenate([refs, refs_M2[direct]]), np.concatenate([uses, uses_M[direct]])
        self._replace(refs, uses, drawn, refs_M2, uses_M, made_up + room)
        alive, count = self.alive + len(refs_M2), self.count + len(refs_M2)
        return replace(self, refs_N2=refs, uses_N=uses, count=count, alive=alive, holes=holes, others=others)

    def _replace(self, refs: I64, uses: I64, drawn: U64, refs_M2: I64, uses_M: I64, first: int) -> None:
        """Algorithm R for the newcomers from `first` on, in place: of two that draw one slot the later stays."""
        late = np.arange(first, len(refs_M2))
        slot = (drawn[late] % (late.astype(np.uint64) + np.uint64(self.alive + 1))).astype(np.int64)
        chosen = slot < self.capacity
        refs[slot[chosen]], uses[slot[chosen]] = refs_M2[late[chosen]], uses_M[late[chosen]]

    def state_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("policy", "count", "alive", "holes", "others")}
        return numbers | {"refs": torch.from_numpy(self.refs_N2), "uses": torch.from_numpy(self.uses_N)}

    @classmethod
    def from_state(cls, seed: int, capacity: int, policy: str, saved: Mapping[str, Any]) -> "Reservoir":
        """Raises ConfigError where it was filled by another policy."""
        before = saved.get("policy", RESERVOIR)
        if before != policy:
            raise ConfigError(
                f"stream.replay = {policy!r}: the checkpoint's samples were kept by {before!r}; set it back, or use a new home"
            )
        refs, count = saved["refs"].numpy(), int(saved["count"])
        if "alive" not in saved:  # of before deletions were counted: those elsewhere than in the reservoir are counted at the next round
            holes = min(count, capacity) - len(refs)
            return cls(seed, capacity, policy, refs, np.zeros(len(refs), np.int64), count, count - holes, holes)
        return cls(seed, capacity, policy, refs, saved["uses"].numpy(), count, *(int(saved[n]) for n in ("alive", "holes", "others")))
