"""Planning ahead: what the next batches are, where their samples lie now, and which shards are needed for them, in which order.

Nothing here waits.  A batch whose shards are not all on this disk has no spec yet; the cache is told what it lacks, and what later batches will
lack: the rest of the round in its order, then the shards that the next round is likely to take.  What is asked for, and when it comes, changes no sample:
a slot goes to another sample only if its own was taken down, or is lost, and a shard is believed to be lost only after a look at the catalog,
for it may just have been rewritten.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streamlearn.contract.errors import Corrupt, Retryable
from streamlearn.contract.waits import Waits
from streamlearn.stream.cache import Copy, Lost, ShardCache, Want
from streamlearn.stream.crew import Work
from streamlearn.stream.minred import Features
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished, pool_of
from streamlearn.stream.replay import MINRED
from streamlearn.stream.rounds import Slots, order, substitute
from streamlearn.stream.table import Table
from streamlearn.stream.worker import BatchSpec, Place

LOST_TRIES = 32  # replay draws tried for a slot whose shard is lost
FORESEEN = 256  # shards that the cache is told of; how many bytes it fetches ahead is its own affair
Missing = Literal["lost", "taken_down"]


@dataclass
class Outstanding:
    """A batch that can be made."""

    spec: BatchSpec
    refs_N2: NDArray[np.int64]  # of the whole batch, all ranks' parts
    fresh: NDArray[np.bool_]
    named: NDArray[np.bool_]
    before: Position  # to make it again
    after: Position
    shards: frozenset[Want]
    work: Work | None = None  # in the making


class Ahead:
    """Specs in their order, from `position` on."""

    def __init__(self, planner: Planner, cache: ShardCache, waits: Waits, *, position: Position, features: Features, part: slice):
        self.planner, self.cache, self.waits, self.features, self.part = planner, cache, waits, features, part
        self.position = self.learnt = position  # before the next spec; after the last batch that was learnt or passed over
        self.counts = Counter[str](lost=0, taken_down=0)  # slots
        self.looked = time.monotonic()  # when the catalog was last looked at
        self.must_look = False  # before what is lost can be believed to be
        self._round: tuple[Table, Slots] | None = None  # of the position; None: not begun
        self._needs: tuple[Want, ...] = ()  # of the next batch, if it lacks any
        self._planned_at = 0.0  # monotonic; not to be planned before
        self._substitutes: NDArray[np.int64] | None = None  # the round's pool

    @property
    def lacks(self) -> bool:
        """There is a next batch, and it waits for shards."""
        return bool(self._needs)

    def rewind(self, position: Position) -> None:
        """Begin anew, from here on."""
        self.position, self._round, self._needs, self._substitutes = position, None, (), None

    def heed(self) -> None:
        """Something has ended: what may stand in for others, and what the next batch needs, is not what it was."""
        self._needs, self._substitutes = (), None

    def next(self) -> Outstanding | None:
        """The next batch; None while there is nothing to learn, or a shard of it is on its way."""
        if self._round is None and not self._begin():
            return None
        assert self._round is not None and self.position.record is not None
        before, after = self.position, replace(self.position, place=self.position.place + 1)
        item = self._made(*self._round, before.place * self.planner.batch)
        if item is None:
            return None
        if after.place == self.position.record.batches:
            after, self._round = finished(after), None
        item.after = self.position = after
        return item

    def foresee(self, kept: frozenset[Want], *, first: Sequence[Want] = ()) -> None:
        """Tell the cache.  `kept`: what outstanding batches need; `first`: what somebody waits for, who has no batch to end before."""
        wants, urgent = dict.fromkeys((*first, *self._needs)), 1 if first else len(self._needs)
        for want in self._later():
            if len(wants) >= FORESEEN:
                break
            wants.setdefault(want)
        self.cache.foresee(list(wants), urgent=urgent, kept={want.sha256 for want in kept}, force=bool(first) or not kept)

    def spot(self, shard: tuple[str, str], index: int) -> tuple[Want, int] | None:
        """Where a sample lies now; None if it was taken down."""
        spot = self.planner.moves.spot(*shard, index)
        return (Want(spot.key, spot.sha256), spot.index) if spot else None

    def _begin(self) -> bool:
        """The next round that has batches."""
        while True:
            planned = self._planned()
            if planned is None:
                return False
            self.position, round_ = planned, planned.record
            assert round_ is not None
            if round_.batches:
                break
            self.position = finished(planned)
        slots = order(self.planner.config.seed, round_, planned.reservoir)
        self._round, self._substitutes = (planned.table.with_(round_.shards), slots), None
        self.cache.forget_lost()
        return True

    def _planned(self) -> Position | None:
        if self.planner.config.replay == MINRED and self.position.record is None and self.learnt.round < self.position.round - 1:
            return None  # what MinRed goes by is not learnt yet
        if time.monotonic() < self._planned_at:
            return None
        try:
            planned = self.planner.planned(self.position, self.features)
        except Retryable as e:
            self._planned_at = time.monotonic() + self.waits.out("plan", e)
            return None
        self.waits.over("plan")
        return planned

    def _made(self, table: Table, slots: Slots, start: int) -> Outstanding | None:
        """Of this rank's part of the batch whose slots begin at `start`."""
        whole, own = slice(start, start + self.planner.batch), slice(start + self.part.start, start + self.part.stop)
        fresh = slots.fresh_N[own].copy()
        named, places, missing = np.ones(len(fresh), bool), list[Place | None](), Counter[str]()
        shards, coming = dict[Want, None](), False
        for i, (number, index) in enumerate(slots.refs_N2[own].tolist()):
            place: Place | Want | Missing | None = self._place(table.get(number), index, shards)
            if isinstance(place, str):
                missing[place] += 1
                fresh[i] = named[i] = False
                place = self._substitute(table, own.start + i, shards)
            coming |= isinstance(place, Want)
            places.append(place if isinstance(place, Place) else None)
        self._needs = tuple(shards)
        if coming or not self.cache.keep({want.sha256 for want in shards}):
            return None
        self._needs = ()
        self.counts.update(missing)  # += would forget what is 0
        there = [place for place in places if place is not None]
        # with nothing to draw from, others of the batch stand in; with none of those, the batch is passed over
        filled = tuple(place or there[i % len(there)] for i, place in enumerate(places)) if there else ()
        spec = BatchSpec(filled, slots.keys_N[own])
        return Outstanding(spec, slots.refs_N2[whole], fresh, named, self.position, self.position, frozenset(shards))

    def _substitute(self, table: Table, slot: int, shards: dict[Want, None]) -> Place | Want | None:
        """A replay draw for a slot whose sample is lost or gone; None where everything is gone.  Raises Corrupt where too much is lost."""
        if self._substitutes is None:
            self._substitutes = pool_of(self.position, self.planner.moves)
        pool = self._substitutes
        if not len(pool):
            return None
        for attempt in range(LOST_TRIES):
            number, index = substitute(self.planner.config.seed, self.position.round, slot, attempt, pool)
            place = self._place(table.get(number), index, shards)
            if not isinstance(place, str):
                return place
        raise Corrupt(
            f"round {self.position.round}: a slot's shard is lost, and so were {LOST_TRIES} others drawn in its place; "
            "see `streamlearn status` and restore the store from a backup"
        )

    def _place(self, shard: tuple[str, str] | None, index: int, shards: dict[Want, None]) -> Place | Want | Missing:
        """Where the bytes of a sample lie on this disk; the shard, if that is yet to come; or why there are none."""
        if shard is None:
            return "lost"  # not in the table
        spot = self.spot(shard, index)
        if spot is None:
            return "taken_down"
        want, at = spot
        copy = self.cache.copy(want.sha256)
        if isinstance(copy, Lost):
            if copy.at < self.looked:
                return "lost"
            self.must_look = True
        shards.setdefault(want)
        return Place(copy.path, copy.samples[at]) if isinstance(copy, Copy) else want

    def _later(self) -> Iterator[Want]:
        """The shards of the rest of the round as they will be read, then those that the next round is likely to take."""
        cursor = dict(self.position.cursor)
        if self._round is not None and self.position.record is not None:
            table, slots = self._round
            own_N2 = slots.refs_N2.reshape(-1, self.planner.batch, 2)[self.position.place :, self.part].reshape(-1, 2)
            _, first = np.unique(own_N2[:, 0], return_index=True)
            for number, index in own_N2[np.sort(first)[:FORESEEN]].tolist():
                shard = table.get(number)
                spot = self.spot(shard, index) if shard else None
                if spot:
                    yield spot[0]
            cursor |= {s.place: s.end for s in self.position.record.shards}
        for row in self.planner.upcoming(cursor):
            yield Want(row.key, row.sha256)
