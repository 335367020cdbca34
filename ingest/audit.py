"""The gap auditor: is the dataset what the catalog says, and does the catalog cover every offset exactly once?

  catalog      the rows of a partition that no other row replaces cover [0, position) without gap or overlap, whatever their status
  objects      every live row has its tar and its sidecar, the tar of the size in the row; old objects have a row that names them
  contents     (all shards when deep, else a random sample of them) ingest/audit_shard.py
  log          no position lies beyond the end of the log; behind it is lag.  A group offset behind the position is retries owed

It only looks, and may look while others write: positions are read before and after the rows, objects are listed before the rows, and what
is found wrong with a shard that is no longer live at the end is not held against it.  Memory is that of the rows and the listing; objects
are read in chunks.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

from ingest.audit_shard import BACKUP, Finding, check_shard
from ingest.pack import group_of
from streamlearn.contract.catalog import Catalog, ShardRow
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.event_log import CANDIDATES, EventLog, place_name, retry_topic
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import sidecar_key

OLD_S = 86400.0  # an unnamed object this old is of no unit that is still being committed
PREFIX = "shards/"
WORKERS = 4
Place = tuple[str, int]  # the catalog's name of a topic, partition


@dataclass(frozen=True)
class Partition:
    """How far one partition is, by everyone who keeps count.  A log's counts are None where it no longer holds the topic."""

    topic: str
    partition: int
    position: int  # the catalog's: the next offset to be fetched
    log_end: int | None  # the next offset to be written
    done: int | None  # the group's: retries and dead letters of all units below it are in the log
    shards: int  # live
    samples: int  # of the live ones

    @property
    def lag(self) -> int:
        """Records that wait to be fetched."""
        return max(0, (self.log_end or 0) - self.position) if self.log_end is not None else 0

    @property
    def owed(self) -> int:
        """Offsets whose retries may still have to be appended; the next start of the fetcher does it."""
        return max(0, self.position - (self.done or 0)) if self.log_end is not None else 0


@dataclass(frozen=True)
class Orphan:
    """An object that no row names."""

    key: str
    age_s: float


@dataclass
class Report:
    """What was looked at, and what was found.  Young orphans and lag are normal; `findings` are not."""

    findings: list[Finding] = field(default_factory=list)
    partitions: list[Partition] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    shards: int = 0  # live rows
    read: int = 0  # of them, read from end to end
    bytes_read: int = 0  # of their tars

    @property
    def good(self) -> bool:
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {
            "good": self.good,
            "findings": [f.__dict__ for f in self.findings],
            "partitions": [p.__dict__ | {"lag": p.lag, "owed": p.owed} for p in self.partitions],
            "orphans": [o.__dict__ for o in self.orphans],
            "shards": self.shards,
            "read": self.read,
            "bytes_read": self.bytes_read,
        }


def verify(
    log: EventLog,
    store: ObjectStore,
    catalog: Catalog,
    *,
    deep: bool,
    sample: int,
    workers: int = WORKERS,
    clock: Callable[[], float] = time.time,
) -> Report:
    """Look at everything; contents of all shards if `deep`, else of `sample` random ones.  Raises Retryable when a seam is out of reach."""
    report, logged = Report(), _logged(log)
    before = {place: catalog.position(*place) for place in logged}
    listed = store.list(PREFIX)
    rows = catalog.history()
    live = [row for row in rows if row.status == "live"]
    by_place = _by_place(rows, logged)
    for place in sorted(by_place):
        after = catalog.position(*place)
        report.findings += check_coverage(place, by_place[place], before.get(place, after), after)
        partition = _partition(log, place, by_place[place], after, logged.get(place))
        report.partitions.append(partition)
        report.findings += check_log(partition)
    report.shards = len(live)
    contents = live if deep else random.sample(live, min(sample, len(live)))
    report.read, report.bytes_read = len(contents), sum(row.bytes for row in contents)
    found = _check_shards(store, live, {row.key for row in contents}, workers)
    if found:  # who rewrites or expires shards may have been at it meanwhile
        alive = {row.key for row in catalog.rows()}
        report.findings += [finding for key, finding in found if key in alive]
    report.orphans = _ages(store, unnamed(listed, rows), clock())
    report.findings += [_old(orphan) for orphan in report.orphans if orphan.age_s >= OLD_S]
    return report


