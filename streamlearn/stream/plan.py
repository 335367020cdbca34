"""What is learnt, in which order: rounds over a growing catalog.

A round is some fresh shards and some replay draws, and from (seed, round number, round record) the order of its slots follows.
The record is what depends on time (which shards were there), so it is written down before the first batch is delivered:

  1. read     the catalog's new rows, in commit order, from the cursor on; the rows that have ended
  2. create   rounds/<number:08d>.json, if absent: the shards, the number of slots, the     <- THE COMMIT POINT
              samples that leave the reservoir because they were taken down, have expired or are redundant
  3. deliver  the round's batches, one after another
  4. advance  the cursor to the end of the round's shards; admit its fresh samples to the reservoir; go on with the next number

Killed after   what is left           who mends it
  1            nothing
  2, 3         a recorded round       the resumed run reads it back: the same batches follow, though the catalog has grown
  4            nothing: cursor and reservoir are in the checkpoint, or follow from the records read again

State: the round's number, the next batch in it, the cursor, the reservoir as it was before the round.  It goes into the checkpoint with
the weights.  The order does not depend on worker processes, prefetching or timing, nor on the number of ranks: one of them, the leader, plans
and records, the others read the record, and each takes its part of every batch.  A shard is a contiguous range of offsets, so a
cursor says exactly what was learnt as fresh; a gap between cursor and shard is an incident, never skipped.

Shards are rewritten meanwhile (compaction, takedown), in the same place of the order.  One that ends at or below the cursor is not fresh
again; one above it is learnt from the new shard; of one that the cursor divides (a merger of learnt and new ones) the first samples are
skipped.  One that expired above the cursor is passed over, and its samples are counted as unseen.  A record is never changed: what has
become of the samples that it names is looked up when they are read (moved.py, loader.py).

The cost of a round is that of its shards and of the reservoir, never of the catalog: changes are followed (waiting.py, moved.py).
"""

import logging
import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from streamlearn.contract.catalog import LIVE, Catalog, ShardRow
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, OffsetGap
from streamlearn.contract.object_store import ObjectStore
from streamlearn.stream.minred import Features, redundant
from streamlearn.stream.moved import Moves
from streamlearn.stream.position import Position, begun
from streamlearn.stream.replay import MINRED
from streamlearn.stream.rounds import Round, Shard
from streamlearn.stream.waiting import Waiting

IDLE_BATCHES = 8  # of a round without fresh samples: short, so that new shards are not kept waiting
NAMED = 100  # shards of a round that its line in the log names, at most
ROUND_SHARDS = 4096  # of a round, at most: empty and expired ones count no sample, and a record must stay small
logger = logging.getLogger(__name__)


