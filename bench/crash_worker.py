"""A fetch role under the knife, in a process of its own: the real role on the real seams, which die by `os._exit` at a chosen step."""

import logging
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry

from bench.crash_world import PARTITIONS, RETRIES, environment
from ingest.fetch.run import run_fetch
from streamlearn.adapters.kafka_log import KafkaLog
from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract.catalog import Advance, DeltaCatalog, ShardRow
from streamlearn.contract.config import Config, FetchConfig, KafkaConfig, LogConfig, ShardConfig, StoreConfig
from streamlearn.contract.errors import Fenced
from streamlearn.contract.event_log import SHARDS, AllOfThem, EventLog, NewRecord, SqliteLog, Subscription
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import FolderStore, ObjectStore
from streamlearn.contract.shards import ShardWriter
from streamlearn.contract.status import Heartbeat

CATALOG = "catalog/shards"
STEPS = ("spool write", "put tar", "put sidecar", "catalog", "retries", "group offset", "hint")
WHEN = ("before", "half way", "after")
DIED = 77  # exit code of a death that was planned
T = TypeVar("T")


@dataclass(frozen=True)
class Orders:
    """What a worker is told."""

    seed: int
    home: Path  # its own
    shared: Path  # where the embedded log, store and catalog lie
    kafka: KafkaConfig | None
    store: StoreConfig | None
    zombie: bool  # owns everything, whatever the group says
    mortal: bool
    events: Path  # a line for what the parent counts; appended to by all workers


class Knife:
    """Counts what happens at the seams; ends the process at the n-th of a kind: before, half way through, or after it."""

    def __init__(self, orders: Orders):
        self.rng = random.Random(orders.seed)
        self.step, self.when, self.left = self.rng.choice(STEPS), self.rng.choice(WHEN), self.rng.choice((1, 1, 2, 3, 4))
        if self.step == "spool write":
            self.left = self.rng.randint(1, 200)
        if not orders.mortal:
            self.step = ""
        self._events = os.open(orders.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._lock = threading.Lock()

    def note(self, line: str) -> None:
        os.write(self._events, f"{line}\n".encode())

    def die(self) -> None:
        self.note(f"crash {self.step}, {self.when}")
        os._exit(DIED)

    def around(self, step: str, call: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        with self._lock:
            self.left -= step == self.step
            now = step == self.step and self.left == 0
        if not now:
            return call()
        if self.when == "before":
            self.die()
        if self.when == "half way":
            if half is not None:
                half()
                self.die()
            timer = threading.Timer(self.rng.uniform(0, 0.1), self.die)  # somewhere within; a call that is over by then waits for it
            timer.start()
            call()
            timer.join()
        found = call()
        self.die()
        return found


def step_of(records: Sequence[NewRecord]) -> str:
    return "hint" if {r.topic for r in records} == {SHARDS} else "retries"


class KnifedKafka(KafkaLog):
    knife: Knife
    zombie = False

    def append(self, records: Sequence[NewRecord]) -> list[tuple[int, int]]:
        append = super().append
        return self.knife.around(step_of(records), lambda: append(records), lambda: append(records[: len(records) // 2]))

    def commit(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        commit = super().commit
        self.knife.around("group offset", lambda: commit(group, offsets))

    def subscribe(self, group: str, topics: Sequence[str]) -> Subscription:
        if self.zombie:
            return AllOfThem(frozenset((topic, p) for topic in topics for p in range(self.partitions(topic))))
        return super().subscribe(group, topics)


class KnifedSqlite(SqliteLog):
    knife: Knife

    def append(self, records: Sequence[NewRecord]) -> list[tuple[int, int]]:
        append = super().append
        return self.knife.around(step_of(records), lambda: append(records))

    def commit(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        commit = super().commit
        self.knife.around("group offset", lambda: commit(group, offsets))


def _put_step(key: str) -> str:
    return "put sidecar" if key.endswith(".parquet") else "put tar"


class KnifedS3(S3Store):
    knife: Knife

    def put_file(self, key: str, path: Path) -> None:
        put = super().put_file
        self.knife.around(_put_step(key), lambda: put(key, path))


class KnifedFolder(FolderStore):
    knife: Knife

    def put_file(self, key: str, path: Path) -> None:
        put = super().put_file
        self.knife.around(_put_step(key), lambda: put(key, path))


class KnifedCatalog(DeltaCatalog):
    knife: Knife

    def commit(self, rows: Sequence[ShardRow], advances: Sequence[Advance]) -> int:
        commit = super().commit
        try:
            return self.knife.around("catalog", lambda: commit(rows, advances))
        except Fenced:
            self.knife.note("fenced")
            raise


def knife_the_spool(knife: Knife) -> None:
    """The spool is no seam: its one write is wrapped where it stands."""
    write = ShardWriter._write

    def knifed(self: ShardWriter, data: bytes) -> None:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        knife.around("spool write", lambda: write(self, data), half)

    ShardWriter._write = knifed  # type: ignore[method-assign]


def seams(orders: Orders, knife: Knife) -> tuple[EventLog, ObjectStore, DeltaCatalog]:
    log: KnifedKafka | KnifedSqlite
    store: KnifedS3 | KnifedFolder
    if orders.kafka:
        log = KnifedKafka(orders.kafka)
        log.zombie = orders.zombie
    else:
        log = KnifedSqlite(orders.shared / "log.sqlite")
    if orders.store:
        store = KnifedS3(orders.store)
        catalog = KnifedCatalog(store.uri(CATALOG), log_id=log.log_id, storage_options=delta_options(orders.store))
    else:
        store = KnifedFolder(orders.shared / "store")
        catalog = KnifedCatalog(str(orders.shared / "store" / CATALOG), log_id=log.log_id)
    log.knife = store.knife = catalog.knife = knife
    knife_the_spool(knife)
    return log, store, catalog


def config_of(orders: Orders, rng: random.Random) -> Config:
    """Units of another size at every start."""
    return Config(
        fetch=FetchConfig(
            allow_networks=("127.0.0.0/8",),
            total_timeout_s=20.0,
            attempts=1,
            retry_delays_s=RETRIES,
            host_rate=0,
            breaker_failures=0,
            robots_retry_s=0.5,
            concurrency=16,
        ),
        shard=ShardConfig(max_samples=round(10 ** rng.uniform(0.7, 2.8)), max_age_s=rng.uniform(0.4, 1.5)),
        log=LogConfig(partitions=PARTITIONS),
    )


def work(orders: Orders) -> None:
    """Be the role, until death, SIGTERM, or an error of our own."""
    environment()  # a fork server that is older than the benchmark has another
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to hear
    orders.home.mkdir(parents=True, exist_ok=True)
    said = os.open(orders.home / "said.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format=f"{os.getpid()} %(relativeCreated)d %(name)s %(message)s", force=True
    )
    knife = Knife(orders)
    try:
        log, store, catalog = seams(orders, knife)
        heart = Heartbeat(orders.home, "fetch")
        run_fetch(config_of(orders, knife.rng), log, store, catalog, FetchMetrics(CollectorRegistry()), heart, stop=stop, home=orders.home)
        code = 0
    except BaseException as e:  # the process ends with its traceback, and is counted under its name
        knife.note(f"ended {type(e).__name__}")
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)