def progress(log: EventLog, catalog: Catalog, rows: Iterable[ShardRow]) -> list[Partition]:
    """How far each partition is, that the log or a row names."""
    logged = _logged(log)
    by_place = _by_place(rows, logged)
    return [_partition(log, place, by_place[place], catalog.position(*place), logged.get(place)) for place in sorted(by_place)]


def check_coverage(place: Place, rows: Iterable[ShardRow], before: int, after: int) -> list[Finding]:
    """The rows that no other row replaces, in the order of their offsets, lie end to end from 0 to a position in [before, after]."""
    where, rows = f"{place[0]}/{place[1]}", list(rows)
    gone = {key for row in rows for key in row.replaces.split(",") if key}
    found, at, last = [], 0, ""
    for row in sorted(rows, key=lambda row: (row.first_offset, row.end_offset)):
        if row.key in gone and row.status != "live":
            continue
        if row.first_offset > at:
            found.append(_gap(where, at, row.first_offset))
        if row.first_offset < at:
            twice = f"offsets {row.first_offset} to {min(at, row.end_offset) - 1} stand in two rows: {last} and {row.key}"
            found.append(
                Finding("overlap", where, twice, "images would be learnt twice; restore the catalog from a backup, then `verify` again")
            )
        if row.end_offset > at:
            at, last = row.end_offset, row.key
    if at < before:
        found.append(_gap(where, at, before))
    if at > after:
        beyond = f"rows reach offset {at - 1}, but the position is {after}: offsets {after} to {at - 1} would be fetched again"
        remedy = "stop the fetcher; the log was made anew or the catalog restored in part: restore both from the same backup"
        found.append(Finding("position", where, beyond, remedy))
    return found


def check_log(partition: Partition) -> list[Finding]:
    """A log that holds less than was committed of it has been restored from too old a backup, and will give out the same offsets anew."""
    where = f"{partition.topic}/{partition.partition}"
    if partition.log_end is None:
        return []
    if partition.position > partition.log_end:
        what = f"the log ends at offset {partition.log_end}, but the catalog has committed up to {partition.position}"
        remedy = "stop connectors and fetcher; restore the log, or begin a new one (docs/dataset.md): new candidates would be skipped"
        return [Finding("log", where, what, remedy)]
    if (partition.done or 0) > partition.position:
        what = f"the log's group offset is {partition.done}, but the catalog has committed only up to {partition.position}"
        return [
            Finding(
                "log", where, what, "the catalog was restored from too old a backup: restore a newer one, or let the rest be fetched again"
            )
        ]
    return []


def unnamed(listed: Iterable[str], rows: Iterable[ShardRow]) -> list[str]:
    """Those of the listed objects that no row names, live or not.  The rows must have been read after the listing."""
    named = names(rows)
    return [key for key in listed if key not in named]


def names(rows: Iterable[ShardRow]) -> set[str]:
    """Every object that a row, live or not, names."""
    tars = {key for row in rows for key in (row.key, *row.replaces.split(",")) if key}
    return tars | {sidecar_key(key) for key in tars}


@dataclass(frozen=True)
class Swept:
    """What a sweep deleted (or would), and what it let be because it is too young."""

    deleted: tuple[Orphan, ...]
    young: tuple[Orphan, ...]


def sweep(
    store: ObjectStore,
    catalog: Catalog,
    *,
    older_than_s: float = OLD_S,
    dry_run: bool,
    clock: Callable[[], float] = time.time,
) -> Swept:
    """Delete the objects under shards/ that no row names and that were last put at least `older_than_s` seconds ago.

      1. list     the objects
      2. read     every row, live or not
      3. delete   each listed object that no row names, once its age has been asked for       <- ITS OWN COMMIT POINT, one by one

    The order of 1 and 2 matters.  An object is put before its row is committed: what is listed at 1 and committed by 2 has its row in
    the rows read at 2, and is safe.  Were the rows read first, a unit committed between the two would be listed and have no row.
    What is not yet committed at 2 is safe by its age: every attempt puts its objects anew, which makes them young, and commits at
    once.  The age is asked for directly before the delete, not at 1.  What remains is a unit repeated to the byte, a day later, within the
    milliseconds between the two; sealing cannot do that (a day later its key has another day).

    Killed at 3: the rest is still there, and the next sweep deletes it.  Raises ValueError for a negative age, Corrupt where there are
    old objects but no catalog at all: a catalog that is lost must not take the dataset with it.
    """
    if older_than_s < 0:
        raise ValueError(f"older_than_s = {older_than_s}: an age is not negative")
    listed = store.list(PREFIX)
    rows = catalog.history()
    if not rows and any(o.age_s >= older_than_s for o in _ages(store, listed, clock())):  # young ones: a first unit, being sealed
        raise Corrupt(
            f"{len(listed)} objects under {PREFIX}, but the catalog has no row: nothing is swept; restore the catalog from a backup"
        )
    return _delete_old(store, unnamed(listed, rows), older_than_s, dry_run, clock)


