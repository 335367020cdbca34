"""The role `fetch`: candidates -> images -> shards, partition by partition, for ever.

One lane for each partition that is ours (the consumer group shares them out among the fetchers; tenure.py says when to begin one and how
to end it): read ahead, fetch many at once, take the results in offset order, spool, seal (lane.py).  Memory is bounded by
`fetch.buffer_bytes` and the requests in flight, the spool by `fetch.spool_bytes`; nothing piles up behind a slow store, because a lane that
cannot seal does not read on.  What a lane waits for is said in the heartbeat and the metrics (waits.py).
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
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from ingest.connectors.book import watched
from ingest.denied import Denied
from ingest.fetch import tenure
from ingest.fetch.client import Client
from ingest.fetch.lane import Lane
from ingest.fetch.tenure import Place, Tenure
from ingest.fetch.waits import Waits
from ingest.pack import Packer, Unit, group_of
from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import Retryable, StoreFull
from streamlearn.contract.event_log import (
    CANDIDATES,
    CONNECTOR_CONFIGS,
    DEAD_LETTERS,
    HOSTS,
    SHARDS,
    TAKEDOWNS,
    EventLog,
    retry_topic,
)
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import REJECTED, Outcome
from streamlearn.contract.status import Heartbeat, now

WATCH_S = 0.25  # between looks at what is ours
LAG_S = 1.0  # between measurements of the lag
DENIED_S = 2.0  # between looks at what was taken down
AGAIN_S = 2.0  # before what could not be told is told again
TAKE_S = 0.05  # between looks at whether there is something to take over
T = TypeVar("T")
logger = logging.getLogger(__name__)


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
        self.telling = asyncio.Lock()  # whoever leaves waits for what is being told
        self.sealing = asyncio.Lock()  # one commit at a time: the table is one log
        self.outcomes: Counter[str] = Counter()
        self.shards = self.images = 0  # sealed by this process
        self.before: tuple[int, int] | None = None  # shards and images of others and of former runs, once the catalog has told
        self.last_shard_at = ""
        self.waits = Waits(metrics)
        self.recent: deque[tuple[float, int]] = deque(maxlen=64)  # (when, images so far)
        self.lanes: dict[Place, tuple[Lane, asyncio.Task[None]]] = {}
        self.lag = 0
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="log")  # reading may wait for a broker; a log serves one reader at a time

    async def run(self, stop: threading.Event) -> None:
        self.spool.mkdir(parents=True, exist_ok=True)  # it may be a disk of its own: emptied, never removed
        for left in self.spool.iterdir():
            if left.is_file():  # a crash leaves garbage only; lost+found is not ours
                left.unlink()
        topics = [CANDIDATES, *(retry_topic(i) for i in range(len(self.config.fetch.retry_delays_s)))]
        for topic in [*topics, DEAD_LETTERS, SHARDS, CONNECTOR_CONFIGS, TAKEDOWNS, HOSTS]:
            self.log.ensure_topic(topic, self.config.log.partitions)
        subscription = self.log.subscribe(group_of(self.log), topics)
        self.tenure = Tenure(self.log, subscription, topics, self.config.log.partitions)
        try:
            async with Client(self.config.fetch, lambda: watched(self.config, self.log), self.tenure) as client:
                client.denied = Denied(await self.read(self.log.table, TAKEDOWNS))  # before anything is asked for
                await self._work(client, stop)
            await self._tell(client)  # nothing is on its way any more
        finally:
            subscription.close()
            self.reader.shutdown(wait=False)

    async def _work(self, client: Client, stop: threading.Event) -> None:
        """Keep a lane for each partition we own.  A lane ends by itself only by a bug: let it be seen."""
        helpers = [asyncio.create_task(c) for c in (self._measure(), self._take_over(client), self._keep(client), self._heed(client))]
        try:
            while not stop.is_set():
                await self._leave(client)
                self._share_out(client)
                self.tell()
                tasks = [*helpers, *(task for _, task in self.lanes.values())]
                await asyncio.wait(tasks, timeout=WATCH_S, return_when=asyncio.FIRST_COMPLETED)
                for place, (_, task) in list(self.lanes.items()):
                    if task.done():
                        task.result()
                        del self.lanes[place]
                for helper in helpers:
                    if helper.done():
                        helper.result()
        finally:
            tasks = [*helpers, *(task for _, task in self.lanes.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave(self, client: Client) -> None:
        """A partition that was taken from us.  A unit that is being sealed goes on; the catalog fences it from the new owner."""
        if gone := self.tenure.end():
            for (_, number), (lane, _) in self.lanes.items():
                if number in gone:
                    lane.leave()
            await client.leave()
            await self._tell(client)
        self.tenure.let_go()

    async def _take_over(self, client: Client) -> None:
        while True:
            if new := self.tenure.begin():
                try:
                    self.tenure.finish(new, await self.read(self.tenure.read, new), client.hosts)
                except Retryable as e:
                    self.tenure.give_up(new)
                    await self.waits.out(HOSTS, "take over", e)
                else:
                    self.waits.over(HOSTS, "take over")
            await asyncio.sleep(TAKE_S)

    def _share_out(self, client: Client) -> None:
        for place in sorted(p for p in self.tenure.held - self.lanes.keys() if p[1] in self.tenure.taken):
            lane = Lane(self, client, *place)
            self.lanes[place] = (lane, asyncio.create_task(lane.run()))

    def room_for(self, lane: Lane) -> bool:
        """Whether a lane may ask for more.  One that has nothing in flight may always: images wait for those before them, never for others."""
        held = sum(other.held for other, _ in self.lanes.values())
        return self.spooled() < self.config.fetch.spool_bytes and (held < self.config.fetch.buffer_bytes or not lane.waiting)

    def crowded_by(self, lane: Lane) -> bool:
        """Whether the spool is full, and most by this lane."""
        return self.spooled() >= self.config.fetch.spool_bytes and all(lane.spooled >= other.spooled for other, _ in self.lanes.values())

    def spooled(self) -> int:
        """Bytes of open units."""
        return sum(lane.spooled for lane, _ in self.lanes.values())

    def check_room(self, num_bytes: int) -> None:
        """Raises StoreFull where so many bytes more would leave the spool's disk no room to close the open units: they end early instead."""
        needed = num_bytes + sum(lane.unit.closing_bytes for lane, _ in self.lanes.values() if lane.unit)
        free = shutil.disk_usage(self.spool).free
        if free < needed:
            raise StoreFull(
                f"{self.spool}: no space left for the next image: {free} bytes are free, {needed} needed; free some space, the work goes on "
                "by itself",
                after_s=2.0,
            )

    async def _measure(self) -> None:
        """What there was before us, and how far behind we are; asked of catalog and log, so not too often."""
        while True:
            with contextlib.suppress(Retryable):  # the lanes say so themselves
                if self.before is None:
                    await self._look_back()
            lanes = [lane for lane, _ in self.lanes.values()]
            with contextlib.suppress(Retryable):
                ends = [await self.read(self.log.bounds, lane.topic, lane.partition) for lane in lanes]
                self.lag = sum(max(0, end - lane.position) for lane, (_, end) in zip(lanes, ends, strict=True))
            await asyncio.sleep(LAG_S)

    async def _look_back(self) -> None:
        async with self.sealing:  # what we seal ourselves is either in both counts or in neither
            shards, images = await asyncio.to_thread(self.catalog.totals)
            self.before = shards - self.shards, images - self.images

    async def read(self, call: Callable[..., T], *arguments: object) -> T:
        """Ask the log in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self.reader, call, *arguments)

    async def _heed(self, client: Client) -> None:
        """What was taken down is not asked for any more, and what is on its way is not kept."""
        while True:
            await asyncio.sleep(DENIED_S)
            with contextlib.suppress(Retryable):  # the lanes say so themselves
                client.denied = Denied(await self.read(self.log.table, TAKEDOWNS))

    async def _keep(self, client: Client) -> None:
        """What hosts have asked for outlives this process."""
        while True:
            await client.hosts.changed.wait()
            await self._tell(client)
            if client.hosts.news:
                await asyncio.sleep(AGAIN_S)
                client.hosts.changed.set()

    async def _tell(self, client: Client) -> None:
        """To whoever asks those hosts next: all that was news until now has been told when this is back, or may be told again."""
        client.hosts.changed.clear()
        async with self.telling:
            names, told = frozenset(client.hosts.news), False
            client.hosts.news -= names
            try:
                await asyncio.to_thread(self.tenure.append, tenure.records(client.hosts, names))
                told = True
            except Retryable as e:
                logger.warning("what %d hosts have asked for is not told yet: %s", len(names), e)
            finally:
                if not told:
                    client.hosts.news |= names

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
        self._tell_freshness(unit)
        self.metrics.sealed_at.set_to_current_time()
        self.heart.history(stored=self.images, shards=self.shards, outcomes=dict(self.outcomes))

    def _tell_freshness(self, unit: Unit) -> None:
        at = time.time()
        for discovered in unit.discovered:
            with contextlib.suppress(ValueError):  # another producer's candidate may say anything
                self.metrics.fresh.observe(max(0.0, at - datetime.fromisoformat(discovered).timestamp()))

    def tell(self) -> None:
        self.metrics.heartbeat.set_to_current_time()
        lanes = [lane for lane, _ in self.lanes.values()]
        oldest = max((lane.oldest_age() for lane in lanes), default=0.0)
        spooled, waits = self.spooled(), self.waits.told()
        shards, images = self.before or (0, 0)
        self.metrics.lag.set(self.lag)
        self.metrics.oldest.set(oldest)
        self.metrics.spool.set(spooled)
        self.metrics.in_flight.set(sum(len(lane.waiting) for lane in lanes))
        self.metrics.partitions.set(len(lanes))
        self.heart.beat(
            state="waiting" if waits["waiting"] else "fetching",
            stored=images + self.images,
            outcomes=dict(self.outcomes),
            images_per_s=self.rate(),
            lag=self.lag,
            partitions=len(lanes),
            shards=shards + self.shards,
            spool_bytes=spooled,
            last_shard_at=self.last_shard_at,
            **waits,
        )

    def rate(self) -> float:
        """Images a second over the last sealed shards; 0 once nothing has been sealed for half a minute."""
        if len(self.recent) < 2 or time.monotonic() - self.recent[-1][0] > 30:
            return 0.0
        (t0, n0), (t1, n1) = self.recent[0], self.recent[-1]
        return round((n1 - n0) / max(t1 - t0, 1e-9), 1)
