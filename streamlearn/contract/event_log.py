"""The event log: partitioned, ordered, durable.  Kafka when deployed; SQLite, the default, below.

Partitions, offsets, keys and consumer-group offsets mean what they mean in Kafka.  The reset policy is `none`: asking for
an offset the log no longer holds is an incident (OffsetGap), never a silent jump.
"""

import contextlib
import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, OffsetGap, StoreFull

CANDIDATES = "candidates"
DEAD_LETTERS = "dead-letters"
SOURCE_STATE = "source-state"
TAKEDOWNS = "takedowns"  # selector -> what must not be learnt from, and what was done about it; compacted
CONNECTOR_CONFIGS = "connector-configs"  # connectors made at run time, and what they are to do (ingest/connectors/book.py)
HOSTS = "hosts"  # host -> what it has asked for that outlives whoever asked it (ingest/fetch/tenure.py); compacted
SHARDS = "shards"  # a hint that the catalog grew; never the truth
COMPACTED = frozenset({SOURCE_STATE, CONNECTOR_CONFIGS, TAKEDOWNS, HOSTS})  # the newest value of each key is what they hold
OURS = frozenset({CANDIDATES, SHARDS, *COMPACTED})  # what is in them is read by us: nobody else's records belong there


def retry_topic(index: int) -> str:
    """The topic of the index-th retry delay (fetch.retry_delays_s)."""
    return f"retry.{index}"


def retry_index(topic: str) -> int:
    """The other way round."""
    return int(topic.removeprefix("retry."))


@dataclass(frozen=True)
class Record:
    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    timestamp_ms: int


@dataclass(frozen=True)
class NewRecord:
    topic: str
    key: bytes
    value: bytes
    partition: int | None = None  # None: by hash of the key


