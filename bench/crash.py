"""Crash the ingest half, hundreds of times in one run; then audit every offset.

    python -m bench.crash --offsets 20000 --crashes 500 --log kafka --store s3

Three fetch roles, real processes on the real seams.  On Kafka two of them share the partitions out, and the third is a zombie for life: it
owns everything always.  Each dies at a step of the sealing protocol chosen at random (before, half way through, after), or by SIGKILL at any
time, and is started anew with units of another size.  Meanwhile the brokers (librdkafka's mock cluster) drop connections, move leaders and
go down, the object store (an S3 in memory behind a proxy) refuses, resets, delays and truncates, and the web server fails as the web does.

Candidates are fed as the deaths go on, so that there is work whenever one is due.  It ends once everything has settled, or at its limit,
which is a failure.  Exit code 1 if anything is missing, doubled or corrupt.
"""

import argparse
import contextlib
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
from confluent_kafka import Producer

from bench import crash_worker, crash_world
from bench.crash_audit import Audit, Books, audit, settled
from bench.crash_world import ADDRESSES, OTHERS, PARTITIONS, S3, TOPICS, Brokers, Context, spools
from streamlearn.adapters.kafka_log import KafkaLog
from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import ConfigError, Retryable, Stuck
from streamlearn.contract.event_log import CANDIDATES, EventLog, NewRecord, SqliteLog
from streamlearn.contract.object_store import FolderStore, ObjectStore

GROUPED = 2  # workers that share the partitions out; the others are zombies
LOOK_S = 3.0  # between looks at whether all has settled
BATCH = 50  # candidates of one append
T = TypeVar("T")


@dataclass
class World:
    home: Path
    base: str  # of the images' addresses
    brokers: Brokers | None
    s3: S3 | None
    context: Context

    def log(self) -> EventLog:
        return KafkaLog(self.brokers.config()) if self.brokers else SqliteLog(self.home / "log.sqlite")

    def store(self) -> ObjectStore:
        return S3Store(self.s3.direct) if self.s3 else FolderStore(self.home / "store")

    def catalog(self, log_id: str) -> DeltaCatalog:
        if self.s3:
            uri = S3Store(self.s3.direct).uri(crash_worker.CATALOG)
            return DeltaCatalog(uri, log_id=log_id, storage_options=delta_options(self.s3.direct))
        return DeltaCatalog(str(self.home / "store" / crash_worker.CATALOG), log_id=log_id)


@dataclass
class Fleet:
    """The workers: started, killed, started anew."""

    world: World
    crashes: int
    size: int
    rng: random.Random
    starts: int = 0
    kills: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    peak_mib: float = 0.0
    workers: dict[int, tuple[multiprocessing.process.BaseProcess, float]] = field(default_factory=dict)  # slot -> (it, when it is killed)

    @property
    def deaths(self) -> int:
        return self.exits[crash_worker.DIED] + self.exits[-signal.SIGKILL]

    def tend(self) -> None:
        """Kill whose time has come, count who has ended, start who is missing."""
        for slot, (process, until) in list(self.workers.items()):
            if process.exitcode is None and time.monotonic() > until:
                process.kill()
                process.join()
                self.kills += 1
            if process.exitcode is None:
                self._weigh(process)
                continue
            self.exits[process.exitcode] += 1
            del self.workers[slot]
        for slot in range(self.size):
            if slot not in self.workers:
                self._start(slot)

    def stop(self) -> None:
        """In good order; whoever takes too long is killed."""
        for process, _ in self.workers.values():
            process.terminate()
        for process, _ in self.workers.values():
            process.join(30)
            if process.exitcode is None:
                process.kill()
                process.join()
        self.workers.clear()

    def _start(self, slot: int) -> None:
        world, mortal = self.world, self.deaths < self.crashes
        orders = crash_worker.Orders(
            seed=self.rng.randrange(2**31),
            home=world.home / f"worker{slot}",
            shared=world.home,
            kafka=world.brokers.config() if world.brokers else None,
            store=world.s3.faulty if world.s3 else None,
            zombie=slot >= GROUPED,
            mortal=mortal,
            events=world.home / "events.txt",
        )
        process = world.context.Process(target=crash_worker.work, args=(orders,), daemon=True)
        process.start()
        # a fifth at any time, the others if their step has not come by then
        lives_s = self.rng.uniform(0.2, 5) if self.rng.random() < 0.2 else self.rng.uniform(6, 12)
        if slot >= GROUPED:  # its group offsets are refused: at each start it has more sidecars to read before it may begin
            lives_s *= 2
        self.workers[slot] = process, time.monotonic() + (lives_s if mortal else float("inf"))
        self.starts += 1

    def _weigh(self, process: multiprocessing.process.BaseProcess) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.peak_mib = max(self.peak_mib, psutil.Process(process.pid).memory_info().rss / 2**20)