class Planner:
    """Plans, records and reads back rounds.  Of several ranks one is the leader; the others only read."""

    def __init__(self, config: StreamConfig, catalog: Catalog, store: ObjectStore, *, batch: int, leader: bool = True):
        self.config, self.catalog, self.store, self.batch, self.leader = config, catalog, store, batch, leader
        self._version, self._waiting = -1, Waiting()
        self.moves = Moves()
        self.ended: list[ShardRow] = []  # since whoever heeds them (the loader) emptied it

    def look(self) -> None:
        """Learn what changed in the catalog."""
        changes = self.catalog.changes(self._version)
        self._version = changes.version
        self.moves.learn(changes)
        self.ended += changes.ended
        if self.leader:
            self._waiting.learn(changes, self.moves)

    @property
    def version(self) -> int:
        """Of the catalog, as it was last looked at; -1: never, or there is none."""
        return self._version

    def upcoming(self, cursor: Mapping[str, int]) -> Iterator[ShardRow]:
        """The shards that rounds after `cursor` will take, in their order, as far as is known.  A look ahead: nothing is planned."""
        ahead = (row for row in self._waiting if row.end_offset > cursor.get(f"{row.topic}/{row.partition}", 0))
        return (row for row in ahead if row.status == LIVE and row.num_samples)

    def planned(self, position: Position, features: Features | None = None) -> Position | None:
        """The position with its round's record; None when there is nothing to learn yet.

        MinRed goes by `features`, which must be told of every batch up to the end of the round before the last.
        """
        if position.record is not None:
            return position
        features = features or Features()
        features.settle(position.round - 2, position.reservoir.refs_N2)
        name = f"rounds/{position.round:08d}.json"
        round_ = self._recorded(name)
        if round_ is None:
            round_ = self._plan(position, features) if self.leader else None
            if round_ is None:
                return None
            if not self.store.put_if_absent(name, round_.to_json()):
                raise Corrupt(f"{name}: another learner has recorded this round; one home has one learner")
            named = {"round": round_.number, "shards": [s.key for s in round_.shards[:NAMED]]}
            told = (round_.number, round_.batches, round_.fresh, len(round_.shards))
            logger.info("round %d: %d batches, %d fresh images of %d shards", *told, extra={"ids": named})
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

    def _plan(self, position: Position, features: Features) -> Round | None:
        self.look()
        alive = self._waiting.learnt(position.cursor, self.moves)
        shards, unseen = self._next_shards(position)
        gone = self._gone(position)
        evicted = self._evicted(position, gone, features)
        slots = self._slots(position, sum(s.samples - s.skip for s in shards), gone, evicted)
        if not slots and len(shards) < ROUND_SHARDS:  # many empty ones are passed by a round of no batches
            return None
        return Round(position.round, self.batch, slots, shards, gone, unseen, alive, evicted, self.config.max_replays)

    def _slots(self, position: Position, fresh: int, gone: tuple[tuple[int, int], ...], evicted: tuple[int, ...]) -> int:
        """Whole batches: the fresh samples with their share of replay; without fresh ones, what replay is allowed."""
        pool, left = len(position.reservoir) - len(gone) - len(evicted), None
        if cap := self.config.max_replays:
            left = position.reservoir.without(gone, evicted=evicted).tickets(cap) if len(position.reservoir) else fresh * cap
        if fresh:
            wanted = math.ceil(fresh / self.config.fresh_fraction / self.batch) * self.batch
            if left is None:
                return wanted
            least = math.ceil(fresh / self.batch) * self.batch
            return max(least, min(wanted, (fresh + left) // self.batch * self.batch))
        allowed = int(self.config.max_replay_per_fresh * position.fresh) - position.replay
        if left is not None:
            allowed = min(allowed, left)
        return max(0, min(IDLE_BATCHES, allowed // self.batch)) * self.batch if pool > 0 else 0

    def _gone(self, position: Position) -> tuple[tuple[int, int], ...]:
        """What the reservoir must forget."""
        refs: NDArray[np.int64] = position.reservoir.refs_N2[self.moves.gone(position.table, position.reservoir.refs_N2)]
        return tuple((number, index) for number, index in refs.tolist())

    def _evicted(self, position: Position, gone: tuple[tuple[int, int], ...], features: Features) -> tuple[int, ...]:
        """What MinRed lets go, as places in the reservoir less `gone`: by what was learnt up to the round before the last."""
        if self.config.replay != MINRED:
            return ()
        left = position.reservoir.without(gone)
        return tuple(redundant(*features.of(left.refs_N2), len(left) - left.capacity).tolist())

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

    def _fresh_rows(self, cursor: Mapping[str, int]) -> list[ShardRow]:
        """The next whole shards in commit order, up to `round_samples`; at least one that has samples, if there is one."""
        at, taken, samples = dict(cursor), list[ShardRow](), 0
        for row in self._waiting:
            place = f"{row.topic}/{row.partition}"
            if row.end_offset <= at.get(place, 0):
                continue
            fresh = row.num_samples - self.moves.below(row, at.get(place, 0)) if row.status == LIVE else 0
            if (samples and samples + fresh > self.config.round_samples) or len(taken) == ROUND_SHARDS:
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
