"""The catalog's rows, and what a replacement of rows must keep."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from streamlearn.contract.errors import Conflict

LIVE, REPLACED, EXPIRED, TAKEN_DOWN = "live", "replaced", "expired", "taken-down"


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    key: str
    sha256: str
    bytes: int
    num_samples: int  # stored images; 0 where every offset of the range ended otherwise
    topic: str
    partition: int
    first_offset: int
    end_offset: int  # one past the last
    first_fetched_at: str  # RFC 3339 UTC; empty when nothing was fetched
    last_fetched_at: str
    day: str  # YYYY-MM-DD
    generation: str = ""  # the quarter it was cut into, once it was
    status: str = LIVE
    replaces: str = ""  # keys of the rows it stands for, comma-separated, in offset order
    removed: str = ""  # of a replaced row: indices of the samples that its successor left out, comma-separated
    ended_at: str = ""  # RFC 3339 UTC; when it ceased to be live
    note: str = ""  # why
    committed: int = field(default=-1, compare=False)  # set by the catalog: the version that first covered these offsets ...
    place: int = field(default=0, compare=False)  # ... and the place in that commit: the order of learning

    @property
    def gone(self) -> frozenset[int]:
        """Indices of `removed`."""
        return frozenset(int(i) for i in self.removed.split(",") if i)


@dataclass(frozen=True)
class Advance:
    """A partition's position moves from `start` to `end`."""

    topic: str
    partition: int
    start: int
    end: int


@dataclass(frozen=True)
class Changes:
    """What a reader that knew a version learns, all of one later version."""

    version: int
    live: list[ShardRow]  # that became live since, in the order of learning
    ended: list[ShardRow]  # that ceased to be live since, in the order of learning


@dataclass(frozen=True)
class Listing:
    """A whole version of the table."""

    version: int  # -1: there is no table
    rows: list[ShardRow]  # live or not, in commit order
    files: list[str]  # names of the data files

    @property
    def positions(self) -> dict[tuple[str, int], int]:
        """(topic, partition) -> the next offset to be fetched: rows cover all below it."""
        found: dict[tuple[str, int], int] = {}
        for row in self.rows:
            found[row.topic, row.partition] = max(row.end_offset, found.get((row.topic, row.partition), 0))
        return found


_TYPES = {int: pa.int64(), str: pa.string()}
FIELDS = [(f.name, _TYPES[int if f.type in (int, "int") else str]) for f in dataclasses.fields(ShardRow)]
SCHEMA = pa.schema([*FIELDS, ("changed", pa.int64())])


def columns(rows: Sequence[ShardRow], changed: int) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name, _ in FIELDS}
    return pa.table(columns | {"changed": [changed] * len(rows)}, schema=SCHEMA)


def checked_key(key: str) -> bool:
    if "'" in key or "," in key:
        raise ValueError(f"shard key {key!r}: must hold neither quote nor comma")
    return True


def replaced(uri: str, known: Mapping[str, ShardRow], old_keys: Sequence[str], new_rows: Sequence[ShardRow], status: str) -> bool:
    """True if this very replacement is in; raises Conflict if an old row has ended otherwise."""
    ended = [f"{k} is {known[k].status if k in known else 'unknown'}" for k in old_keys if k not in known or known[k].status != LIVE]
    if not ended:
        return False
    ours = all(k in known and known[k].status == status for k in old_keys)
    if ours and all(r.key in known and known[r.key].replaces == r.replaces for r in new_rows):
        return True
    raise Conflict(f"{uri}: {', '.join(ended)}: someone else has replaced it; read the catalog anew")


def in_place_of(row: ShardRow, was: Mapping[str, ShardRow]) -> ShardRow:
    first = min((was[k] for k in row.replaces.split(",")), key=lambda r: (r.committed, r.place))
    return replace(row, committed=first.committed, place=first.place)


def conserved(old: Sequence[ShardRow], new: Sequence[ShardRow], removed: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError unless each new row covers what it replaces, without a gap, and holds its samples less the removed ones."""
    by_key = {r.key: r for r in old}
    named = [k for r in new for k in r.replaces.split(",")]
    if new and sorted(named) != sorted(by_key):
        raise ValueError(f"the new rows replace {sorted(named)}, not {sorted(by_key)}")
    for row in new:
        parts = [by_key[k] for k in row.replaces.split(",")]
        at = row.first_offset
        for part in parts:
            if (part.topic, part.partition, part.first_offset) != (row.topic, row.partition, at):
                raise ValueError(f"{row.key}: replaces {part.key}, which does not continue at {at} of {row.topic}/{row.partition}")
            at = part.end_offset
        samples = sum(p.num_samples - len(set(removed.get(p.key, ()))) for p in parts)
        if at != row.end_offset or samples != row.num_samples:
            raise ValueError(
                f"{row.key}: covers up to {row.end_offset} with {row.num_samples} samples, what it replaces {at} with {samples}"
            )