@dataclass
class Feeder:
    """Writes the candidates, and now and then a record that is none.  What it writes twice is two candidates: the audit goes by the log."""

    world: World
    done: int = 0

    def __post_init__(self) -> None:
        # librdkafka's own client: kafka-python's producer has been seen to hang for good, and this process cannot be started anew for it
        servers = ",".join(self.world.brokers.config().servers) if self.world.brokers else ""
        self._producer = Producer({"bootstrap.servers": servers, "log_level": 0}) if servers else None
        self._log = None if servers else self.world.log()

    def feed(self, until: int) -> None:
        while self.done < until:
            some = range(self.done, min(self.done + BATCH, until))
            records = [(n % PARTITIONS, self._candidate(n)) for n in some]
            if some.start % 1000 == 0:
                records.append((0, b"no candidate"))
            if self._producer and self.world.brokers:
                for partition, value in records:
                    self._producer.produce(self.world.brokers.prefix + CANDIDATES, value, partition=partition)
                if self._producer.flush(30):
                    raise AssertionError("the mock cluster takes no candidates")
            elif self._log:
                self._log.append([NewRecord(CANDIDATES, b"", value, partition) for partition, value in records])
            self.done = some.stop

    def _candidate(self, n: int) -> bytes:
        base = self.world.base.replace(ADDRESSES[0], ADDRESSES[n % PARTITIONS])
        return Candidate(url=f"{base}/{n}.jpg", source="crash", source_ref=str(n), discovered_at="2026-11-21T00:00:00Z").to_json()


@dataclass
class Watch:
    """Looks from time to time, over a connection that is made anew where it has failed: the brokers are being troubled."""

    world: World
    log: EventLog | None = None
    books: Books | None = None

    def look(self, fleet: Fleet, fed: int, seconds: float) -> None:
        self._ask(lambda log, books: self._tell(books, fleet, fed, seconds), None)

    def settled(self) -> bool:
        return self._ask(settled, False)

    def _ask(self, what: Callable[[EventLog, Books], T], otherwise: T) -> T:
        try:
            if self.log is None:
                self.log = self.world.log()
            if self.books is None:
                self.books = Books(self.world.store(), self.world.catalog(self.log.log_id))
            return what(self.log, self.books)
        except (Retryable, Stuck, ConfigError) as e:
            print(f"looking again: {e}", file=sys.stderr)
            if isinstance(e, Stuck):
                self.log = None
            return otherwise

    def _tell(self, books: Books, fleet: Fleet, fed: int, seconds: float) -> None:
        covered = sum(books.catalog.position(t, p) for t in TOPICS for p in range(PARTITIONS))
        line = f"{seconds:6.0f} s  deaths {fleet.deaths}, starts {fleet.starts}, fed {fed}, offsets covered {covered}, {fleet.peak_mib:.0f} MiB"
        print(line, file=sys.stderr, flush=True)


