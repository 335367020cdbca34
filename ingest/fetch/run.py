"""The role `fetch`: candidates -> images -> shards, partition by partition, for ever.

One lane for each partition that is ours (the consumer group shares them out among the fetchers): read ahead, fetch many at once, take the
results in offset order, spool, seal.  Memory is bounded by the read-ahead window (`fetch.concurrency` requests over all lanes) times the
byte cap; nothing piles up behind a slow store, because a lane that cannot seal does not read on.
"""

import asyncio
import contextlib
import logging
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ingest.fetch.client import Client, Fetched
from ingest.pack import Packer, Taken, Unit, group_of, origins
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import Corrupt, Fenced, OffsetGap, Retryable
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, SHARDS, EventLog, Record, Subscription, retry_topic
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import REJECTED, Outcome
from streamlearn.contract.status import Heartbeat, now

IDLE_S = 0.2  # between looks at a partition that has nothing new
WATCH_S = 0.25  # between looks at what is ours
LAG_S = 1.0  # between measurements of the lag
MOST_SKIPPED = 100_000  # offsets without a record between two that have one; more is an incident
T = TypeVar("T")
logger = logging.getLogger(__name__)
Place = tuple[str, int]


def run_fetch(
    config: Config,
    log: EventLog,
    store: ObjectStore,
    catalog: Catalog,
    metrics: FetchMetrics,
    heartbeat: Heartbeat,
    *,
    stop: threading.Event,
    home: Path,
) -> None:
    """Fetch until `stop`.  Units that are open then are dropped: their offsets are fetched again."""
    asyncio.run(Fetcher(config, log, store, catalog, metrics, heartbeat, home=home).run(stop))


class Fetcher:
    """What the lanes share."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        store: ObjectStore,
        catalog: Catalog,
        metrics: FetchMetrics,
        heartbeat: Heartbeat,
        *,
        home: Path,
    ):
        self.config, self.log, self.store, self.catalog, self.metrics, self.heart = config, log, store, catalog, metrics, heartbeat
        self.packer = Packer(log, store, catalog, retry_delays_s=config.fetch.retry_delays_s)
        self.spool = home / "spool"
        self.sealing = asyncio.Lock()  # one commit at a time: the table is one log
        self.room = asyncio.Semaphore(config.fetch.concurrency)
        self.outcomes: Counter[str] = Counter()
        self.shards = self.images = 0  # sealed by this process
        self.before = (0, 0)  # shards and images that were there when it started
        self.last_shard_at, self.full = "", ""
        self.recent: deque[tuple[float, int]] = deque(maxlen=64)  # (when, images so far)
        self.lanes: dict[Place, tuple[Lane, asyncio.Task[None]]] = {}
        self.lag = 0
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="log")  # reading may wait for a broker; a log serves one reader at a time

    async def run(self, stop: threading.Event) -> None:
        shutil.rmtree(self.spool, ignore_errors=True)  # a crash leaves garbage only
        self.spool.mkdir(parents=True)
        topics = [CANDIDATES, *(retry_topic(i) for i in range(len(self.config.fetch.retry_delays_s)))]
        for topic in [*topics, DEAD_LETTERS, SHARDS]:
            self.log.ensure_topic(topic, self.config.log.partitions)
        folders = tuple(Path(c.path) for c in self.config.connectors if c.kind == "folder")
        rows = self.catalog.rows()
        self.before = (len(rows), sum(row.num_samples for row in rows))
        subscription = self.log.subscribe(group_of(self.log), topics)
        try:
            async with Client(self.config.fetch, folders) as client:
                await self._work(client, subscription, stop)
        finally:
            subscription.close()
            self.reader.shutdown(wait=False)

    async def _work(self, client: Client, subscription: Subscription, stop: threading.Event) -> None:
        """Keep a lane for each partition we own.  A lane ends by itself only by a bug: let it be seen."""
        measuring = asyncio.create_task(self._measure())
        try:
            while not stop.is_set():
                self._share_out(client, subscription.owned())
                self.tell()
                await asyncio.wait(
                    [measuring, *(task for _, task in self.lanes.values())], timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED
                )
                for place, (lane, task) in list(self.lanes.items()):
                    if task.done():
                        task.result()
                        assert lane.leaving
                        del self.lanes[place]
                if measuring.done():
                    measuring.result()
        finally:
            tasks = [measuring, *(task for _, task in self.lanes.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _share_out(self, client: Client, owned: frozenset[Place]) -> None:
        """A partition that was taken from us is left once its lane has finished what it is at; the catalog fences it from the new owner."""
        for place, (lane, _) in self.lanes.items():
            lane.leaving = place not in owned
        for place in sorted(owned - self.lanes.keys()):
            lane = Lane(self, client, *place)
            self.lanes[place] = (lane, asyncio.create_task(lane.run()))

    async def _measure(self) -> None:
        """How far behind we are; asked of the log, so not too often."""
        while True:
            lanes = [lane for lane, _ in self.lanes.values()]
            with contextlib.suppress(Retryable):  # the lanes say so themselves
                ends = [await self.read(self.log.bounds, lane.topic, lane.partition) for lane in lanes]
                self.lag = sum(max(0, end - lane.position) for lane, (_, end) in zip(lanes, ends, strict=True))
            await asyncio.sleep(LAG_S)

    async def read(self, call: Callable[..., T], *arguments: object) -> T:
        """Ask the log in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, call, *arguments)

    def count(self, outcome: Outcome) -> None:
        self.metrics.outcomes.labels(outcome.outcome).inc()
        if outcome.outcome == REJECTED:
            self.metrics.rejected.labels(outcome.reason).inc()

    def sealed(self, unit: Unit, samples: int) -> None:
        """After the commit point: only now is anything counted as done."""
        for outcome in unit.outcomes:
            self.count(outcome)
            self.outcomes[f"{REJECTED}:{outcome.reason}" if outcome.outcome == REJECTED else outcome.outcome] += 1
        self.shards += 1
        self.images += samples
        self.last_shard_at = now()
        self.recent.append((time.monotonic(), self.images))
        self.metrics.shards.inc()
        self.metrics.sealed_at.set_to_current_time()
        self.heart.history(stored=self.images, shards=self.shards, outcomes=dict(self.outcomes))

    def tell(self) -> None:
        self.metrics.heartbeat.set_to_current_time()
        lanes = [lane for lane, _ in self.lanes.values()]
        oldest = max((lane.oldest_age() for lane in lanes), default=0.0)
        spooled = sum(lane.unit.writer.size for lane in lanes if lane.unit)
        self.metrics.lag.set(self.lag)
        self.metrics.oldest.set(oldest)
        self.metrics.spool.set(spooled)
        self.heart.beat(
            state="full" if self.full else "fetching",
            stored=self.before[1] + self.images,
            outcomes=dict(self.outcomes),
            images_per_s=self.rate(),
            lag=self.lag,
            partitions=len(lanes),
            shards=self.before[0] + self.shards,
            spool_bytes=spooled,
            last_shard_at=self.last_shard_at,
            full=self.full,
        )

    def rate(self) -> float:
        """Images a second over the last sealed shards; 0 once nothing has been sealed for half a minute."""
        if len(self.recent) < 2 or time.monotonic() - self.recent[-1][0] > 30:
            return 0.0
        (t0, n0), (t1, n1) = self.recent[0], self.recent[-1]
        return round((n1 - n0) / max(t1 - t0, 1e-9), 1)


