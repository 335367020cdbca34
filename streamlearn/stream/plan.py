"""What is learnt, in which order: rounds over a growing catalog.

A round is some fresh shards and some replay draws, and from (seed, round number, round record) the order of its slots follows.
The record is what depends on time (which shards were there), so it is written down before the first batch is delivered:

  1. read     the catalog's new rows, in commit order, from the cursor on; the rows that have ended
  2. create   rounds/<number:08d>.json, if absent: the shards, the number of slots, the     <- THE COMMIT POINT
              samples that leave the reservoir because they were taken down or have expired
  3. deliver  the round's batches, one after another
  4. advance  the cursor to the end of the round's shards; admit its fresh samples to the reservoir; go on with the next number

Killed after   what is left           who mends it
  1            nothing
  2, 3         a recorded round       the resumed run reads it back: the same batches follow, though the catalog has grown
  4            nothing: cursor and reservoir are in the checkpoint, or follow from the records read again

State: the round's number, the next batch in it, the cursor, the reservoir as it was before the round.  It goes into the checkpoint with
the weights.  The order does not depend on worker processes, prefetching or timing.  A shard is a contiguous range of offsets, so a
cursor says exactly what was learnt as fresh; a gap between cursor and shard is an incident, never skipped.

Shards are rewritten meanwhile (compaction, takedown), in the same place of the order.  One that ends at or below the cursor is not fresh
again; one above it is learnt from the new shard; of one that the cursor divides (a merger of learnt and new ones) the first samples are
skipped.  One that expired above the cursor is passed over, and its samples are counted as unseen.  A record is never changed: what has
become of the samples that it names is looked up when they are read (moved.py, loader.py).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlearn.contract.catalog import LIVE, REPLACED, Catalog, ShardRow
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, OffsetGap
from streamlearn.contract.object_store import ObjectStore
from streamlearn.stream.keys import U64, draws, key, mix, permutation
from streamlearn.stream.moved import Moves
from streamlearn.stream.replay import Reservoir

IDLE_BATCHES = 8  # of a round without fresh samples: short, so that new shards are not kept waiting


@dataclass(frozen=True)
class Shard:
    """What a round needs to know of one shard."""

    number: int  # in the order of learning
    key: str
    sha256: str
    place: str  # topic/partition
    end: int  # offset
    samples: int
    fetched: tuple[str, str]  # first and last
    skip: int = 0  # samples learnt before, from shards that were merged into this one

    def to_row(self) -> list[Any]:
        row = [self.number, self.key, self.sha256, self.place, self.end, self.samples, *self.fetched]
        return [*row, self.skip] if self.skip else row

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> "Shard":
        number, name, sha256, place, end, samples, first, last, *skip = row
        return cls(number, name, sha256, place, end, samples, (first, last), *skip)


@dataclass(frozen=True)
class Round:
    """A recorded round."""

    number: int
    batch: int
    slots: int
    shards: tuple[Shard, ...]
    gone: tuple[tuple[int, int], ...] = ()  # (shard number, index) of what leaves the reservoir before it is drawn from
    unseen: int = 0  # samples that expired before they were learnt

    @property
    def fresh(self) -> int:
        return sum(s.samples - s.skip for s in self.shards)

    @property
    def batches(self) -> int:
        return self.slots // self.batch

    def to_json(self) -> bytes:
        raw: dict[str, Any] = {"round": self.number, "batch": self.batch, "slots": self.slots}
        raw["shards"] = [s.to_row() for s in self.shards]
        if self.gone:
            raw["gone"] = [list(ref) for ref in self.gone]
        if self.unseen:
            raw["unseen"] = self.unseen
        return json.dumps(raw).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Round":
        try:
            raw = json.loads(data)
            shards = tuple(Shard.from_row(row) for row in raw["shards"])
            gone = tuple((int(number), int(index)) for number, index in raw.get("gone", ()))
            return cls(raw["round"], raw["batch"], raw["slots"], shards, gone, raw.get("unseen", 0))
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise Corrupt(f"{where}: not a round record: {e}; restore it from a backup") from e


@dataclass(frozen=True)
class Slots:
    """The slots of one round in their order."""

    refs_N2: NDArray[np.int64]  # shard number, index in the shard
    fresh_N: NDArray[np.bool_]
    keys_N: U64  # of the augmentations


def order(seed: int, round_: Round, reservoir: Reservoir) -> Slots:
    """Every fresh sample once, replay draws in the other slots, all shuffled over the whole round."""
    own = fresh_refs(round_)
    pool = reservoir.refs_N2 if len(reservoir) else own  # the very first round has nothing to replay but itself
    if not len(pool):
        raise Corrupt(f"round {round_.number}: {round_.slots} slots, but neither fresh samples nor a reservoir")
    drawn = draws(key(seed, round_.number, "replay"), round_.slots - len(own)) % np.uint64(len(pool))
    refs = np.concatenate([own, pool[drawn.astype(np.int64)]])
    at = permutation(key(seed, round_.number, "order"), round_.slots)
    return Slots(refs[at], at < len(own), draws(key(seed, round_.number, "augment"), round_.slots))


def fresh_refs(round_: Round) -> NDArray[np.int64]:
    parts = [np.stack([np.full(s.samples - s.skip, s.number), np.arange(s.skip, s.samples)], axis=1) for s in round_.shards]
    return np.concatenate([np.empty((0, 2), np.int64), *parts])


@dataclass(frozen=True)
class Position:
    """Where the stream stands: all of it goes into the checkpoint."""

    round: int  # number of the current round
    place: int  # next batch in it
    record: Round | None  # None: not planned yet
    cursor: Mapping[str, int]  # topic/partition -> offset, up to the end of the round before
    reservoir: Reservoir  # before the round
    table: Mapping[int, Shard]  # of the shards that the reservoir points into
    next_shard: int  # number of the next shard to be learnt
    fresh: int  # samples learnt as fresh, up to the round before
    replay: int
    window: tuple[str, str] = ("", "")  # first and last fetch of anything learnt
    unseen: int = 0  # samples that expired before they were learnt, up to the round before

    @classmethod
    def start(cls, config: StreamConfig) -> "Position":
        return cls(0, 0, None, {}, Reservoir(config.seed, config.reservoir), {}, 0, 0, 0)

    def to_state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "round": self.round,
            "place": self.place,
            "record": self.record.to_json().decode() if self.record else "",
            "cursor": dict(self.cursor),
            "reservoir": self.reservoir.state_dict(),
            "table": [s.to_row() for s in self.table.values()],
            "next_shard": self.next_shard,
            "fresh": self.fresh,
            "replay": self.replay,
            "window": list(self.window),
            "unseen": self.unseen,
        }

    @classmethod
    def from_state(cls, config: StreamConfig, saved: Mapping[str, Any]) -> "Position":
        return cls(
            int(saved["round"]),
            int(saved["place"]),
            Round.from_json(saved["record"].encode(), "checkpoint") if saved["record"] else None,
            dict(saved["cursor"]),
            Reservoir.from_state(config.seed, config.reservoir, saved["reservoir"]),
            {row[0]: Shard.from_row(row) for row in saved["table"]},
            int(saved["next_shard"]),
            int(saved["fresh"]),
            int(saved["replay"]),
            (saved["window"][0], saved["window"][1]),
            int(saved.get("unseen", 0)),
        )


def begun(position: Position, round_: Round) -> Position:
    """Before the round's first batch: what is gone leaves the reservoir, for every resumed run at this very place."""
    return replace(position, record=round_, reservoir=position.reservoir.without(round_.gone))