def _delete_old(store: ObjectStore, keys: Iterable[str], older_than_s: float, dry_run: bool, clock: Callable[[], float]) -> Swept:
    """One by one, each asked for its age directly before."""
    deleted, young = [], []
    for key in keys:
        for orphan in _ages(store, [key], clock()):
            if orphan.age_s < older_than_s:
                young.append(orphan)
                continue
            if not dry_run:
                store.delete(key)
            deleted.append(orphan)
    return Swept(tuple(deleted), tuple(young))


def _logged(log: EventLog) -> dict[Place, tuple[str, int | None]]:
    """(the log's own name of the topic, group offset) of the partitions that the fetcher reads."""
    found = {}
    for topic in fetched_topics(log):
        for partition in range(log.partitions(topic)):
            found[place_name(log, topic), partition] = (topic, log.committed(group_of(log), topic, partition))
    return found


def _by_place(rows: Iterable[ShardRow], logged: Iterable[Place]) -> dict[Place, list[ShardRow]]:
    found: dict[Place, list[ShardRow]] = {place: [] for place in logged}
    for row in rows:
        found.setdefault((row.topic, row.partition), []).append(row)
    return found


def fetched_topics(log: EventLog) -> Iterator[str]:
    """What fetchers read: candidates, and as many retry topics as there are."""
    for topic in chain([CANDIDATES], map(retry_topic, count())):
        try:
            log.partitions(topic)
        except NotFound:
            return
        yield topic


def _partition(log: EventLog, place: Place, rows: Sequence[ShardRow], position: int, logged: tuple[str, int | None] | None) -> Partition:
    """The group offset was read before the position and the end is read after it, so neither looks wrong because someone is at work."""
    live = [row for row in rows if row.status == "live"]
    end = log.bounds(logged[0], place[1])[1] if logged else None
    done = logged[1] if logged else None
    return Partition(*place, position, end, done, len(live), sum(row.num_samples for row in live))


def _check_shards(store: ObjectStore, live: Sequence[ShardRow], contents: set[str], workers: int) -> list[tuple[str, Finding]]:
    """(shard's key, finding), in the order of the rows.  What raises in a worker is raised here."""

    def check(row: ShardRow) -> list[tuple[str, Finding]]:
        try:
            return [(row.key, finding) for finding in check_shard(store, row, contents=row.key in contents)]
        except NotFound as e:
            return [(row.key, Finding("missing", row.key, f"gone while it was read: {e}", BACKUP))]

    with ThreadPoolExecutor(workers, thread_name_prefix="audit") as pool:
        futures = [pool.submit(check, row) for row in live]
        try:
            return [found for future in futures for found in future.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a fault the rest need not be read


def _ages(store: ObjectStore, keys: Iterable[str], now: float) -> list[Orphan]:
    found = []
    for key in keys:
        with suppress(NotFound):  # swept or purged since it was listed
            found.append(Orphan(key, now - store.modified(key)))
    return found


def _gap(where: str, first: int, end: int) -> Finding:
    what = f"no row covers offset {first}" if first == end - 1 else f"no row covers offsets {first} to {end - 1}"
    return Finding("gap", where, what, "rows are lost: restore the catalog from a backup that has them")


def _old(orphan: Orphan) -> Finding:
    return Finding("orphan", orphan.key, f"no row names it, and it is {orphan.age_s / 3600:.1f} h old", "`streamlearn dataset sweep`")