class EventLog(Protocol):
    @property
    def log_id(self) -> str:
        """Names this log for ever.  A re-created log has another, so old positions cannot be mistaken for its own."""

    @property
    def epoch(self) -> int:
        """How often its topics have been made anew by hand, so that offsets began again."""

    def ensure_topic(self, topic: str, partitions: int) -> None:
        """Make the topic unless it exists.  Raises ConfigError when it exists with another number of partitions."""

    def partitions(self, topic: str) -> int:
        """Raises NotFound."""

    def append(self, records: Sequence[NewRecord]) -> list[tuple[int, int]]:
        """Durable on return, of one or several topics; (partition, offset) of each.  NotFound is raised before anything is written.

        In a compacted topic an empty value forgets its key.

        A caller that dies in here, or gets Retryable, may have appended some of them: whoever goes on must look at what is there.
        """

    def read(self, topic: str, partition: int, offset: int, max_records: int) -> list[Record]:
        """Records from `offset` on, in order; empty at the end.  Raises OffsetGap below the beginning."""

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """(first offset held, next offset to be written)."""

    def commit(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        """Remember how far a group has got; for lag dashboards only, the catalog decides."""

    def committed(self, group: str, topic: str, partition: int) -> int | None: ...

    def latest(self, topic: str, key: bytes) -> bytes | None:
        """The newest value of a key: how compacted topics are read."""

    def table(self, topic: str) -> dict[bytes, bytes]:
        """The newest value of every key of a compacted topic, of all that had been appended when it was asked for.  Raises NotFound."""

    def trim(self, topic: str, partition: int, before: int) -> int:
        """Drop records below `before`; the number dropped."""

    def subscribe(self, group: str, topics: Sequence[str]) -> "Subscription":
        """Take part in sharing out the partitions of these topics among all who subscribe under this group's name.

        What is dealt out are partition numbers: whoever has one has it of all these topics, because a key has one number in all of them.
        """


class Subscription(Protocol):
    """A member of a consumer group.  It says whose partitions are whose; reading is the log's.

    A partition passes from hand to hand in good order: the group takes it back (`owned` is without it), we let go of it (`hold_only` is
    without it), and only then, or after a time limit, may another have it.  One that was taken back is not ours again before we let go.
    """

    def owned(self) -> frozenset[tuple[str, int]]:
        """The (topic, partition) that are ours now.  To be asked often: who does not ask is taken to hang, and loses them."""

    def hold_only(self, places: frozenset[tuple[str, int]]) -> None:
        """Nothing of other partitions is being done any more: whoever gets them next may begin.  To be called after each `owned`."""

    def sure(self) -> bool:
        """Whether the group has confirmed us lately: if not, what we own may be another's by now."""

    def close(self) -> None:
        """Leave: the others take over at once."""


@dataclass(frozen=True)
class AllOfThem:
    """The embedded group: every member owns everything, and the catalog fences all but one of those who meet."""

    places: frozenset[tuple[str, int]]

    def owned(self) -> frozenset[tuple[str, int]]:
        return self.places

    def hold_only(self, places: frozenset[tuple[str, int]]) -> None:
        """Nobody waits for them."""

    def sure(self) -> bool:
        return True

    def close(self) -> None:
        """There is nobody to tell."""


def place_name(log: EventLog, topic: str) -> str:
    """What the catalog calls a topic: offsets that began again are not those that were before."""
    return f"{topic}@{log.epoch}" if log.epoch else topic


def partition_of(key: bytes, partitions: int) -> int:
    """Kafka's default partitioner, so that keys keep their partition whoever produces: murmur2(key) & 0x7fffffff modulo the number."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bit, with Kafka's seed (Apache Kafka, common/utils/Utils.java)."""
    mask, m = 0xFFFFFFFF, 0x5BD1E995
    h = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        h = (h * m & mask) ^ ((k ^ k >> 24) * m & mask)
    if whole < len(data):
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS topics (topic TEXT PRIMARY KEY, partitions INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ends (
  topic TEXT, part INTEGER, first INTEGER NOT NULL, end INTEGER NOT NULL, PRIMARY KEY (topic, part)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
  topic TEXT, part INTEGER, off INTEGER, ts INTEGER, key BLOB, value BLOB, PRIMARY KEY (topic, part, off)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS latest (topic TEXT, key BLOB, value BLOB, PRIMARY KEY (topic, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (grp TEXT, topic TEXT, part INTEGER, off INTEGER, PRIMARY KEY (grp, topic, part)) WITHOUT ROWID;
"""


class SqliteLog:
    """The embedded event log: one SQLite file in WAL mode, shared by the processes of one machine.

    An append is one transaction (BEGIN IMMEDIATE .. COMMIT with synchronous=FULL): the COMMIT is its one commit point, all or none.
    """

    epoch = 0  # topics are never made anew; a new file has another log id

    def __init__(self, path: Path, *, busy_timeout_s: float = 60.0):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # an acknowledged append survives power loss
            self._db.executescript(_SCHEMA)
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('log_id', ?)", (uuid.uuid4().hex[:12],))
            self.log_id: str = self._db.execute("SELECT value FROM meta WHERE name='log_id'").fetchone()[0]
        except sqlite3.DatabaseError as e:
            raise self._translate(e) from e

    def close(self) -> None:
        self._db.close()

    def copy_to(self, path: Path) -> None:
        """The log as it is at one moment, into a new file, while others append.  Raises StoreFull."""
        try:
            with contextlib.closing(sqlite3.connect(path)) as target:
                self._db.backup(target)
        except sqlite3.DatabaseError as e:
            raise self._translate(e) from e

    def ensure_topic(self, topic: str, partitions: int) -> None:
        with self._lock, self._transaction():
            row = self._db.execute("SELECT partitions FROM topics WHERE topic=?", (topic,)).fetchone()
            if row is None:
                self._db.execute("INSERT INTO topics VALUES (?,?)", (topic, partitions))
                self._db.executemany("INSERT OR IGNORE INTO ends VALUES (?,?,0,0)", [(topic, p) for p in range(partitions)])
            elif row[0] != partitions:
                # a key's partition is a hash modulo their number: changing it would split a host over two owners
                raise ConfigError(
                    f"{self.path}: topic {topic} has {row[0]} partitions, config says log.partitions = {partitions}; set it back"
                )

    def partitions(self, topic: str) -> int:
        row = self._one("SELECT partitions FROM topics WHERE topic=?", topic)
        if row is None:
            raise NotFound(f"{self.path}: no topic {topic}; a role that writes it makes it at its start")
        return int(row[0])

    def append(self, records: Sequence[NewRecord]) -> list[tuple[int, int]]:
        counts = {topic: self.partitions(topic) for topic in {r.topic for r in records}}
        placed = [(r, partition_of(r.key, counts[r.topic]) if r.partition is None else r.partition) for r in records]
        stamp, positions = time.time_ns() // 1_000_000, []
        with self._lock, self._transaction():
            ends = {tp: self._end(*tp) for tp in {(r.topic, p) for r, p in placed}}
            rows = []
            for r, p in placed:
                offset = ends[r.topic, p]
                ends[r.topic, p] = offset + 1
                positions.append((p, offset))
                rows.append((r.topic, p, offset, stamp, r.key, r.value))
            kept = [row for row in rows if row[0] not in COMPACTED]  # of a compacted topic only the newest value is kept
            self._db.executemany("INSERT INTO records VALUES (?,?,?,?,?,?)", kept)
            newest = [(r.topic, r.key, r.value) for r, _ in placed if r.topic in COMPACTED]
            self._db.executemany("INSERT OR REPLACE INTO latest VALUES (?,?,?)", newest)
            self._db.executemany("DELETE FROM latest WHERE topic=? AND key=? AND value=x''", [row[:2] for row in newest])
            self._db.executemany("UPDATE ends SET end=? WHERE topic=? AND part=?", [(e, t, p) for (t, p), e in ends.items()])
        return positions

    def read(self, topic: str, partition: int, offset: int, max_records: int) -> list[Record]:
        first, _ = self.bounds(topic, partition)
        if offset < first:
            raise OffsetGap(
                f"{self.path}: {topic}/{partition} begins at {first}, asked for {offset}; {offset} to {first - 1} are gone. "
                "Restore the log from a backup, or accept the loss by resetting the catalog's position by hand"
            )
        sql = "SELECT off, key, value, ts FROM records WHERE topic=? AND part=? AND off>=? ORDER BY off LIMIT ?"
        rows = self._all(sql, topic, partition, offset, max_records)
        return [Record(topic, partition, off, key, value, ts) for off, key, value, ts in rows]

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        row = self._one("SELECT first, end FROM ends WHERE topic=? AND part=?", topic, partition)
        if row is None:
            raise NotFound(f"{self.path}: no partition {partition} of topic {topic}")
        return int(row[0]), int(row[1])

    def commit(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        with self._lock, self._transaction():
            rows = [(group, topic, part, off) for (topic, part), off in offsets.items()]
            self._db.executemany("INSERT OR REPLACE INTO groups VALUES (?,?,?,?)", rows)

    def committed(self, group: str, topic: str, partition: int) -> int | None:
        row = self._one("SELECT off FROM groups WHERE grp=? AND topic=? AND part=?", group, topic, partition)
        return None if row is None else int(row[0])

    def latest(self, topic: str, key: bytes) -> bytes | None:
        if topic in COMPACTED:
            row = self._one("SELECT value FROM latest WHERE topic=? AND key=?", topic, key)
        else:
            row = self._one("SELECT value FROM records WHERE topic=? AND key=? ORDER BY ts DESC, off DESC LIMIT 1", topic, key)
        return None if row is None else bytes(row[0])

    def table(self, topic: str) -> dict[bytes, bytes]:
        self.partitions(topic)
        return {bytes(key): bytes(value) for key, value in self._all("SELECT key, value FROM latest WHERE topic=?", topic)}

    def trim(self, topic: str, partition: int, before: int) -> int:
        with self._lock, self._transaction():
            dropped = self._db.execute("DELETE FROM records WHERE topic=? AND part=? AND off<?", (topic, partition, before)).rowcount
            self._db.execute("UPDATE ends SET first=MAX(first, MIN(end, ?)) WHERE topic=? AND part=?", (before, topic, partition))
        return dropped

    def subscribe(self, group: str, topics: Sequence[str]) -> Subscription:
        return AllOfThem(frozenset((topic, p) for topic in topics for p in range(self.partitions(topic))))

    def _end(self, topic: str, partition: int) -> int:
        row = self._db.execute("SELECT end FROM ends WHERE topic=? AND part=?", (topic, partition)).fetchone()
        if row is None:
            raise NotFound(f"{self.path}: no partition {partition} of topic {topic}")
        return int(row[0])

    def _one(self, sql: str, *values: object) -> tuple[Any, ...] | None:
        with self._lock:
            try:
                row: tuple[Any, ...] | None = self._db.execute(sql, values).fetchone()
            except sqlite3.DatabaseError as e:
                raise self._translate(e) from e
            return row

    def _all(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.DatabaseError as e:
                raise self._translate(e) from e

    def _transaction(self) -> "_Transaction":
        return _Transaction(self)

    def _translate(self, e: sqlite3.DatabaseError) -> Exception:
        text = str(e)
        if "full" in text:
            return StoreFull(f"{self.path}: {text}; free some space, the work goes on by itself", after_s=2.0)
        if "malformed" in text or "not a database" in text:
            return Corrupt(f"{self.path}: {text}; restore it from a backup (the catalog still knows what is stored)")
        return e


class _Transaction:
    """BEGIN IMMEDIATE .. COMMIT; a body that raises, or a commit that fails, leaves nothing."""

    def __init__(self, log: SqliteLog):
        self.log = log

    def __enter__(self) -> None:
        try:
            self.log._db.execute("BEGIN IMMEDIATE")
        except sqlite3.DatabaseError as e:
            raise self.log._translate(e) from e

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self.log._db.execute("COMMIT")
                return
        except sqlite3.DatabaseError as e:
            error = e
        if self.log._db.in_transaction:
            self.log._db.execute("ROLLBACK")
        if isinstance(error, sqlite3.DatabaseError):
            raise self.log._translate(error) from error
