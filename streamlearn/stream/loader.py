"""Batches in the planned order, made ahead of need by worker processes.

Specs of batches are pure values (stream/ahead.py), handed out in order and collected in order, to whomever they are made by (stream/crew.py).
Crops come back as bytes in memory that is shared (stream/trays.py); what the workers leave to the learner's device is done when the batch is
taken: normalisation, and with `stream.augment` there all distortion.

A batch is made once its shards are on this disk (stream/cache.py).  While they are not, earlier batches are delivered, and then there is None to
deliver: a store that is down stops nothing but the learner's steps, and the batches that follow are those that would have come.

A shard may be rewritten or taken down at any time.  The catalog is looked at before every round and every few seconds in between, and at once where
another rank of this host has seen a newer one; what is seen to have ended leaves the local cache at once, and batches that were made ahead from it
are dropped and made again: their samples are read from where they lie now, and slots whose sample is gone go to replay.  So nothing that was
taken down is delivered once that is seen.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import Corrupt, NotFound, Retryable
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.waits import Waits
from streamlearn.stream import views
from streamlearn.stream.ahead import Ahead, Outstanding
from streamlearn.stream.cache import Copy, Lost, ShardCache, Want, read_member
from streamlearn.stream.crew import Crew
from streamlearn.stream.decode import Pixels, decode
from streamlearn.stream.keys import key, permutation
from streamlearn.stream.minred import Features
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position
from streamlearn.stream.replay import MINRED
from streamlearn.stream.rounds import fresh_refs, part_of_batch
from streamlearn.stream.worker import Sound

LOOK_S = 5.0  # between looks at the catalog in the middle of a round
SOON = 64  # images to be looked at, whose shards are fetched ahead
PATIENCE_S = 5.0  # a download that takes longer is no reason to keep the learner from saying that it waits


@dataclass(frozen=True)
class Batch:
    """One rank's part of a batch."""

    crops: tuple[Tensor, ...]  # one (V_r,B,3,S_r,S_r) float32 a resolution, on the learner's device
    fresh: Tensor  # (B,) bool
    named: Tensor  # (B,) bool: the image is the one that the plan names, and no stand-in
    wait_s: float  # how long the learner waited for it
    taken: Callable[..., dict[str, Any]]  # tells the stream that the batch is learnt: see Stream.take


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
        self.config, self.stop = config, stop
        self.part, self.ranks = part_of_batch(batch, rank, ranks), ranks
        position = Position.from_state(config, state) if state else Position.start(config)
        self.features = Features.from_state(state["features"]) if state and "features" in state else Features()
        self.waits = Waits()
        self.crew = Crew(config, batch=batch // ranks, device=torch.device(device))
        self.planner = Planner(config, catalog, store, batch=batch, leader=rank == 0)
        self.cache = ShardCache(store, cache_dir, config, self.waits)
        self.ahead = Ahead(self.planner, self.cache, self.waits, position=position, features=self.features, part=self.part)
        self.names: dict[str, str] = {}  # shard key -> sha256
        self.counts = {"corrupt": 0, "passed_over": 0}
        self._queue: deque[Outstanding] = deque()
        self._look_at = self._look_not_before = 0.0  # monotonic
        self._noted = 0  # what other ranks had heeded of the catalog before it was last looked at
        self._look()
        self._heed()

    def batches(self) -> Iterator[Batch | None]:
        """Ends when `stop` is set.  None, about every `poll_s`, while there is nothing to learn, or nothing to be had of it."""
        began = said = time.perf_counter()
        while not self.stop.is_set():
            self._look()
            self._heed()
            while len(self._queue) < self.config.prefetch and (item := self.ahead.next()) is not None:
                self._queue.append(item)
                item.work = self.crew.begin(item.spec)
            if self.planner.ended:  # planning has looked too
                continue
            self.ahead.foresee(self._kept())
            if not self._queue:
                waiting = self._idle()
                if not waiting or self.waits.why() or time.perf_counter() - said > PATIENCE_S:
                    yield None
                    said = time.perf_counter()
                    began = began if waiting else said
                continue
            batch = self._made(self._queue[0], began)
            if batch is not None:
                yield batch
                began = said = time.perf_counter()

    def take(self, item: Outstanding, sound: Sound, features_BD: Tensor | None = None) -> dict[str, Any]:
        """`Batch.taken`: where the stream stands once this batch is learnt, for the checkpoint.

        `features_BD`: what the learner made of each image, for MinRed (else it is not looked at); None where it made nothing of them.  With
        several ranks every one of them is told the same, of the whole batch, with zeros where a part's image is not `named`.
        """
        self.ahead.learnt = item.after
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

    def image_bytes(self, ref: str, then: Sequence[str] = ()) -> bytes:
        """Waits for its shard; `then`: what will be asked for next.  Raises NotFound, Corrupt; Retryable where the store cannot be reached."""
        while True:
            self._look()
            self._heed()
            want, at = self._spot(ref)
            self.ahead.foresee(self._kept(), first=[want, *self._shards(then)])
            copy = self.cache.copy(want.sha256)
            if isinstance(copy, Lost):
                raise copy.error
            if isinstance(copy, Copy) and self.cache.keep([want.sha256]):
                try:
                    fd = os.open(copy.path, os.O_RDONLY)
                except FileNotFoundError:
                    self.cache.recheck()
                    continue
                try:
                    return read_member(fd, copy.samples[at])
                finally:
                    os.close(fd)
            if (why := self.waits.why()) and not self.cache.here(want):
                raise why
            self.cache.wait(1.0)

    def _spot(self, ref: str) -> tuple[Want, int]:
        name, _, index = ref.rpartition("#")
        if name not in self.names:
            raise NotFound(f"{ref}: not among the shards of this stream")
        spot = self.ahead.spot((name, self.names[name]), int(index))
        if spot is None:
            raise NotFound(f"{ref}: taken down")
        return spot

    def _shards(self, refs: Sequence[str]) -> Iterator[Want]:
        """As far as they are there."""
        for ref in refs:
            with contextlib.suppress(NotFound):
                yield self._spot(ref)[0]

    def eval_images(self, refs: list[str], size: int) -> Tensor:
        """(N,3,size,size) normalised centre crops.  An image that has vanished or cannot be decoded stands as the one before it.

        Raises Retryable where the store cannot be reached; what has come is in the cache for the next try.
        """
        crops: list[Pixels] = []
        for i, ref in enumerate(refs):
            try:
                crops.append(views.eval_crop(decode(self.image_bytes(ref, refs[i + 1 : i + SOON])), size))
            except (NotFound, Corrupt):
                self.counts["corrupt"] += 1
                if crops:
                    crops.append(crops[-1])
        pixels = np.stack(crops) if crops else np.empty((0, size, size, 3), np.uint8)
        return views.normalised(pixels, self.config.mean, self.config.std)

    def counters(self) -> dict[str, int]:
        more = {"worker_deaths": self.crew.deaths, "expired_unseen": self.ahead.position.unseen, "batches_ahead": len(self._queue)}
        return self.counts | dict(self.ahead.counts) | more | self.cache.counters() | {"failures": self.waits.failures}

    def waiting(self) -> dict[str, Any]:
        """What it waits for and since when, for the heartbeat."""
        return self.waits.told()

    def close(self) -> None:
        self.crew.close()
        self.cache.close()

    def _made(self, item: Outstanding, began: float) -> Batch | None:
        """The first batch of the queue, once it is made; None where it is to be made again, or passed over."""
        assert item.work is not None
        try:
            sound = self.crew.collect(item.work)
        except FileNotFoundError:  # another rank has purged a copy, or somebody has emptied the cache
            self._look_at = 0.0
            self.cache.recheck()
            self._make_again(0)
            return None
        self._queue.popleft()
        self.counts["corrupt"] += int((~sound).sum())
        crops = self.crew.crops(item.work) if sound.any() else ()
        self.crew.end(item.work)
        if self._queue and (following := self._queue[0].work) is not None:
            self.crew.copy_ahead(following)
        if not crops:
            self.counts["passed_over"] += 1  # a whole batch of garbage: the sequence goes on without it
            if self.ranks == 1:
                self.ahead.learnt = item.after
                return None
            # other ranks' parts may be sound, and all must take the same number of steps
            crops, sound = self._grey(), np.zeros(len(item.fresh), bool)
        fresh, named = torch.from_numpy(item.fresh & sound), torch.from_numpy(item.named & sound)
        return Batch(crops, fresh, named, time.perf_counter() - began, partial(self.take, item, sound))

    def _idle(self) -> bool:
        """Nothing is ready: wait a little.  False where that is because there is nothing to learn."""
        if self.ahead.lacks:
            if not self.ahead.must_look or time.monotonic() < self._look_not_before:
                self.cache.wait(min(self.config.poll_s, 1.0))
        else:
            self.stop.wait(self.config.poll_s)
        return self.ahead.lacks

    def _grey(self) -> tuple[Tensor, ...]:
        """A part of nothing but grey images."""
        size = self.part.stop - self.part.start
        return tuple(torch.zeros(c.count, size, 3, c.size, c.size, device=self.crew.device) for c in self.config.crops)

    # -- what ends meanwhile -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See what has ended, every few seconds, and where somebody knows more.  A catalog out of reach is no reason to stop."""
        at = time.monotonic()
        if at < self._look_not_before or not (at >= self._look_at or self.ahead.must_look or self.cache.stale()):
            return
        noted, self._look_at = self.cache.noted(), at + LOOK_S
        try:
            self.planner.look()
        except Retryable as e:
            self._look_not_before = time.monotonic() + self.waits.out("look", e)
            return
        self.waits.over("look")
        self._noted, self.ahead.looked, self.ahead.must_look = noted, at, False

    def _heed(self) -> None:
        """Drop what was made from shards that have ended."""
        ended, self.planner.ended = self.planner.ended, []
        if ended:
            self.cache.purge({row.sha256 for row in ended}, self.planner.version)
            self.ahead.heed()
            keys = {row.key for row in ended}
            stale = next((i for i, item in enumerate(self._queue) if any(want.key in keys for want in item.shards)), None)
            if stale is not None:
                self._make_again(stale)
        self.cache.acknowledge(self._noted)

    def _make_again(self, first: int) -> None:
        """The batches of the queue from one on."""
        self.ahead.rewind(self._queue[first].before)
        while len(self._queue) > first:
            dropped = self._queue.pop().work
            assert dropped is not None
            self.crew.end(dropped)

    def _kept(self) -> frozenset[Want]:
        return frozenset().union(*(item.shards for item in self._queue))