def finished(position: Position) -> Position:
    """After the round's last batch: cursor and reservoir move on."""
    round_ = position.record
    assert round_ is not None
    reservoir = position.reservoir.admitted(fresh_refs(round_))
    table = dict(position.table) | {s.number: s for s in round_.shards}
    used = set(np.unique(reservoir.refs_N2[:, 0]).tolist())
    fetched = [f for s in round_.shards for f in s.fetched if f] + [f for f in position.window if f]
    return Position(
        round=position.round + 1,
        place=0,
        record=None,
        cursor=dict(position.cursor) | {s.place: s.end for s in round_.shards},
        reservoir=reservoir,
        table={n: s for n, s in table.items() if n in used},
        next_shard=position.next_shard + len(round_.shards),
        fresh=position.fresh + round_.fresh,
        replay=position.replay + round_.slots - round_.fresh,
        window=(min(fetched, default=""), max(fetched, default="")),
        unseen=position.unseen + round_.unseen,
    )


class Planner:
    """Plans, records and reads back rounds."""

    def __init__(self, config: StreamConfig, catalog: Catalog, store: ObjectStore, *, batch: int):
        self.config, self.catalog, self.store, self.batch = config, catalog, store, batch
        self._version, self._waiting = -1, list[ShardRow]()  # rows not yet behind the cursor
        self.moves = Moves()
        self.ended: list[ShardRow] = []  # since whoever heeds them (the loader) emptied it

    def look(self) -> None:
        """Learn what changed in the catalog."""
        changes = self.catalog.changes(self._version)
        self._version = changes.version
        self.moves.learn(changes)
        self.ended += changes.ended
        over = {r.key for r in changes.ended}
        holes = [r for r in changes.ended if r.status != REPLACED]  # without a successor: their offsets are covered by nothing else
        rows = [r for r in self._waiting if r.key not in over] + changes.live + holes
        self._waiting = sorted(rows, key=lambda r: (r.committed, r.place, r.first_offset))

    def planned(self, position: Position) -> Position | None:
        """The position with its round's record; None when there is nothing to learn yet."""
        if position.record is not None:
            return position
        name = f"rounds/{position.round:08d}.json"
        round_ = self._recorded(name)
        if round_ is None:
            round_ = self._plan(position)
            if round_ is None:
                return None
            if not self.store.put_if_absent(name, round_.to_json()):
                raise Corrupt(f"{name}: another learner has recorded this round; one home has one learner")
        if round_.batch != self.batch:
            raise ConfigError(
                f"{name} was planned for batches of {round_.batch}, train.batch = {self.batch}; set it back, or use a new home"
            )
        return begun(position, round_)

    def _recorded(self, name: str) -> Round | None:
        try:
            return Round.from_json(self.store.get(name), name)
        except NotFound:
            return None

    def _plan(self, position: Position) -> Round | None:
        self.look()
        shards, unseen = self._next_shards(position)
        gone = self._gone(position)
        fresh = sum(s.samples - s.skip for s in shards)
        if fresh:
            slots = math.ceil(fresh / self.config.fresh_fraction / self.batch) * self.batch
            return Round(position.round, self.batch, slots, shards, gone, unseen)
        allowed = int(self.config.max_replay_per_fresh * position.fresh) - position.replay
        batches = min(IDLE_BATCHES, allowed // self.batch)
        if batches < 1 or len(position.reservoir) <= len(gone):
            return None
        return Round(position.round, self.batch, batches * self.batch, shards, gone, unseen)

    def _gone(self, position: Position) -> tuple[tuple[int, int], ...]:
        """What the reservoir must forget."""
        ended = {n: s.key for n, s in position.table.items() if self.moves.ended(s.key)}
        refs = position.reservoir.refs_N2.tolist() if ended else []
        return tuple((n, i) for n, i in refs if n in ended and not self.moves.lasting(ended[n], i))

    def _next_shards(self, position: Position) -> tuple[tuple[Shard, ...], int]:
        """The shards of the next round; the samples among their offsets that expired unseen."""
        at, shards, unseen = dict(position.cursor), list[Shard](), 0
        for row in self._fresh_rows(position.cursor):
            place = f"{row.topic}/{row.partition}"
            skip = self.moves.below(row, at.get(place, 0))
            live = row.status == LIVE
            unseen += 0 if live else row.num_samples - skip
            samples, skip = (row.num_samples, skip) if live else (0, 0)
            fetched = (row.first_fetched_at, row.last_fetched_at) if live else ("", "")
            shards.append(Shard(position.next_shard + len(shards), row.key, row.sha256, place, row.end_offset, samples, fetched, skip))
            at[place] = row.end_offset
        return tuple(shards), unseen

    def _fresh_rows(self, cursor: Mapping[str, int]) -> Sequence[ShardRow]:
        """The next whole shards in commit order, up to `round_samples`; at least one that has samples, if there is one."""
        self._waiting = [r for r in self._waiting if r.end_offset > cursor.get(f"{r.topic}/{r.partition}", 0)]
        at, taken, samples = dict(cursor), list[ShardRow](), 0
        for row in self._waiting:
            place = f"{row.topic}/{row.partition}"
            fresh = row.num_samples - self.moves.below(row, at.get(place, 0)) if row.status == LIVE else 0
            if samples and samples + fresh > self.config.round_samples:
                break
            if row.first_offset > at.get(place, 0):
                raise OffsetGap(
                    f"catalog: {place} continues at {row.first_offset} ({row.key}), the cursor stands at {at.get(place, 0)}: "
                    "the offsets between are missing; restore the catalog from a backup"
                )
            at[place] = row.end_offset
            taken.append(row)
            samples += fresh
        return taken


def pool_of(position: Position, moves: Moves) -> NDArray[np.int64]:
    """What may stand in for a sample that is lost or gone: the reservoir's samples, less those that are gone too."""
    table = dict(position.table) | ({s.number: s for s in position.record.shards} if position.record else {})
    refs = position.reservoir.refs_N2
    if not len(refs) and position.record:
        refs = fresh_refs(position.record)
    stay = [n in table and (not moves.ended(table[n].key) or moves.lasting(table[n].key, i)) for n, i in refs.tolist()]
    return refs[np.array(stay, dtype=bool)]


def substitute(seed: int, round_: int, slot: int, attempt: int, pool_N2: NDArray[np.int64]) -> tuple[int, int]:
    """A replay draw for a slot whose sample is lost or gone: a function of the slot's place and of the pool alone."""
    at = int(mix(np.array(attempt, np.uint64) ^ key(seed, round_, "substitute", slot)) % np.uint64(len(pool_N2)))
    return int(pool_N2[at][0]), int(pool_N2[at][1])
