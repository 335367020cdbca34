"""The role `refresh`: what the calendar asks of the dataset, so that nobody has to remember it.  Every `dataset.upkeep_s`:

  1. takedown  what is denied and not removed yet
  2. expire    what is older than the window; purge: what ended before the grace time
  3. cut       the quarter that ended last, where there is no generation of its name and something was stored before its end
  4. refresh   that generation, from where it was stopped

Each has a commit point of its own and may be killed anywhere (their modules tell); the role remembers nothing, so there is nothing to lose.
"""

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ingest import expire as ending
from ingest import refresh as generations
from ingest import takedown as taking
from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import NotFound, Retryable
from streamlearn.contract.event_log import TAKEDOWNS, EventLog
from streamlearn.contract.metrics import RefreshMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.status import Heartbeat

PERIOD_S = 0.5  # between heartbeats
AGAIN_S = 30.0  # after a store or broker could not be reached
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The role was told to stop while it waited for its turn."""


def run_refresh(
    config: Config,
    log: EventLog,
    store: ObjectStore,
    catalog: Catalog,
    metrics: RefreshMetrics,
    heartbeat: Heartbeat,
    *,
    stop: threading.Event,
    home: Path,
) -> None:
    """Until `stop`.  The work is in a thread: rewriting shards takes minutes, and silence would be taken for a hang."""
    keeper = Keeper(config, log, store, catalog, metrics, home=home, stop=stop)
    pool, job, due = ThreadPoolExecutor(1, thread_name_prefix="keeper"), None, 0.0
    try:
        while not stop.is_set():
            if job is None and time.monotonic() >= due:
                job = pool.submit(keeper.once, datetime.now(UTC))
            if job is not None and job.done():
                due = time.monotonic() + _ended(job, config.dataset.upkeep_s, metrics, heartbeat)
                job = None
            metrics.heartbeat.set_to_current_time()
            heartbeat.beat(doing=keeper.doing)
            stop.wait(PERIOD_S)
    finally:
        pool.shutdown(wait=True)  # the step under way: it is told by `stop` where it waits


def _ended(job: Future[None], upkeep_s: float, metrics: RefreshMetrics, heartbeat: Heartbeat) -> float:
    """Seconds until the next round."""
    try:
        job.result()
    except Stopped:
        return 0.0
    except Retryable as e:
        logger.warning("%s; again in %g s", e, AGAIN_S)
        metrics.rounds.labels("waiting").inc()
        heartbeat.beat(state="waiting", waiting=str(e), force=True)
        return AGAIN_S
    metrics.rounds.labels("done").inc()
    metrics.done_at.set_to_current_time()
    heartbeat.beat(state="keeping", waiting="", force=True)
    return upkeep_s


class Keeper:
    def __init__(
        self,
        config: Config,
        log: EventLog,
        store: ObjectStore,
        catalog: Catalog,
        metrics: RefreshMetrics,
        *,
        home: Path,
        stop: threading.Event,
    ):
        self.config, self.log, self.store, self.catalog, self.metrics = config, log, store, catalog, metrics
        self.rewriting, self.stop, self.doing = home / "rewriting", stop, ""

    def once(self, at: datetime) -> None:
        """One round.  Raises Retryable; what was done by then stays done."""
        self.doing = "takedown"
        self.log.ensure_topic(TAKEDOWNS, self.config.log.partitions)
        taken = taking.takedown(self.log, self.store, self.catalog, folder=self.rewriting, reason="", by="refresh")
        self.metrics.taken.inc(taken.samples)
        self.doing = "expire"
        ended = ending.expire(self.catalog, window=timedelta(days=self.config.dataset.window_days), at=at)
        self.metrics.expired.inc(ended.shards)
        self.doing = "purge"
        gone = ending.purge(self.store, self.catalog, grace=timedelta(days=self.config.dataset.grace_days), at=at)
        self.metrics.purged.inc(gone.bytes)
        self._quarter(at)
        self.doing = ""

    def _quarter(self, at: datetime) -> None:
        name, end = last_quarter(at)
        self.doing = f"cut {name}"
        try:
            self.store.get(generations.generation_key(name))
        except NotFound:
            if not any((row.first_fetched_at or row.day) < end for row in self.catalog.rows()):
                return  # nothing is older than the quarter's end: the dataset began after it
            made = generations.cut(self.store, self.catalog, name=name)
            logger.info("cut %s: %d shards, %d samples", name, made.shards, made.samples)
        self.doing = f"refresh {name}"
        done = generations.refresh(self.log, self.store, self.catalog, name=name, rate=self.config.dataset.refresh_rate, sleep=self._sleep)
        self.metrics.requeued.inc(done.candidates)

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped


def last_quarter(at: datetime) -> tuple[str, str]:
    """The quarter that ended last before `at`, and the day after it: ("2026Q3", "2026-10-01")."""
    first = datetime(at.year, 3 * ((at.month - 1) // 3) + 1, 1, tzinfo=UTC)
    before = first - timedelta(days=1)
    return f"{before.year}Q{(before.month + 2) // 3}", first.date().isoformat()
