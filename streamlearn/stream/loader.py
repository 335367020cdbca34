"""Batches in the planned order, made ahead of need by worker processes.

Specs of batches are pure values, handed out in order and collected in order; a worker that dies costs its work, not its place: the pool is
made anew and the outstanding specs are handed out again.  Crops come back as bytes in memory that is shared (stream/trays.py); what the
workers leave to the learner's device is done when the batch is taken: normalisation, and with `stream.augment` there all distortion.

A shard may be rewritten or taken down at any time.  The catalog is looked at before every round and every few seconds in between; what is
seen to have ended leaves the local cache at once, and batches that were made ahead from it are dropped and made again: their samples are
read from where they lie now, and slots whose sample is gone go to replay.  So nothing that was taken down is delivered once that is seen.
"""

import contextlib
import importlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from numpy.typing import NDArray
from torch import Tensor

from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, Retryable
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import ShardSample
from streamlearn.stream import distort, views
from streamlearn.stream.cache import ShardCache, read_member
from streamlearn.stream.decode import Pixels, decode
from streamlearn.stream.keys import key, permutation
from streamlearn.stream.plan import Planner, Position, Shard, Slots, finished, fresh_refs, order, pool_of, substitute
from streamlearn.stream.trays import Tray, Trays
from streamlearn.stream.worker import BatchSpec, Place, Sound, make, make_in, start_worker

LOOK_S = 5.0  # between looks at the catalog in the middle of a round
LOST_TRIES = 32  # replay draws tried for a slot whose shard is lost


@dataclass(frozen=True)
class Batch:
    crops: tuple[Tensor, ...]  # one (V_r,B,3,S_r,S_r) float32 a resolution, on the learner's device
    fresh: Tensor  # (B,) bool
    state: dict[str, Any]  # where the stream stands once this batch is taken
    wait_s: float  # how long the learner waited for it


def _need_opencv() -> None:
    """Raises ConfigError where it is installed without the system's libraries that it loads."""
    try:
        importlib.import_module("streamlearn.stream.distort_cpu")
    except ImportError as e:
        raise ConfigError(
            f"stream.augment: the workers' distortions need OpenCV, which cannot be loaded here: {e}. Install what it lacks "
            "(Debian: libgl1 and libglib2.0-0), or set stream.augment to 'device'"
        ) from e