def drive(world: World, fleet: Fleet, offsets: int, limit_s: float) -> bool:
    """Feed, tend and trouble until all has settled; whether it has."""
    if world.brokers is None:
        for topic in (*TOPICS, *OTHERS):
            world.log().ensure_topic(topic, PARTITIONS)
    feeder, watch, began, looked = Feeder(world), Watch(world), time.monotonic(), 0.0
    while time.monotonic() - began < limit_s:
        share = fleet.deaths / fleet.crashes if fleet.crashes else 1.0
        feeder.feed(min(offsets, round(offsets * share) + max(BATCH, offsets // 50)))
        fleet.tend()
        time.sleep(0.05)
        if time.monotonic() - looked < LOOK_S:
            continue
        looked = time.monotonic()
        watch.look(fleet, feeder.done, looked - began)
        if feeder.done == offsets and fleet.deaths >= fleet.crashes and watch.settled():
            fleet.stop()  # a retry may have been appended in the meantime
            if watch.settled():
                return True
    fleet.stop()
    return False


def counted(home: Path) -> tuple[Counter[str], Counter[str], int]:
    """Crashes by step, ends by error, units fenced: what the workers noted."""
    events = home / "events.txt"
    lines = Counter(events.read_text().splitlines()) if events.exists() else Counter[str]()
    crashes = Counter({line.removeprefix("crash "): n for line, n in lines.items() if line.startswith("crash ")})
    ended = Counter({line.removeprefix("ended "): n for line, n in lines.items() if line.startswith("ended ")})
    return crashes, ended, lines["fenced"]


def _list(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


@dataclass
class Result:
    settled: bool
    audit: Audit
    crashes: Counter[str]
    deaths: int  # of both kinds
    table: list[tuple[str, object]]

    @property
    def bad(self) -> bool:
        return not self.settled or self.audit.wrong > 0


@contextlib.contextmanager
def world_of(home: Path, kind: str, store: str, seed: int) -> Iterator[World]:
    """Everything but the workers, running; all of it is taken down again."""
    crash_world.environment()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.crash_worker"])  # a start costs a fork, not a second of imports
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(crash_world.site(context))
        brokers = stack.enter_context(crash_world.brokers(seed)) if kind == "kafka" else None
        s3 = stack.enter_context(crash_world.s3(seed, None if store == "moto" else context)) if store != "folder" else None
        yield World(home, base, brokers, s3, context)


def run(home: Path, offsets: int, crashes: int, seed: int, *, log: str, store: str, limit_s: float, workers: int = 3) -> Result:
    began = time.monotonic()
    with world_of(home, log, store, seed) as world:
        fleet = Fleet(world, crashes, workers, random.Random(seed))
        done = drive(world, fleet, offsets, limit_s)
        took = time.monotonic() - began
        if world.brokers:
            world.brokers.calm.set()  # the audit is about what happened
            time.sleep(1.5)
        done = done or Watch(world).settled()  # the limit may have come while no broker would tell
        fresh = world.log()
        found = audit(fresh, world.store(), world.catalog(fresh.log_id), offsets)
        if done:
            for path in spools(home):
                found.say("corrupt", f"{path.relative_to(home)} is left in a spool after an orderly end")
        return _result(world, fleet, done, found, took)


def _result(world: World, fleet: Fleet, done: bool, found: Audit, took: float) -> Result:
    crashes, ended, fenced = counted(world.home)
    steps = Counter[str]()
    for name, n in crashes.items():
        steps[name.split(",")[0]] += n
    table: list[tuple[str, object]] = [
        ("starts", fleet.starts),
        ("crashes", crashes.total()),
        ("  by step", _list(steps)),
        ("  by time", _list(Counter({w: sum(n for name, n in crashes.items() if name.endswith(w)) for w in crash_worker.WHEN}))),
        ("SIGKILLs", fleet.kills),
        ("ended by an error", _list(ended)),
        ("units fenced", fenced),
        ("S3 faults", _list(world.s3.tally) if world.s3 else "no S3"),
        ("broker faults", _list(world.brokers.tally) if world.brokers else "no brokers"),
        ("offsets wanted", found.wanted),
        ("  outcomes", _list(found.outcomes)),
        ("  retries in the log twice", found.again),
        ("images stored", found.stored),
        ("shards", found.shards),
        ("missing", found.missing),
        ("duplicate", found.duplicate),
        ("corrupt", found.corrupt),
        ("orphan objects", found.orphans),
        ("peak memory of a worker, MiB", round(fleet.peak_mib)),
        ("settled", "yes" if done else "NO"),
        ("seconds", round(took)),
    ]
    return Result(done, found, crashes, fleet.deaths, table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offsets", type=int, default=20_000)
    parser.add_argument("--crashes", type=int, default=500, help="deaths of both kinds: at a step, and by SIGKILL")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", choices=("sqlite", "kafka"), default="kafka")
    parser.add_argument(
        "--store", choices=("folder", "s3", "moto"), default="s3", help="s3: bench/crash_s3.py, as fast as a store is; moto: slow"
    )
    parser.add_argument("--workers", type=int, default=3, help="two by the consumer group, the others zombies")
    parser.add_argument("--limit-s", type=float, default=1500)
    parser.add_argument("--home", type=Path, help="kept afterwards; a temporary folder if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-") as made:
        home = (args.home or Path(made)).resolve()
        if args.home:
            shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        result = run(
            home, args.offsets, args.crashes, args.seed, log=args.log, store=args.store, limit_s=args.limit_s, workers=args.workers
        )
    print("\n".join(f"{name:30} {value}" for name, value in result.table))
    print("\n".join(result.audit.said[:20]))
    return int(result.bad)


if __name__ == "__main__":
    sys.exit(main())
