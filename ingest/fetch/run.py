"""The role `fetch`: candidates -> images -> shards, partition by partition, for ever.

One lane a partition: read ahead, fetch many at once, take the results in offset order, spool, seal.  Memory is bounded by the read-ahead
window (`fetch.concurrency` requests over all lanes) times the byte cap; nothing piles up behind a slow store, because a lane that cannot
seal does not read on.
"""

import asyncio
import contextlib
import json
import logging
import shutil
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from ingest.fetch.client import Client, Fetched
from ingest.pack import Packer, Taken, Unit, origins
from streamlearn.contract import durable
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import Corrupt, Fenced, Retryable, StoreFull
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, SHARDS, EventLog, Record, retry_topic
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import REJECTED, Outcome
from streamlearn.contract.status import Heartbeat, now

IDLE_S = 0.2  # between looks at a partition that has nothing new
KEEP_S = 5.0  # between writings of what hosts asked for: a kill forgets no more than that
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
        self.spool, self.hosts_file = home / "spool", home / "hosts.json"
        self.sealing = asyncio.Lock()  # one commit at a time: the table is one log
        self.room = asyncio.Semaphore(config.fetch.concurrency)
        self.outcomes: Counter[str] = Counter()
        self.shards = self.images = 0  # sealed by this process
        self.before = (0, 0)  # shards and images that were there when it started
        self.last_shard_at, self.full = "", ""
        self.recent: deque[tuple[float, int]] = deque(maxlen=64)  # (when, images so far)
        self.lanes: list[Lane] = []

    async def run(self, stop: threading.Event) -> None:
        shutil.rmtree(self.spool, ignore_errors=True)  # a crash leaves garbage only
        self.spool.mkdir(parents=True)
        topics = [CANDIDATES, *(retry_topic(i) for i in range(len(self.config.fetch.retry_delays_s)))]
        for topic in [*topics, DEAD_LETTERS, SHARDS]:
            self.log.ensure_topic(topic, self.config.log.partitions)
        folders = tuple(Path(c.path) for c in self.config.connectors if c.kind == "folder")
        rows = self.catalog.rows()
        self.before = (len(rows), sum(row.num_samples for row in rows))
        async with Client(self.config.fetch, folders) as client:
            client.hosts.restore(_json(self.hosts_file))
            self.lanes = [Lane(self, client, topic, p) for topic in topics for p in range(self.config.log.partitions)]
            tasks = [asyncio.create_task(lane.run()) for lane in self.lanes]
            helpers = [asyncio.create_task(self._watch(stop)), asyncio.create_task(self._keep(client))]
            done, _ = await asyncio.wait([*tasks, *helpers], return_when=asyncio.FIRST_COMPLETED)
            for task in [*tasks, *helpers]:
                task.cancel()
            await asyncio.gather(*tasks, *helpers, return_exceptions=True)
            self._write(client.hosts.export())
            for task in done:
                task.result()  # a lane ends only by a bug: let it be seen

    async def _watch(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.tell()
            await asyncio.sleep(0.25)

    async def _keep(self, client: Client) -> None:
        """What hosts asked for outlives this process."""
        written: object = None
        while True:
            await asyncio.sleep(KEEP_S)
            state = client.hosts.export()
            if state["hosts"] or written:  # nothing again is not worth a sync
                await asyncio.to_thread(self._write, state)
            written = state["hosts"]

    def _write(self, state: dict[str, Any]) -> None:
        try:
            durable.write(self.hosts_file, json.dumps(state).encode())
        except StoreFull as e:  # the lanes wait it out; until then this is as old as it is
            logger.warning("%s", e)

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
        lag, oldest = 0, 0.0
        for lane in self.lanes:
            lag += max(0, self.log.bounds(lane.topic, lane.partition)[1] - lane.position)
            oldest = max(oldest, lane.oldest_age())
        spooled = sum(lane.unit.writer.size for lane in self.lanes if lane.unit)
        self.metrics.lag.set(lag)
        self.metrics.oldest.set(oldest)
        self.metrics.spool.set(spooled)
        self.heart.beat(
            state="full" if self.full else "fetching",
            stored=self.before[1] + self.images,
            outcomes=dict(self.outcomes),
            images_per_s=self.rate(),
            lag=lag,
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


def _json(path: Path) -> object:
    """What a file holds, None if it holds no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None


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

    async def run(self) -> None:
        await self._restart()
        while True:
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
        self._read_ahead()
        while self.waiting and self.waiting[0][1].done():
            record, task = self.waiting.popleft()
            self._take(record, task.result())
            if self.unit and self.unit.full(self.fetcher.config.shard, time.monotonic()):
                await self._seal()
        if self.unit and self.unit.full(self.fetcher.config.shard, time.monotonic()):
            await self._seal()
        self._read_ahead()
        if self.waiting:
            await asyncio.wait([self.waiting[0][1]], timeout=IDLE_S)
        else:
            await asyncio.sleep(IDLE_S)

    def _read_ahead(self) -> None:
        room = self.window - len(self.waiting)
        if room <= 0:
            return
        for record in self.fetcher.log.read(self.topic, self.partition, self.next, room):
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

    def _take(self, record: Record, taken: Taken) -> None:
        if self.unit is None:
            spool = self.fetcher.spool / f"{self.topic}-{self.partition}-{taken.offset:020d}.tar"
            self.unit = Unit(self.topic, self.partition, taken.offset, spool, time.monotonic())
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
        for _, task in self.waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in self.waiting), return_exceptions=True)
        self.waiting.clear()
        if self.unit is not None:
            with contextlib.suppress(FileNotFoundError):
                self.unit.drop()
            self.unit = None
        while True:
            try:
                async with self.fetcher.sealing:
                    self.position = self.next = await asyncio.to_thread(self.fetcher.packer.recover, self.topic, self.partition)
                break
            except Retryable as e:
                await self._wait_out(e)
        self.seen = origins(self.fetcher.log, self.topic, self.partition, self.position) if self.topic != CANDIDATES else set()

    def oldest_age(self) -> float:
        """Seconds since the oldest record was appended that the catalog does not cover; a parked retry is not late."""
        if self.waiting:
            return max(0.0, time.time() - self.waiting[0][0].timestamp_ms / 1000)
        return time.monotonic() - self.unit.opened_at if self.unit else 0.0