@dataclass
class _Outstanding:
    spec: BatchSpec
    fresh: np.ndarray[Any, np.dtype[np.bool_]]
    before: Position  # to make it again
    after: Position
    shards: frozenset[str]
    tray: Tray | None = None  # where its crops are written
    future: "Future[Sound] | None" = None


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
    ):
        self.config, self.batch, self.stop, self.device = config, batch, stop, torch.device(device)
        self.paint = config.augment == "workers" or (config.augment == "auto" and self.device.type == "cpu")
        if self.paint:
            _need_opencv()
        self.planner = Planner(config, catalog, store, batch=batch)
        self.cache = ShardCache(store, cache_dir, config.cache_bytes)
        self.position = Position.from_state(config, state) if state else Position.start(config)
        self.names: dict[str, Shard] = {}
        self.counts = {"corrupt": 0, "lost": 0, "worker_deaths": 0, "passed_over": 0, "taken_down": 0}
        self._queue: deque[_Outstanding] = deque()
        self._trays = Trays(config.crops, batch, config.prefetch + 1)  # one to write on while another is unwanted
        self._pool: ProcessPoolExecutor | None = None
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
                self._submit(item)
            if self.planner.ended:  # planning has looked too
                continue
            if not self._queue:
                self.stop.wait(self.config.poll_s)
                yield None
                continue
            began = time.perf_counter()
            item = self._queue[0]
            sound = self._collect(item)
            self._queue.popleft()
            self.counts["corrupt"] += int((~sound).sum())
            crops = self._finished(item) if sound.any() else ()
            self._give_back(item)
            if not crops:
                self.counts["passed_over"] += 1  # a whole batch of garbage: the sequence goes on without it
                continue
            fresh = torch.from_numpy(item.fresh & sound)
            yield Batch(crops, fresh, item.after.to_state(), time.perf_counter() - began)

    def sample(self, state: dict[str, Any], count: int) -> list[str]:
        """Up to `count` references `<shard key>#<index>` of images learnt so far, drawn by a key of the state alone."""
        position = Position.from_state(self.config, state)
        table, refs = dict(position.table), position.reservoir.refs_N2
        if position.record is not None and not len(refs):
            table |= {s.number: s for s in position.record.shards}
            refs = fresh_refs(position.record)
        chosen = permutation(key(self.config.seed, position.round, position.place, "sample"), len(refs))[:count]
        self.names |= {s.key: s for s in table.values()}
        return [f"{table[shard].key}#{index}" for shard, index in refs[chosen].tolist()]

    def image_bytes(self, ref: str) -> bytes:
        """Raises NotFound, Corrupt."""
        name, _, index = ref.rpartition("#")
        if name not in self.names:
            raise NotFound(f"{ref}: not among the shards of this stream")
        spot = self.planner.moves.spot(name, self.names[name].sha256, int(index))
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
        return dict(self.counts) | {"cache_bytes": self.cache.bytes, "expired_unseen": self.position.unseen}

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._trays.close()

    # -- planning ahead ------------------------------------------------------------------------------------------------

    def _specs(self) -> Iterator[_Outstanding | None]:
        """Specs in order, for ever; None whenever nothing is planned."""
        while True:
            planned = self.planner.planned(self.position)
            if planned is None:
                yield None
                continue
            self.position, round_ = planned, planned.record
            assert round_ is not None
            slots = order(self.config.seed, round_, self.position.reservoir)
            table = dict(self.position.table) | {s.number: s for s in round_.shards}
            while self.position.place < round_.batches:
                at = slice(self.position.place * self.batch, (self.position.place + 1) * self.batch)
                after = replace(self.position, place=self.position.place + 1)
                if after.place == round_.batches:
                    after = finished(after)
                item = self._spec(table, slots, at)
                item.before, item.after = self.position, after
                self.position = after
                yield item
                if after.record is None:  # the round is over
                    break

    def _spec(self, table: dict[int, Shard], slots: Slots, at: slice) -> _Outstanding:
        places, fresh, shards = list[Place | None](), slots.fresh_N[at].copy(), set[str]()
        for i, (number, index) in enumerate(slots.refs_N2[at].tolist()):
            place = self._place(table.get(number), index, shards)
            if place is None:
                fresh[i] = False
                place = self._substitute(table, at.start + i, shards)
            places.append(place)
        there = [place for place in places if place is not None]
        # with nothing to draw from, others of the batch stand in; with none of those, the batch is passed over
        whole = tuple(place or there[i % len(there)] for i, place in enumerate(places)) if there else ()
        return _Outstanding(BatchSpec(whole, slots.keys_N[at]), fresh, self.position, self.position, frozenset(shards))

    def _substitute(self, table: dict[int, Shard], slot: int, shards: set[str]) -> Place | None:
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

    def _place(self, shard: Shard | None, index: int, shards: set[str], *, count: bool = True) -> Place | None:
        """Where the bytes of a sample lie on this disk; None if it was taken down, or its shard is lost."""
        spot = self.planner.moves.spot(shard.key, shard.sha256, index) if shard else None
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
            dropped = self._queue.pop()
            if dropped.future is not None:
                dropped.future.cancel()
            self._give_back(dropped)
        return True

    def _pinned(self) -> frozenset[str]:
        return frozenset().union(*(item.shards for item in self._queue))

    # -- workers -------------------------------------------------------------------------------------------------------

    def _submit(self, item: _Outstanding) -> None:
        item.tray = item.tray or self._trays.take()
        if self.config.workers == 0:
            return
        if self._pool is None:
            # forkserver: neither torch's threads nor its memory are copied into the workers
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["streamlearn.stream.worker"])
            self._pool = ProcessPoolExecutor(self.config.workers, mp_context=context, initializer=start_worker, initargs=(os.getpid(),))
        try:
            item.future = self._pool.submit(make_in, self.config, item.spec, item.tray, paint=self.paint)
        except BrokenProcessPool:
            self._revive()

    def _collect(self, item: _Outstanding) -> Sound:
        assert item.tray is not None
        if self.config.workers == 0:
            return make(self.config, item.spec, self._trays.arrays(item.tray), paint=self.paint)
        while True:
            try:
                assert item.future is not None
                return item.future.result()
            except BrokenProcessPool:
                self._revive()

    def _give_back(self, item: _Outstanding) -> None:
        assert item.tray is not None
        self._trays.give_back(item.tray, item.future)
        item.tray = None

    def _finished(self, item: _Outstanding) -> tuple[Tensor, ...]:
        """From bytes to what the learner takes, in memory of its own and on its device."""
        assert item.tray is not None
        finished, first = list[Tensor](), 0
        for pixels_VBSSC in self._trays.arrays(item.tray):
            V, B, S = pixels_VBSSC.shape[:3]
            rows = torch.from_numpy(pixels_VBSSC).view(V * B, S, S, 3).to(self.device)
            if self.paint:
                x = views.normalised(rows, self.config.mean, self.config.std)
            else:
                x = distort.distorted(rows, distort.draw(item.spec.keys_B, range(first, first + V), self.config), self.config)
            finished.append(x.view(V, B, 3, S, S))
            first += V
        return tuple(finished)

    def _revive(self) -> None:
        """A worker was killed: a new pool, and every outstanding spec again."""
        self.counts["worker_deaths"] += 1
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        for item in self._queue:
            self._submit(item)
