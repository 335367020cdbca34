"""Shards on this disk ahead of need: fetched by a few threads in the order in which batches will read them.

Whoever plans batches says what they need and how soon (`foresee`), asks what is here (`copy`), and is never blocked: planning goes on, and what
is ready is delivered, while downloads take their time.  The order of samples knows nothing of this.

Fetched ahead are `stream.prefetch_bytes` and no more.  Where `stream.cache_bytes` has no room, what nobody uses goes first, then what is
needed last; nothing goes for something that is needed later.  What even so has no room waits until outstanding batches are done with theirs; when
there are none, the next batch gets what it needs, over the budget.  So a round larger than the budget goes on, with one batch at a time at worst.

A store that cannot be reached, or a disk without room, is waited out for as long as it takes (waits.py), and a download goes on where it stopped.
NotFound, and bytes that are wrong twice, are `Lost`: whoever asked looks at the catalog before believing it.

How copies are made, shared with other ranks and purged is told in copies.py.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from streamlearn.contract import durable
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import Corrupt, NotFound, Retryable, StoreFull
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import ShardSample, index_shard
from streamlearn.contract.waits import Waits
from streamlearn.stream.copies import Copies, Refusal

CHUNK_BYTES = 8 * 2**20  # of one request: what a fault costs, and what a download holds in memory
POLL_S = 0.05  # between looks at what other ranks do
T = TypeVar("T")


class Want(NamedTuple):
    """A shard."""

    key: str
    sha256: str


@dataclass(frozen=True)
class Copy:
    """A shard that is here, and stays here while a batch needs it."""

    path: str
    samples: list[ShardSample]


@dataclass(frozen=True)
class Lost:
    """The store has it no more, or holds other bytes in its place."""

    error: NotFound | Corrupt
    at: float  # monotonic


@dataclass(frozen=True)
class _Coming:
    """A thread is at it."""


@dataclass(frozen=True)
class _Later:
    """To be tried again."""

    at: float  # monotonic
    full: bool  # for want of room: then nothing that is needed later gets it either


class _Unwanted(Exception):
    """The download at hand: purged meanwhile, needed no more, or the cache is closed."""


class ShardCache:
    """One rank's.  All methods are for one thread, the loader's."""

    def __init__(self, store: ObjectStore, folder: Path, config: StreamConfig, waits: Waits):
        self.store, self.config, self.waits = store, config, waits
        self.copies = Copies(folder, config.cache_bytes)
        self._counts = {"downloads": 0, "download_bytes": 0, "cache_hits": 0}
        self._changed = threading.Condition()  # guards all below
        self._closed, self._changes = False, 0
        self._heeded = 0  # version of the catalog
        self._wants = dict[str, Want]()  # by digest, in the order of need
        self._near = dict[str, int]()  # digest -> 0: the next batch or an outstanding one needs it; 1, 2, ...: later ones
        self._force = False  # the next batch over the budget
        self._kept = frozenset[str]()  # digests that outstanding batches read
        self._states = dict[str, Copy | Lost | _Coming | _Later]()
        self._sizes = dict[str, int]()  # bytes, as far as known
        # one thread more is for copies that are here: they must not wait behind a store that is down
        self._lanes = {False: config.downloads, True: 1}  # threads that are free to begin
        self._pool, self._jobs = ThreadPoolExecutor(config.downloads + 1, "shards"), list["Future[None]"]()

    def foresee(self, wants: Sequence[Want], *, urgent: int, kept: Collection[str], force: bool) -> None:
        """What coming batches need, soonest first.

        The first `urgent` are for the very next one, and with `force` they are fetched though the budget has no room.  `kept`: digests of what
        outstanding batches need.  All else is held no longer.
        """
        with self._changed:
            self._force, self._kept, self._wants = force, frozenset(kept), {want.sha256: want for want in wants}
            self._near = {want.sha256: max(0, i + 1 - urgent) for i, want in enumerate(wants)} | dict.fromkeys(self._kept, 0)
            over = [s for s, state in self._states.items() if s not in self._near and not isinstance(state, _Coming | Lost)]
            self._let_go(over)
            self._sizes = {s: size for s, size in self._sizes.items() if s in self._near or s in self._states}
            self._changed.notify_all()
            self._staff()

    def copy(self, sha256: str) -> Copy | Lost | None:
        """None: it is not here yet."""
        state = self._states.get(sha256)
        return state if isinstance(state, Copy | Lost) else None

    def here(self, want: Want) -> bool:
        """Whether it will be had without the store."""
        return self.copies.has(want.sha256)

    def keep(self, digests: Collection[str]) -> bool:
        """Hold these for an outstanding batch; False if one of them is not here any more."""
        with self._changed:
            if not all(isinstance(self._states.get(sha256), Copy) for sha256 in digests):
                return False
            self._kept |= set(digests)
            return True

    def wait(self, timeout_s: float) -> None:
        """Until a download has ended, at most so long."""
        end = time.monotonic() + timeout_s
        with self._changed:
            seen = self._changes
            while self._changes == seen and (left := end - time.monotonic()) > 0:
                self._staff()
                self._changed.wait(min(left, POLL_S))

    def purge(self, digests: Collection[str], version: int) -> None:
        """Drop the copies of shards that have ended, as of a version of the catalog: those of all ranks of this host, and those on their way."""
        with self._changed:  # first of all no thread may begin with one again: see _claim
            for sha256 in digests:
                self._wants.pop(sha256, None)
                self._near.pop(sha256, None)
                if not isinstance(self._states.get(sha256), _Coming):
                    self._states.pop(sha256, None)
        self.copies.purge(digests, version)
        self.acknowledge(version)

    def noted(self) -> int:
        """How much of the catalog any rank of this host has heeded.  Nothing is downloaded until that is acknowledged."""
        return self.copies.noted()

    def acknowledge(self, version: int) -> None:
        """All that has ended up to this version is purged, and wanted no more."""
        with self._changed:
            self._heeded = max(self._heeded, version)

    def stale(self) -> bool:
        return self.noted() > self._heeded

    def forget_lost(self) -> None:
        """Whoever wants them again has them asked for again."""
        with self._changed:
            self._states = {sha256: state for sha256, state in self._states.items() if not isinstance(state, Lost)}

    def recheck(self) -> None:
        """Some copy that was here is not: another rank has purged it, or somebody has emptied the folder."""
        with self._changed:
            for sha256, state in list(self._states.items()):
                if isinstance(state, Copy) and not Path(state.path).exists():
                    del self._states[sha256]

    def counters(self) -> dict[str, int]:
        with self._changed:
            ready = [s for s, state in self._states.items() if isinstance(state, Copy)]
            ahead = {"shards_ahead": len([s for s in ready if s not in self._kept]), "shards_held": len(ready)}
            return self._counts | ahead | {"cache_bytes": self.copies.bytes, "cache_evictions": self.copies.evictions}

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)  # a request in flight is not waited for: it finds itself unwanted
        self.copies.close()

    # -- who does what, under the lock ---------------------------------------------------------------------------------

    def _next(self, here: bool) -> Want | None:
        """What is to be fetched now; `here`: the first of what only has to be taken."""
        limit, ahead, like = min(self.config.prefetch_bytes, self.copies.budget_bytes), 0, max(self._sizes.values(), default=0)
        for sha256, want in self._wants.items():
            state, near = self._states.get(sha256), self._near[sha256]
            if isinstance(state, _Later) and time.monotonic() < state.at:
                if state.full:
                    return None
            elif state is None or isinstance(state, _Later):
                if near and ahead and ahead + self._sizes.get(sha256, like) > limit:
                    return None
                if not here or self.copies.has(sha256):
                    return want
            if near and not isinstance(state, Lost):
                ahead += self._sizes.get(sha256, like)
        return None

    def _staff(self) -> None:
        """A thread for whatever can be fetched.  Raises what ended one: credentials that are refused, a bug."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            job.result()
        for here, free in self._lanes.items():
            if not self._closed and free and self._next(here) is not None:
                self._lanes[here] = 0
                self._jobs += [self._pool.submit(self._work, here) for _ in range(free)]

    def _let_go(self, digests: Sequence[str]) -> None:
        held = [s for s in digests if isinstance(self._states.pop(s), Copy)]
        if held:
            self.copies.drop(held)

    # -- in the threads ------------------------------------------------------------------------------------------------

    def _work(self, here: bool) -> None:
        try:
            while True:
                with self._changed:
                    want = None if self._closed else self._next(here)
                    if want is None:
                        return
                    self._states[want.sha256] = _Coming()
                self._bring(want)
        finally:
            with self._changed:
                self._lanes[here] += 1
                self._changes += 1
                self._changed.notify_all()

    def _bring(self, want: Want) -> None:
        state: Copy | Lost | _Later | None
        try:
            state = self._settled(want)
        except (NotFound, Corrupt) as e:
            state = Lost(e, time.monotonic())
        except (_Unwanted, FileNotFoundError):  # purged, or somebody has emptied the folder
            state = None
        self.waits.gone(f"download {want.sha256}")
        with self._changed:
            if state is None:
                del self._states[want.sha256]
            else:
                self._states[want.sha256] = state
            self._changes += not isinstance(state, _Later)
            self._changed.notify_all()

    def _settled(self, want: Want) -> Copy | _Later:
        """Raises NotFound; Corrupt at the second time, for the first may have happened on the way."""
        path = self._patiently(want, partial(self.copies.take, want.sha256))
        if path is not None:
            if self.copies.sound(want.sha256, path):
                return self._known(want, path)
            self.copies.discard(want.sha256)
        if want.sha256 not in self._sizes:
            size = self._patiently(want, partial(self.store.size, want.key))
            with self._changed:
                self._sizes[want.sha256] = size
        for last in (False, True):
            part = self._patiently(want, partial(self._claim, want))
            if isinstance(part, Refusal):
                pause = {Refusal.HERE: 0.0, Refusal.FULL: 4 * POLL_S}.get(part, POLL_S)
                return _Later(time.monotonic() + pause, part is Refusal.FULL)
            try:
                return self._download(want, part)
            except Corrupt:
                if last:
                    raise
            finally:
                self.copies.abandon(want.sha256)
        raise AssertionError("the last try returns or raises")

    def _known(self, want: Want, path: Path) -> Copy:
        samples, size = index_shard(path), path.stat().st_size
        with self._changed:
            self._sizes[want.sha256] = size
            self._counts["cache_hits"] += 1
        return Copy(str(path), samples)

    def _claim(self, want: Want) -> Path | Refusal:
        """The part to download into; room for it may cost copies that are held for later batches."""
        while True:
            with self._changed:
                if want.sha256 not in self._near:
                    raise _Unwanted
                near, force, heeded = dict(self._near), self._force, self._heeded
            claim = partial(self.copies.claim, want.sha256, self._sizes[want.sha256], near, heeded=heeded)
            try:
                got = claim(force=False)
            except StoreFull:
                if not self._give_up_for(want):
                    raise
                continue
            if got is not Refusal.FULL:
                return got
            if not self._give_up_for(want):
                return claim(force=True) if force and not near[want.sha256] else got

    def _give_up_for(self, want: Want) -> bool:
        """Let go of the copy that is needed last, if that is after `want`."""
        with self._changed:
            at = self._near.get(want.sha256, 0)
            later = [(n, s) for s, n in self._near.items() if n > at and isinstance(self._states.get(s), Copy) and s not in self._kept]
            if later:
                self._let_go([max(later)[1]])
            return bool(later)

    def _download(self, want: Want, part: Path) -> Copy:
        """Raises NotFound, Corrupt; FileNotFoundError or _Unwanted where it is purged meanwhile."""
        digest, done, size = hashlib.sha256(), 0, self._sizes[want.sha256]
        fd = os.open(part, os.O_WRONLY)
        try:
            while done < size:
                data = self._patiently(want, partial(self.store.get_range, want.key, done, min(CHUNK_BYTES, size - done)))
                if self._closed or not os.fstat(fd).st_nlink:
                    raise _Unwanted
                if not data:
                    break
                self._patiently(want, partial(_write, fd, data, done, part))
                digest.update(data)
                done += len(data)
        finally:
            os.close(fd)
        if digest.hexdigest() != want.sha256:
            raise Corrupt(f"shard {want.key}: {done} bytes that do not match its sha256 {want.sha256[:12]}…")
        samples = index_shard(part)
        path = self._patiently(want, partial(self.copies.publish, want.sha256))
        if path is None:
            raise _Unwanted
        with self._changed:
            self._counts["downloads"] += 1
            self._counts["download_bytes"] += size
        return Copy(str(path), samples)

    def _patiently(self, want: Want, call: Callable[[], T]) -> T:
        """What it returns, whenever that is.  Raises _Unwanted where nobody needs it any more."""
        what = f"download {want.sha256}"
        while True:
            try:
                result = call()
            except Retryable as e:
                self._pause(want, self.waits.out(what, e), e)
            else:
                self.waits.over(what)
                return result

    def _pause(self, want: Want, seconds: float, e: Retryable) -> None:
        end = time.monotonic() + seconds
        with self._changed:
            self._changes += 1  # whoever waits for it is to know why
            self._changed.notify_all()
            while (left := end - time.monotonic()) > 0:
                # the interpreter waits for its threads before it ends: one second more, not for ever
                if self._closed or want.sha256 not in self._near or not threading.main_thread().is_alive():
                    raise _Unwanted from e
                self._changed.wait(min(left, 1.0))


def read_member(fd: int, sample: ShardSample) -> bytes:
    """One image's bytes from an open tar; safe from any thread or process."""
    return os.pread(fd, sample.size, sample.start)


def _write(fd: int, data: bytes, at: int, part: Path) -> None:
    """Raises StoreFull; writing again writes the same."""
    try:
        while data:
            written = os.pwrite(fd, data, at)
            data, at = data[written:], at + written
    except OSError as e:
        raise durable.translate(e, part) from e
