"""The catalog: the one table that says which shards exist, and how far each partition is covered.

A Delta table (delta-rs), one row a shard.  The position of a partition is the Delta application transaction
`ingest/<log id>/<topic>/<partition>`, moved in the same commit that adds the rows.

  1. read     the table's newest state; every advance must start where its partition stands, else Fenced
  2. write    one parquet file with the new rows (no one lists it yet)
  3. put      _delta_log/<version>.json, if absent, with the rows and the new positions        <- THE COMMIT POINT
  4. tidy     every 100 versions the small files are merged, and the log gets a checkpoint (upkeep.py)

Killed after   what is left                        who mends it
  1            nothing
  2            a parquet file no version names     vacuum
  3            nothing: it is committed            the next writer reads the new position
  4            nothing

A zombie that read its position before another committed the same offsets loses at 3: Delta refuses concurrent changes of one
application transaction, and it raises Fenced.  A reply lost at 3 is resolved by reading back: if the positions have moved to
our ends and the rows are ours, the commit is ours.

Replacing (compaction, expiry, takedown) is one commit too: the old rows change their status and the new ones appear.  It moves no position.

  1. read     the old rows; each must be live, else it is done already (these very new rows stand in its place), or Conflict
  2. write    parquet files: the old rows with their new status, the new rows, and what shared a file with them
  3. put      _delta_log/<version>.json, if absent, which swaps the files                      <- THE COMMIT POINT

Killed after   what is left                        who mends it
  1            nothing
  2            parquet files no version names      vacuum
  3            nothing: it is committed            the same call again finds it done

Whoever loses 3 to another writer looks again from 1, so neither an append nor a replacement is lost or doubled.  A replacing row covers the
same offsets and holds the same samples in the same order, less those that the old row lists in `removed`: so where any sample went can be
followed through `replaces` (stream/moved.py), and coverage stays whole.  It inherits `committed` and `place`, its place in the order of
learning; `changed` is the version in which a row took its present status, and is what followers ask for.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from streamlearn.contract import durable, upkeep
from streamlearn.contract.errors import Corrupt, Fenced, Retryable, StoreFull
from streamlearn.contract.shard_rows import (
    EXPIRED,
    FIELDS,
    LIVE,
    REPLACED,
    SCHEMA,
    TAKEN_DOWN,
    Advance,
    Changes,
    Listing,
    ShardRow,
    checked_key,
    columns,
    conserved,
    in_place_of,
    replaced,
)
from streamlearn.contract.status import now

__all__ = ["EXPIRED", "LIVE", "REPLACED", "TAKEN_DOWN", "Advance", "Catalog", "Changes", "DeltaCatalog", "Listing", "ShardRow"]

# how delta-rs words what the store answered or the network did
_OUT_OF_REACH = ("Generic S3 error", "lacked the necessary privileges", "valid authentication credentials")
_DECORATION = re.compile(r"\x1b\[\d*m|↳")
_FULL = ("No space left", "os error 28", "os error 122")


class Catalog(Protocol):
    def position(self, topic: str, partition: int) -> int:
        """The next offset to be fetched; 0 when nothing is committed."""

    def commit(self, rows: Sequence[ShardRow], advances: Sequence[Advance]) -> int:
        """Add the rows and move the positions, exactly once; the new version.  Raises Fenced, StoreFull."""

    def follow(self, after: int) -> tuple[int, list[ShardRow]]:
        """(newest version, rows added in versions above `after` in commit order).  `after` = -1: all."""

    def changes(self, after: int) -> Changes:
        """As follow, with the rows that ceased to be live: both of one version, so a range is never seen uncovered.  `after` = -1: all."""

    def rows(self) -> list[ShardRow]:
        """The live rows in commit order."""

    def history(self) -> list[ShardRow]:
        """All rows there ever were, in commit order."""

    def replace(
        self,
        old_keys: Sequence[str],
        new_rows: Sequence[ShardRow],
        *,
        status: str = REPLACED,
        note: str = "",
        removed: Mapping[str, Sequence[int]] | None = None,
    ) -> int:
        """End the old rows with `status` and put the new ones in their place, in one commit; the new version.

        `removed`: old key -> indices of its samples that are in no new row.  Done already is done.  Raises Conflict when an old row is no
        longer live, StoreFull, ValueError where the new rows (if any) do not cover the same offsets with the other samples.
        """

    def version(self) -> int: ...

    def totals(self) -> tuple[int, int]:
        """(shards, samples) that are live."""

    def covering(self, topic: str, partition: int, start: int, end: int) -> list[ShardRow]:
        """The live rows that cover any of the offsets [start, end), in commit order."""


_LATER = {"removed": "''", "ended_at": "''", "note": "''", "changed": "committed"}  # columns that older tables lack: what stands for them


class DeltaCatalog:
    """The embedded and the deployed catalog: the same table in a folder or on S3."""

    def __init__(self, uri: str, *, log_id: str, storage_options: dict[str, str] | None = None, attempts: int = 20):
        self.uri, self.log_id, self.storage_options, self.attempts = uri, log_id, storage_options, attempts
        self._table: DeltaTable | None = None

    def position(self, topic: str, partition: int) -> int:
        table = self._open()
        return 0 if table is None else self._position(table, topic, partition)

    def version(self) -> int:
        table = self._open()
        return -1 if table is None else table.version()

    def rows(self) -> list[ShardRow]:
        return self.follow(-1)[1]

    def totals(self) -> tuple[int, int]:
        table = self._open()
        if table is None:
            return 0, 0
        found = self._query(table, f"SELECT count(*) AS shards, sum(num_samples) AS samples FROM shards WHERE status = '{LIVE}'")
        return found["shards"][0].as_py(), found["samples"][0].as_py() or 0

    def covering(self, topic: str, partition: int, start: int, end: int) -> list[ShardRow]:
        table = self._open()
        if table is None or start >= end:
            return []
        name = topic.replace("'", "''")
        there = f"topic = '{name}' AND partition = {int(partition)} AND end_offset > {int(start)} AND first_offset < {int(end)}"
        return self._select(table, f"{there} AND status = '{LIVE}'")

    def follow(self, after: int) -> tuple[int, list[ShardRow]]:
        return self._newer(after, f"status = '{LIVE}'")

    def changes(self, after: int) -> Changes:
        version, rows = self._newer(after, "true")
        return Changes(version, [r for r in rows if r.status == LIVE], [r for r in rows if r.status != LIVE])

    def history(self) -> list[ShardRow]:
        return self._newer(-1, "true")[1]

    def column_names(self) -> set[str]:
        """Of the table as it is stored."""
        table = self._open()
        return set() if table is None else {f.name for f in table.schema().fields}

    def listing(self) -> Listing:
        """All rows and data files of one version: what a copy of the table needs."""
        table = self._open()
        if table is None:
            return Listing(-1, [], [])
        return Listing(table.version(), self._select(table, "true"), [uri.rpartition("/")[2] for uri in table.file_uris()])

    def _newer(self, after: int, where: str) -> tuple[int, list[ShardRow]]:
        """(newest version, rows that changed in versions above `after`)."""
        table = self._open()
        if table is None:
            return -1, []
        if table.version() <= after:
            return table.version(), []
        # bare columns, which delta-rs holds against each file's statistics: only what is new is opened
        newer = f"committed > {int(after)}"
        if "changed" in {f.name for f in table.schema().fields}:
            newer = f"(changed > {int(after)} OR (changed IS NULL AND {newer}))"
        return table.version(), self._select(table, f"{newer} AND {where}")

    def _select(self, table: DeltaTable, where: str) -> list[ShardRow]:
        """`where` is asked of the columns as they are stored."""
        there = {f.name for f in table.schema().fields}
        wanted = ", ".join(
            f"{f'COALESCE({n}, {_LATER[n]})' if n in there else _LATER[n]} AS {n}" if n in _LATER else n for n in SCHEMA.names
        )
        names = ", ".join(name for name, _ in FIELDS)
        # of rows in one place, the older before what replaced it
        order = "committed, place, first_offset, changed, status = 'live', key"
        sql = f"SELECT {names} FROM (SELECT {wanted} FROM shards WHERE {where}) ORDER BY {order}"
        return [ShardRow(**row) for row in self._query(table, sql).to_pylist()]

    def _query(self, table: DeltaTable, sql: str) -> pa.Table:
        try:
            return upkeep.read(table, sql)
        except (OSError, DeltaError, pa.ArrowException) as e:
            raise self._out_of_reach(e) or Corrupt(
                f"{self.uri}: the table names a file that cannot be read: {_first_line(e)}; restore the folder from a backup"
            ) from e

    def commit(self, rows: Sequence[ShardRow], advances: Sequence[Advance]) -> int:
        if len({(a.topic, a.partition) for a in advances}) != len(advances):
            raise ValueError("a commit moves each partition once")
        return self._committed(
            lambda table, lost: self._settled(table, rows, advances, lost), lambda table: self._write(table, rows, advances)
        )

    def replace(
        self,
        old_keys: Sequence[str],
        new_rows: Sequence[ShardRow],
        *,
        status: str = REPLACED,
        note: str = "",
        removed: Mapping[str, Sequence[int]] | None = None,
    ) -> int:
        if not old_keys or status == LIVE:
            raise ValueError("a replacement ends at least one row")
        keys, at = ", ".join(f"'{k}'" for k in {*old_keys, *(r.key for r in new_rows)} if checked_key(k)), now()

        def known(table: DeltaTable) -> dict[str, ShardRow]:
            return {r.key: r for r in self._select(table, f"key IN ({keys})")}

        def write(table: DeltaTable) -> None:
            was = known(table)
            old = [was[k] for k in old_keys]
            conserved(old, new_rows, removed or {})
            gone = {k: ",".join(str(i) for i in sorted(v)) for k, v in (removed or {}).items()}
            ended = [replace(r, status=status, ended_at=at, note=note, removed=gone.get(r.key, "")) for r in old]
            self._swap(table, [*ended, *(in_place_of(r, was) for r in new_rows)])

        return self._committed(lambda table, _: replaced(self.uri, known(table), old_keys, new_rows, status), write)

    def _committed(self, settled: Callable[[DeltaTable, bool], bool], write: Callable[[DeltaTable], None]) -> int:
        """Steps 1 to 4, until the commit is in."""
        lost = False  # whether an earlier attempt ended without a clear reply
        for attempt in range(self.attempts):
            table = self._open() or self._create()
            if settled(table, lost):
                return table.version()
            since = table.version()
            try:
                write(table)
            except CommitFailedError:
                lost = True  # someone was first, perhaps we ourselves: the next look tells
                time.sleep(0.01 * (attempt + 1))
            except (DeltaError, OSError) as e:
                if any(sign in str(e) for sign in _FULL):
                    raise StoreFull(
                        f"{self.uri}: no space left for the commit; free some space, the work goes on by itself", after_s=2.0
                    ) from e
                lost = True
                time.sleep(0.05 * (attempt + 1))
                if attempt == self.attempts - 1:
                    what = f"{self.uri}: the commit failed {self.attempts} times, last with: {e}"
                    raise Retryable(what, after_s=5.0, on="store" if self._out_of_reach(e) else "catalog") from e
            else:
                version = table.version()
                upkeep.secure(self.uri, since + 1, version)
                upkeep.tidy(table, since)
                return version
        raise Retryable(f"{self.uri}: {self.attempts} attempts lost to other writers", after_s=1.0, on="catalog")

    def _settled(self, table: DeltaTable, rows: Sequence[ShardRow], advances: Sequence[Advance], lost: bool) -> bool:
        """True if our commit is already in; raises Fenced if another's is."""
        at = [self._position(table, a.topic, a.partition) for a in advances]
        if all(p == a.start for p, a in zip(at, advances, strict=True)):
            return False
        if lost and all(p == a.end for p, a in zip(at, advances, strict=True)):
            known = {row.key for row in self.history()}  # they may have been replaced since
            if all(row.key in known for row in rows):
                return True
        moved = ", ".join(f"{a.topic}/{a.partition} is at {p}, not {a.start}" for p, a in zip(at, advances, strict=True) if p != a.start)
        raise Fenced(f"{self.uri}: {moved}: another writer was here; drop the unit and read the position anew")

    def _write(self, table: DeltaTable, rows: Sequence[ShardRow], advances: Sequence[Advance]) -> None:
        version = table.version() + 1
        data = columns([replace(row, committed=version, place=i) for i, row in enumerate(rows)], version)
        moves = [Transaction(self._app(a.topic, a.partition), a.end) for a in advances]
        # no blind retries inside delta-rs: each attempt must look at the positions, and `committed` must be its own version
        properties = CommitProperties(app_transactions=moves, max_commit_retries=0)
        write_deltalake(table, data, mode="append", schema_mode="merge", commit_properties=properties)
        table.update_incremental()

    def _swap(self, table: DeltaTable, rows: Sequence[ShardRow]) -> None:
        """Step 3 of replacing: rows whose key is known are changed, the others appear."""
        merge = table.merge(
            columns(rows, table.version() + 1),
            "old.key = new.key",
            source_alias="new",
            target_alias="old",
            merge_schema=True,
            commit_properties=CommitProperties(max_commit_retries=0),
        )
        merge.when_matched_update_all().when_not_matched_insert_all().execute()
        table.update_incremental()

    def _app(self, topic: str, partition: int) -> str:
        return f"ingest/{self.log_id}/{topic}/{partition}"

    def _position(self, table: DeltaTable, topic: str, partition: int) -> int:
        try:
            return table.transaction_version(self._app(topic, partition)) or 0
        except (DeltaError, OSError) as e:  # delta-rs reads the log once more to tell it
            raise self._out_of_reach(e) or e from e

    def _open(self) -> DeltaTable | None:
        try:
            if self._table is None:
                self._table = DeltaTable(self.uri, storage_options=self.storage_options)
            else:
                self._table.update_incremental()
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as e:
            passing = self._out_of_reach(e)
            if passing is None and isinstance(e, OSError):
                raise
            raise passing or Corrupt(f"{self.uri}: the Delta log cannot be read: {_first_line(e)}; restore the folder from a backup") from e
        return self._table

    def _create(self) -> DeltaTable:
        if "://" not in self.uri:
            try:
                Path(self.uri).mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise durable.translate(e, Path(self.uri)) from e
        # transactions and log entries are the positions: they are never forgotten
        configuration = {
            "delta.setTransactionRetentionDuration": "interval 100000 days",
            "delta.logRetentionDuration": "interval 365 days",
        }
        try:
            self._table = DeltaTable.create(
                self.uri, schema=SCHEMA, mode="ignore", storage_options=self.storage_options, configuration=configuration, name="shards"
            )
        except (DeltaError, OSError) as e:
            raise self._out_of_reach(e) or e from e
        return self._table

    def _out_of_reach(self, e: Exception) -> Retryable | None:
        """The fault of the store or the network, as opposed to what is written there; None if it is not theirs."""
        text = " ".join(_DECORATION.sub("", str(e)).split())
        if "://" not in self.uri or not any(sign in text for sign in _OUT_OF_REACH):
            return None
        return Retryable(f"{self.uri}: the catalog cannot be reached: {text[:500]}", after_s=5.0, on="store")


def _first_line(e: Exception) -> str:
    """delta-rs appends a native backtrace to some messages."""
    return str(e).partition("\n")[0]
