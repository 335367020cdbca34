"""One partition's way from records to shards: read ahead, fetch many at once, take the results in offset order, spool, seal."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from ingest.fetch.client import Client, Fetched
from ingest.pack import Taken, Unit, origins
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.errors import Corrupt, Fenced, OffsetGap, Retryable
from streamlearn.contract.event_log import CANDIDATES, Record

if TYPE_CHECKING:
    from ingest.fetch.run import Fetcher

IDLE_S = 0.2  # between looks at a partition that has nothing new
MOST_SKIPPED = 100_000  # offsets without a record between two that have one; more is an incident
logger = logging.getLogger(__name__)


class Lane:
    """One partition of one topic."""

    def __init__(self, fetcher: "Fetcher", client: Client, topic: str, partition: int):
        self.fetcher, self.client, self.topic, self.partition = fetcher, client, topic, partition
        self.position = self.next = 0  # sealed up to here; next offset to read
        self.unit: Unit | None = None
        self.waiting: deque[tuple[Record, asyncio.Task[Taken]]] = deque()  # in offset order
        self.held = 0  # bytes of finished images that wait
        self.seen: set[str] = set()  # origins met in this partition (retry topics)
        self.parked: Record | None = None  # a retry that is not due yet
        self.window = max(2, fetcher.config.fetch.concurrency)
        self.leaving = False  # the partition is another's now; should it be ours again, another lane begins it

    async def run(self) -> None:
        try:
            await self._run()
        finally:
            self._drop()

    async def _run(self) -> None:
        await self._restart()
        while not self.leaving:
            try:
                await self._round()
            except Fenced as e:
                logger.warning("unit dropped: %s", e)
                self.fetcher.metrics.fenced.inc()
                await self._restart()
            except Retryable as e:  # the spool is full: drop it, wait, fetch again
                await self._wait_out(e)
                await self._restart()

    async def _round(self) -> None:
        """Read ahead, take what is finished, seal what is full; then wait for whatever comes first."""
        await self._read_ahead()
        while self.waiting and self.waiting[0][1].done():
            _, task = self.waiting.popleft()
            self._take(task.result())
            await self._seal_if_full()
        await self._seal_if_full()
        await self._read_ahead()
        if self.waiting:
            await asyncio.wait([self.waiting[0][1]], timeout=IDLE_S)
        else:
            await asyncio.sleep(IDLE_S)

    async def _seal_if_full(self) -> None:
        if self.unit and (self.unit.full(self.fetcher.config.shard, time.monotonic()) or self.fetcher.crowded_by(self)):
            await self._seal()

    async def _read_ahead(self) -> None:
        room = self.window - len(self.waiting)
        if room <= 0 or not self.fetcher.room_for(self):
            return
        records = await self.fetcher.read(self.fetcher.log.read, self.topic, self.partition, self.next, room)
        for record in records if not self.leaving else ():
            try:
                candidate = Candidate.from_json(record.value)
            except Corrupt:
                candidate = None
            if candidate and candidate.not_before and candidate.not_before > time.time():
                self.parked = record
                return  # the head is not due: later ones of this delay are not either
            self.parked = None
            self.next = record.offset + 1
            self.waiting.append((record, asyncio.create_task(self._fetch(record.offset, candidate))))

    async def _fetch(self, offset: int, candidate: Candidate | None) -> Taken:
        if candidate is None:
            return Taken(offset, None, None)
        if candidate.origin:
            if candidate.origin in self.seen:
                return Taken(offset, candidate, None, again=True)
            self.seen.add(candidate.origin)
        began = time.perf_counter()
        result = await self.client.fetch(candidate)
        self.fetcher.metrics.seconds.observe(time.perf_counter() - began)
        if isinstance(result, Fetched):
            self.held += len(result.body)
            self.fetcher.metrics.bytes.inc(len(result.body))
        return Taken(offset, candidate, result)

    def _take(self, taken: Taken) -> None:
        if isinstance(taken.result, Fetched):
            self.held -= len(taken.result.body)
        if self.unit is None:
            spool = self.fetcher.spool / f"{self.topic}-{self.partition}-{self.position:020d}.tar"
            self.unit = Unit(self.topic, self.partition, self.position, spool, time.monotonic())
        if taken.offset - self.unit.end > MOST_SKIPPED:
            raise OffsetGap(
                f"{self.topic}/{self.partition}: the log goes from {self.unit.end - 1} to {taken.offset}: records are missing. "
                "Restore the topic, or accept the loss by moving the catalog's position by hand"
            )
        for offset in range(
            self.unit.end, taken.offset
        ):  # a transaction's marker, or compacted away: no record, and an outcome all the same
            self.fetcher.packer.add(self.unit, Taken(offset, None, None, absent=True))
        self.fetcher.packer.add(self.unit, taken)

    async def _seal(self) -> None:
        unit = self.unit
        assert unit is not None
        if unit.holds(self.client.denied):  # taken down since it was fetched: the offsets are fetched again, and it is refused
            await self._restart()
            return
        while True:
            try:
                async with self.fetcher.sealing:
                    row = await asyncio.to_thread(self.fetcher.packer.seal, unit)
                break
            except Retryable as e:  # the store is full or busy: the unit stays in hand
                await self._wait_out(e)
                if self.leaving and not unit.committed:
                    return  # its new owner fetches it again
        self.fetcher.full = ""
        self.position, self.unit = unit.end, None
        self.fetcher.sealed(unit, row.num_samples)

    async def _wait_out(self, e: Retryable) -> None:
        logger.error("waiting: %s", e)
        self.fetcher.full = str(e)
        self.fetcher.metrics.full.inc()
        await asyncio.sleep(e.after_s)

    async def _restart(self) -> None:
        """Back to what the catalog says; whatever was in flight is fetched again."""
        tasks = self._drop()
        await asyncio.gather(*tasks, return_exceptions=True)
        while True:
            try:
                async with self.fetcher.sealing:
                    self.position = self.next = await asyncio.to_thread(self.fetcher.packer.recover, self.topic, self.partition)
                break
            except Retryable as e:
                await self._wait_out(e)
                if self.leaving:
                    return
        if self.topic != CANDIDATES:
            self.seen = await self.fetcher.read(origins, self.fetcher.log, self.topic, self.partition, self.position)

    def leave(self) -> None:
        """The partition was taken from us: nothing of it is asked for any more.  What is being sealed is sealed, or fenced."""
        self.leaving = True
        self._cancel()

    def _cancel(self) -> list[asyncio.Task[Taken]]:
        """The requests that were on their way."""
        tasks = [task for _, task in self.waiting]
        for task in tasks:
            task.cancel()
        self.waiting.clear()
        self.held = 0
        return tasks

    def _drop(self) -> list[asyncio.Task[Taken]]:
        """Let go of everything that is not sealed; the requests that were on their way."""
        tasks = self._cancel()
        if self.unit is not None:
            with contextlib.suppress(FileNotFoundError):
                self.unit.drop()
            self.unit = None
        return tasks

    @property
    def spooled(self) -> int:
        """Bytes of the open unit."""
        return self.unit.writer.size if self.unit else 0

    def oldest_age(self) -> float:
        """Seconds since the oldest record was appended that the catalog does not cover; a parked retry is not late."""
        if self.waiting:
            return max(0.0, time.time() - self.waiting[0][0].timestamp_ms / 1000)
        return time.monotonic() - self.unit.opened_at if self.unit else 0.0
