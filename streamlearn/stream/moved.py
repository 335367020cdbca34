"""Where samples went: shards are rewritten while the learner goes on, and what it remembers names the old ones.

A round, the reservoir and the table of a checkpoint say (shard, index) for ever.  The catalog keeps every row, and of a replaced one which
samples its successor left out; so any (shard, index) can be followed to where the sample lies now, over as many rewritings as there were.
"""

from bisect import bisect_left
from dataclasses import dataclass

from streamlearn.contract.catalog import EXPIRED, Changes, ShardRow
from streamlearn.contract.errors import OffsetGap


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

    def learn(self, changes: Changes) -> None:
        for row in changes.ended:
            self._ended[row.key] = (row, sorted(row.gone))
        for row in [*changes.live, *changes.ended]:
            for old in row.replaces.split(",") if row.replaces else ():
                self._into[old] = row

    def ended(self, key: str) -> bool:
        return key in self._ended

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