class Lane:
    """One partition of one topic."""

    def __init__(self, fetcher: Fetcher, client: Client, topic: str, partition: int):
        self.fetcher, self.client, self.topic, self.partition = fetcher, client, topic, partition
        self.position = self.next = 0  # sealed up to here; next offset to read
        self.unit: Unit | None = None
        self.waiting: deque[tuple[Record, asyncio.Task[Taken]]] = deque()  # in offset order
        self.seen: set[str] = set()  # origins met in this partition (retry topics)
        self.parked: Record | None = None  # a retry that is not due yet
        self.window = max(2, fetcher.config.fetch.concurrency)
        self.leaving = False  # the partition is another's now

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
            if self.unit and self.unit.full(self.fetcher.config.shard, time.monotonic()):
                await self._seal()
        if self.unit and self.unit.full(self.fetcher.config.shard, time.monotonic()):
            await self._seal()
        await self._read_ahead()
        if self.waiting:
            await asyncio.wait([self.waiting[0][1]], timeout=IDLE_S)
        else:
            await asyncio.sleep(IDLE_S)

    async def _read_ahead(self) -> None:
        room = self.window - len(self.waiting)
        if room <= 0:
            return
        for record in await self.fetcher.read(self.fetcher.log.read, self.topic, self.partition, self.next, room):
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
        async with self.fetcher.room:
            began = time.perf_counter()
            result = await self.client.fetch(candidate)
        self.fetcher.metrics.seconds.observe(time.perf_counter() - began)
        if isinstance(result, Fetched):
            self.fetcher.metrics.bytes.inc(len(result.body))
        return Taken(offset, candidate, result)

    def _take(self, taken: Taken) -> None:
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

    def _drop(self) -> list[asyncio.Task[Taken]]:
        """Let go of everything that is not sealed; the requests that were on their way."""
        tasks = [task for _, task in self.waiting]
        for task in tasks:
            task.cancel()
        self.waiting.clear()
        if self.unit is not None:
            with contextlib.suppress(FileNotFoundError):
                self.unit.drop()
            self.unit = None
        return tasks

    def oldest_age(self) -> float:
        """Seconds since the oldest record was appended that the catalog does not cover; a parked retry is not late."""
        if self.waiting:
            return max(0.0, time.time() - self.waiting[0][0].timestamp_ms / 1000)
        return time.monotonic() - self.unit.opened_at if self.unit else 0.0
