"""Batches in the planned order, made ahead of need by worker processes.

Specs of batches are pure values, handed out in order and collected in order, to whomever they are made by (stream/crew.py).  Crops come back
as bytes in memory that is shared (stream/trays.py); what the workers leave to the learner's device is done when the batch is taken:
normalisation, and with `stream.augment` there all distortion.

A shard may be rewritten or taken down at any time.  The catalog is looked at before every round and every few seconds in between; what is
seen to have ended leaves the local cache at once, and batches that were made ahead from it are dropped and made again: their samples are
read from where they lie now, and slots whose sample is gone go to replay.  So nothing that was taken down is delivered once that is seen.
"""

import contextlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import Corrupt, NotFound, Retryable
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import ShardSample
from streamlearn.stream import views
from streamlearn.stream.cache import ShardCache, read_member
from streamlearn.stream.crew import Crew, Work
from streamlearn.stream.decode import Pixels, decode
from streamlearn.stream.keys import key, permutation
from streamlearn.stream.minred import Features
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished, pool_of
from streamlearn.stream.replay import MINRED
from streamlearn.stream.rounds import Slots, fresh_refs, order, part_of_batch, substitute
from streamlearn.stream.table import Table
from streamlearn.stream.worker import BatchSpec, Place, Sound

LOOK_S = 5.0  # between looks at the catalog in the middle of a round
LOST_TRIES = 32  # replay draws tried for a slot whose shard is lost


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch."""

    crops: tuple[Tensor, ...]  # one (V_r,B,3,S_r,S_r) float32 a resolution, on the learner's device
    fresh: Tensor  # (B,) bool
    named: Tensor  # (B,) bool: the image is the one that the plan names, and no stand-in
    wait_s: float  # how long the learner waited for it
    taken: Callable[..., dict[str, Any]]  # tells the stream that the batch is learnt: see Stream.take


@dataclass
class _Outstanding:
    spec: BatchSpec
    refs_N2: NDArray[np.int64]  # of the whole batch, all ranks' parts
    fresh: NDArray[np.bool_]
    named: NDArray[np.bool_]
    before: Position  # to make it again
    after: Position
    shards: frozenset[str]
    work: Work | None = None  # in the making


class Stream:
    """From catalog to batches; goes on from `state`, or from the beginning."""

    def __init__(
        self,
        config: StreamConfig,
        catalog: Catalog,
        store: ObjectStore,
        cache_dir: Path,
        *,
        batch: int,
        state: dict[str, Any] | None,
        stop: threading.Event,
        device: str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ):
        self.config, self.batch, self.stop = config, batch, stop
        self.part, self.ranks = part_of_batch(batch, rank, ranks), ranks
        self.crew = Crew(config, batch=batch // ranks, device=torch.device(device))
        self.planner = Planner(config, catalog, store, batch=batch, leader=rank == 0)
        self.cache = ShardCache(store, cache_dir, config.cache_bytes)
        self.position = Position.from_state(config, state) if state else Position.start(config)
        self.features = Features.from_state(state["features"]) if state and "features" in state else Features()
        self._learnt = self.position  # after the last batch that was taken or passed over
        self.names: dict[str, str] = {}  # shard key -> sha256
        self.counts = {"corrupt": 0, "lost": 0, "passed_over": 0, "taken_down": 0}
        self._queue: deque[_Outstanding] = deque()
        self._looked = -math.inf  # monotonic
        self._substitutes: tuple[int, NDArray[np.int64]] | None = None  # of which round, its pool
        self._look()
        self._heed()

    def batches(self) -> Iterator[Batch | None]:
        """Ends when `stop` is set.  None, about every `poll_s`, while there is nothing to learn."""
        ahead = self._specs()
        while not self.stop.is_set():
            self._look()
            if self._heed():
                ahead = self._specs()
            while len(self._queue) < self.config.prefetch and (item := next(ahead)) is not None:
                self._queue.append(item)
                item.work = self.crew.begin(item.spec)
            if self.planner.ended:  # planning has looked too
                continue
            if not self._queue:
                self.stop.wait(self.config.poll_s)
                yield None
                continue
            began = time.perf_counter()
            item = self._queue[0]
            assert item.work is not None
            sound = self.crew.collect(item.work)
            self._queue.popleft()
            self.counts["corrupt"] += int((~sound).sum())
            crops = self.crew.crops(item.work) if sound.any() else ()
            self.crew.end(item.work)
            if self._queue and (following := self._queue[0].work) is not None:
                self.crew.copy_ahead(following)
            if not crops:
                self.counts["passed_over"] += 1  # a whole batch of garbage: the sequence goes on without it
                if self.ranks == 1:
                    self._learnt = item.after
                    continue
                # other ranks' parts may be sound, and all must take the same number of steps
                crops, sound = self._grey(), np.zeros(len(item.fresh), bool)
            fresh, named = torch.from_numpy(item.fresh & sound), torch.from_numpy(item.named & sound)
            yield Batch(crops, fresh, named, time.perf_counter() - began, partial(self.take, item, sound))

    def take(self, item: _Outstanding, sound: Sound, features_BD: Tensor | None = None) -> dict[str, Any]:
        """`Batch.taken`: where the stream stands once this batch is learnt, for the checkpoint.

        `features_BD`: what the learner made of each image, for MinRed (else it is not looked at); None where it made nothing of them.  With
        several ranks every one of them is told the same, of the whole batch, with zeros where a part's image is not `named`.
        """
        self._learnt = item.after
        if self.config.replay != MINRED:
            return item.after.to_state()
        if features_BD is not None:
            told = features_BD.detach().float().cpu().numpy()
            if self.ranks == 1:
                told = told * (item.named & sound)[:, None]
            self.features.observe(item.before.round, item.refs_N2, told)
        return item.after.to_state() | {"features": self.features.state_dict()}

    def sample(self, state: dict[str, Any], count: int) -> list[str]:
        """Up to `count` references `<shard key>#<index>` of images learnt so far, drawn by a key of the state alone."""
        position = Position.from_state(self.config, state)
        table, refs = position.table, position.reservoir.refs_N2
        if position.record is not None and not len(refs):
            table, refs = table.with_(position.record.shards), fresh_refs(position.record)
        chosen = permutation(key(self.config.seed, position.round, position.place, "sample"), len(refs))[:count]
        found = [(shard, index) for number, index in refs[chosen].tolist() if (shard := table.get(number))]
        self.names |= dict(shard for shard, _ in found)
        return [f"{name}#{index}" for (name, _), index in found]

    def image_bytes(self, ref: str) -> bytes:
        """Raises NotFound, Corrupt."""
        name, _, index = ref.rpartition("#")
        if name not in self.names:
            raise NotFound(f"{ref}: not among the shards of this stream")
        spot = self.planner.moves.spot(name, self.names[name], int(index))
        if spot is None:
            raise NotFound(f"{ref}: taken down")
        path, samples = self.cache.shard(spot.key, spot.sha256, pinned=self._pinned())
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_member(fd, samples[spot.index])
        finally:
            os.close(fd)

    def eval_images(self, refs: list[str], size: int) -> Tensor:
        """(N,3,size,size) normalised centre crops.  An image that has vanished or cannot be decoded stands as the one before it."""
        crops: list[Pixels] = []
        for ref in refs:
            try:
                crops.append(views.eval_crop(decode(self.image_bytes(ref)), size))
            except (NotFound, Corrupt):
                self.counts["corrupt"] += 1
                if crops:
                    crops.append(crops[-1])
        pixels = np.stack(crops) if crops else np.empty((0, size, size, 3), np.uint8)
        return views.normalised(pixels, self.config.mean, self.config.std)

    def counters(self) -> dict[str, int]:
        more = {"worker_deaths": self.crew.deaths, "cache_bytes": self.cache.bytes, "expired_unseen": self.position.unseen}
        return self.counts | more

    def close(self) -> None:
        self.crew.close()

    # -- planning ahead ------------------------------------------------------------------------------------------------

    def _specs(self) -> Iterator[_Outstanding | None]:
        """Specs in order, for ever; None whenever nothing is planned."""
        while True:
            planned = self._planned()
            if planned is None:
                yield None
                continue
            self.position, round_ = planned, planned.record
            assert round_ is not None
            if not round_.batches:
                self.position = finished(planned)
                continue
            slots = order(self.config.seed, round_, self.position.reservoir)
            table = self.position.table.with_(round_.shards)
            while self.position.place < round_.batches:
                after = replace(self.position, place=self.position.place + 1)
                if after.place == round_.batches:
                    after = finished(after)
                item = self._spec(table, slots, self.position.place * self.batch)
                item.before, item.after = self.position, after
                self.position = after
                yield item
                if after.record is None:  # the round is over
                    break

    def _planned(self) -> Position | None:
        if self.config.replay == MINRED and self.position.record is None and self._learnt.round < self.position.round - 1:
            return None  # what MinRed goes by is not learnt yet
        return self.planner.planned(self.position, self.features)

    def _spec(self, table: Table, slots: Slots, start: int) -> _Outstanding:
        """Of this rank's part of the batch whose slots begin at `start`."""
        whole, own = slice(start, start + self.batch), slice(start + self.part.start, start + self.part.stop)
        places, fresh, shards = list[Place | None](), slots.fresh_N[own].copy(), set[str]()
        named = np.ones(len(fresh), bool)
        for i, (number, index) in enumerate(slots.refs_N2[own].tolist()):
            place = self._place(table.get(number), index, shards)
            if place is None:
                fresh[i] = named[i] = False
                place = self._substitute(table, own.start + i, shards)
            places.append(place)
        there = [place for place in places if place is not None]
        # with nothing to draw from, others of the batch stand in; with none of those, the batch is passed over
        filled = tuple(place or there[i % len(there)] for i, place in enumerate(places)) if there else ()
        spec = BatchSpec(filled, slots.keys_N[own])
        return _Outstanding(spec, slots.refs_N2[whole], fresh, named, self.position, self.position, frozenset(shards))

    def _substitute(self, table: Table, slot: int, shards: set[str]) -> Place | None:
        """A replay draw for a slot whose sample is lost or gone; None where everything is gone.  Raises Corrupt where too much is lost."""
        if self._substitutes is None or self._substitutes[0] != self.position.round:
            self._substitutes = (self.position.round, pool_of(self.position, self.planner.moves))
        pool = self._substitutes[1]
        for attempt in range(LOST_TRIES if len(pool) else 0):
            number, index = substitute(self.config.seed, self.position.round, slot, attempt, pool)
            place = self._place(table.get(number), index, shards, count=False)
            if place is not None:
                return place
        if not len(pool):
            return None
        raise Corrupt(
            f"round {self.position.round}: a slot's shard is lost, and so were {LOST_TRIES} others drawn in its place; "
            "see `streamlearn status` and restore the store from a backup"
        )

    def _place(self, shard: tuple[str, str] | None, index: int, shards: set[str], *, count: bool = True) -> Place | None:
        """Where the bytes of a sample lie on this disk; None if it was taken down, or its shard is lost."""
        spot = self.planner.moves.spot(*shard, index) if shard else None
        if shard and spot is None:
            self.counts["taken_down"] += count
            return None
        try:
            if spot is None:
                raise NotFound("not in the table")
            path, samples = self.cache.shard(spot.key, spot.sha256, pinned=self._pinned() | shards)
        except (NotFound, Corrupt):
            self.counts["lost"] += count
            return None
        shards.add(spot.key)
        sample: ShardSample = samples[spot.index]
        return Place(str(path), sample)

    def _grey(self) -> tuple[Tensor, ...]:
        """A part of nothing but grey images."""
        size = self.part.stop - self.part.start
        return tuple(torch.zeros(c.count, size, 3, c.size, c.size, device=self.crew.device) for c in self.config.crops)

    # -- what ends meanwhile -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See what has ended, every few seconds.  A catalog out of reach is no reason to stop: planning says so when it needs it."""
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            with contextlib.suppress(Retryable):
                self.planner.look()

    def _heed(self) -> bool:
        """Drop what was made from shards that have ended; True if planning ahead must begin anew."""
        ended, self.planner.ended = self.planner.ended, []
        if not ended:
            return False
        self.cache.purge({row.sha256 for row in ended})
        self._substitutes = None
        keys = {row.key for row in ended}
        stale = next((i for i, item in enumerate(self._queue) if item.shards & keys), None)
        if stale is None:
            return False
        self.position = self._queue[stale].before
        while len(self._queue) > stale:
            dropped = self._queue.pop().work
            assert dropped is not None
            self.crew.end(dropped)
        return True

    def _pinned(self) -> frozenset[str]:
        return frozenset().union(*(item.shards for item in self._queue))
