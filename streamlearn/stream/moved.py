"""Where samples went: shards are rewritten while the learner goes on, and what it remembers names the old ones.

A round, the reservoir and the table of a checkpoint say (shard, index) for ever.  The catalog keeps every row, and of a replaced one which
samples its successor left out; so any (shard, index) can be followed to where the sample lies now, over as many rewritings as there were.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamlearn.contract.catalog import EXPIRED, Changes, ShardRow
from streamlearn.contract.errors import OffsetGap
from streamlearn.stream.keys import among
from streamlearn.stream.table import Table


@dataclass(frozen=True)
class Spot:
    """A sample's place now."""

    key: str
    sha256: str
    index: int
    expired: bool = False  # its shard has ended without a successor, and will be purged


class Moves:
    """All replacements known so far."""

    def __init__(self) -> None:
        self._ended: dict[str, tuple[ShardRow, list[int]]] = {}  # key -> row, and its removed samples in order
        self._into: dict[str, ShardRow] = {}  # old key -> the row that replaces it
        self._touched: set[bytes] = set()  # keys of shards of which a sample is gone, here or where it was moved to

    def learn(self, changes: Changes) -> None:
        for row in changes.ended:
            self._ended[row.key] = (row, sorted(row.gone))
        for row in [*changes.live, *changes.ended]:
            for old in row.replaces.split(",") if row.replaces else ():
                self._into[old] = row
        for row in changes.ended:
            if row.removed or row.key not in self._into:
                self._touch(row.key)

    def _touch(self, key: str) -> None:
        """The shard and all that were rewritten into it."""
        keys = [key]
        while keys:
            key = keys.pop()
            if key.encode() not in self._touched and key in self._ended:
                self._touched.add(key.encode())
                replaces = self._ended[key][0].replaces
                keys += replaces.split(",") if replaces else []

    def gone(self, table: Table, refs_N2: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(N,) which samples replay may no longer draw: those of no shard known, those taken down or expired."""
        gone = ~table.has(refs_N2[:, 0])
        touched = dict(table.numbers_in(self._touched))
        for at in np.flatnonzero(among(refs_N2[:, 0], np.array(list(touched), np.int64))).tolist():
            number, index = refs_N2[at].tolist()
            gone[at] = not self.lasting(touched[number], index)
        return gone

    def ended(self, key: str) -> bool:
        return key in self._ended

    def replaced(self, key: str) -> bool:
        """Ended, and another covers its offsets."""
        return key in self._ended and key in self._into

    def spot(self, key: str, sha256: str, index: int) -> Spot | None:
        """Where a sample of a shard lies now; None if it was taken down."""
        while key in self._ended:
            row, removed = self._ended[key]
            at = bisect_left(removed, index)
            if at < len(removed) and removed[at] == index:
                return None
            successor = self._into.get(key)
            if successor is None:
                return Spot(key, sha256, index, True) if row.status == EXPIRED else None
            index += self._before(successor, key) - at
            key, sha256 = successor.key, successor.sha256
        return Spot(key, sha256, index)

    def lasting(self, key: str, index: int) -> bool:
        """Whether replay may draw a sample: neither taken down nor expired."""
        spot = self.spot(key, "", index)
        return spot is not None and not spot.expired

    def below(self, row: ShardRow, offset: int) -> int:
        """Samples of a row whose offsets are below `offset`.  Raises OffsetGap unless a shard that it replaces ended there."""
        if offset >= row.end_offset:
            return row.num_samples
        if offset <= row.first_offset:
            return 0
        if not row.replaces:
            raise OffsetGap(
                f"catalog: {row.key} covers {row.first_offset} to {row.end_offset}, the cursor stands inside it at {offset}; "
                "restore the catalog from a backup"
            )
        found = 0
        for key in row.replaces.split(","):
            old, removed = self._ended[key]
            count = self.below(old, offset)
            found += count - bisect_left(removed, count)
        return found

    def _before(self, successor: ShardRow, key: str) -> int:
        """Samples of a row that come from the shards it replaces before this one."""
        keys = successor.replaces.split(",")
        return sum(row.num_samples - len(gone) for row, gone in (self._ended[k] for k in keys[: keys.index(key)]))
