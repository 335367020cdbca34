"""One partition's way from records to shards: read ahead, fetch many at once, take the results in offset order, spool, seal.

A fault that may pass is waited out where it happens (waits.py), with everything in hand:

  recover, read   the log, catalog or store is out of reach      nothing new is asked for; what is there is still taken and sealed
  spool           its disk has no room                           the open unit is sealed as it is, which makes some; else room is waited for
  seal            store, catalog or log out of reach, or full    the unit stays on disk, nothing more is read

Open units leave each other room to be closed (Fetcher.check_room).  Only where something else takes that too is a unit dropped, to make room,
and its offsets are fetched again.
"""

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from ingest.fetch.client import Client, Fetched
from ingest.pack import Taken, Unit, origins
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.errors import Corrupt, Fenced, OffsetGap, Retryable, StoreFull
from streamlearn.contract.event_log import CANDIDATES, Record
from streamlearn.contract.shards import STORED

if TYPE_CHECKING:
    from ingest.fetch.run import Fetcher

IDLE_S = 0.2  # between looks at a partition that has nothing new
MEMBER_BYTES = 2**14  # of a tar around one image: headers, description, padding
MOST_PAUSE_S = 60.0  # before offsets are fetched again whose unit found no room: hosts are not asked in vain every two seconds
MOST_SKIPPED = 100_000  # offsets without a record between two that have one; more is an incident
logger = logging.getLogger(__name__)


class Lane:
    """One partition of one topic."""

    def __init__(self, fetcher: "Fetcher", client: Client, topic: str, partition: int):
        self.fetcher, self.client, self.topic, self.partition = fetcher, client, topic, partition
        self.name, self.waits = f"{topic}/{partition}", fetcher.waits
        self.position = self.next = 0  # sealed up to here; next offset to read
        self.lost = True  # where we are is to be asked of the catalog; what is in hand counts no more
        self.dropped = 0  # units in a row, for want of room to close them
        self.oldest_ms = 0  # when the first record of the open unit was appended
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
            self.waits.gone(self.name)

    async def _run(self) -> None:
        while not self.leaving:
            try:
                if self.lost:
                    await self._restart()
                await self._round()
            except Fenced as e:
                logger.warning("unit dropped: %s", e)
                self.fetcher.metrics.fenced.inc()
                self.waits.over(self.name, "seal")  # store and catalog have answered
                self.waits.gone(self.name)
                self.lost = True

    async def _round(self) -> None:
        """Read ahead, take what is finished, seal what is full; then wait for whatever comes first."""
        await self._read_ahead()
        while self.waiting and self.waiting[0][1].done() and not (self.lost or self.leaving):
            await self._take_first()
            await self._seal_if_full()
        await self._seal_if_full()
        await self._read_ahead()
        if self.waiting:
            await asyncio.wait([self.waiting[0][1]], timeout=IDLE_S)
        else:
            await asyncio.sleep(IDLE_S)

    async def _take_first(self) -> None:
        """Spool the first that waits.  Where there is no room for it, it waits on."""
        record, task = self.waiting[0]
        try:
            self._take(record, task.result())
        except StoreFull as e:
            if self.unit and self.unit.outcomes:
                await self._seal()
                return
            self._drop_unit()
            await self.waits.out(self.name, "spool", e)
        else:
            self.waiting.popleft()
            self.waits.over(self.name, "spool")

    async def _seal_if_full(self) -> None:
        if self.unit and (self.unit.full(self.fetcher.config.shard, time.monotonic()) or self.fetcher.crowded_by(self)):
            await self._seal()

    async def _read_ahead(self) -> None:
        room = self.window - len(self.waiting)
        if self.lost or room <= 0 or not self.fetcher.room_for(self):
            return
        try:
            records = await self.fetcher.read(self.fetcher.log.read, self.topic, self.partition, self.next, room)
        except Retryable as e:
            await self.waits.out(self.name, "read", e)
            return
        self.waits.over(self.name, "read")
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

    def _take(self, record: Record, taken: Taken) -> None:
        """Into the open unit.  Raises StoreFull; then it is not in it, and may be taken again."""
        if self.unit is None:
            self.oldest_ms = record.timestamp_ms
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
        if isinstance(taken.result, Fetched):
            self.fetcher.check_room(len(taken.result.body) + MEMBER_BYTES)
        outcome = self.fetcher.packer.add(self.unit, taken)
        if taken.candidate is not None and outcome.outcome == STORED:
            self.unit.discovered.append(taken.candidate.discovered_at)
        if isinstance(taken.result, Fetched):
            self.held -= len(taken.result.body)

    async def _seal(self) -> None:
        unit = self.unit
        assert unit is not None
        if unit.holds(self.client.denied):  # taken down since it was fetched: the offsets are fetched again, and it is refused
            self.lost = True
            return
        while True:
            try:
                async with self.fetcher.sealing:
                    row = await asyncio.to_thread(self.fetcher.packer.seal, unit)
                break
            except Retryable as e:  # the store is full or out of reach: the unit stays in hand
                if not unit.spooled:  # its own disk has no room to close it: kept, it might leave no lane room to close any
                    self._drop_unit()
                    self.lost, self.dropped = True, self.dropped + 1
                    await self.waits.out(self.name, "seal", e, pause_s=min(MOST_PAUSE_S, e.after_s * 2**self.dropped))
                    return
                await self.waits.out(self.name, "seal", e)
                if self.leaving and not unit.committed:
                    return  # its new owner fetches it again
        self.waits.over(self.name, "seal")
        self.dropped = 0
        self.position, self.unit = unit.end, None
        ids = {"topic": row.topic, "partition": row.partition, "first_offset": row.first_offset, "end_offset": row.end_offset}
        logger.info("sealed %s: %d images", row.key, row.num_samples, extra={"ids": {"shard": row.key} | ids})
        self.fetcher.sealed(unit, row.num_samples)

    async def _restart(self) -> None:
        """Back to what the catalog says; whatever was in flight is fetched again."""
        tasks = self._drop()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with self.fetcher.sealing:
                position = await asyncio.to_thread(self.fetcher.packer.recover, self.topic, self.partition)
            if self.topic != CANDIDATES:
                self.seen = await self.fetcher.read(origins, self.fetcher.log, self.topic, self.partition, position)
        except Retryable as e:
            await self.waits.out(self.name, "recover", e)
            return
        self.waits.over(self.name, "recover")
        self.position = self.next = position
        self.lost = False

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
        self._drop_unit()
        return tasks

    def _drop_unit(self) -> None:
        if self.unit is not None:
            self.unit.drop()
            self.unit = None

    @property
    def spooled(self) -> int:
        """Bytes of the open unit."""
        return self.unit.writer.size if self.unit else 0

    def oldest_age(self) -> float:
        """Seconds since the oldest record was appended that the catalog does not cover; a parked retry is not late."""
        if not self.unit and not self.waiting:
            return 0.0
        oldest_ms = self.oldest_ms if self.unit else self.waiting[0][0].timestamp_ms
        return max(0.0, time.time() - oldest_ms / 1000)
