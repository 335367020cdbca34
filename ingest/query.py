"""SQL over the dataset: DuckDB, in memory, over the catalog's rows and their sidecars.

  shards     the live rows of the catalog
  outcomes   a row for every offset that they cover: the sidecar's columns, and day, topic, partition and shard (the key)

DuckDB reads the sidecars through an arrow dataset, so only the columns and shards that a query needs, a batch at a time; what does not fit
into its memory spills into a temporary folder.  Of a store that is no folder the sidecars are copied first (DuckDB's own reader of S3 is an
extension that would have to be downloaded), and only if the query names `outcomes`.  It reaches nothing else: neither files nor the
network nor the catalog, so there is nothing that a query could change.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from streamlearn.contract.catalog import ShardRow
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.object_store import FolderStore, ObjectStore
from streamlearn.contract.shard_rows import SCHEMA
from streamlearn.contract.shards import SIDECAR_SCHEMA, sidecar_key

MEMORY = "512MB"
THREADS = 2
ROWS = 1000  # fetched at once
_OF_THE_STATEMENT = (duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException, duckdb.PermissionException)
COPIERS = 8  # sidecars copied at once
PLACE = pa.schema([("day", pa.string()), ("topic", pa.string()), ("partition", pa.int64()), ("shard", pa.string())])
OUTCOMES_SCHEMA = pa.schema([*PLACE, *SIDECAR_SCHEMA])
SHARDS_SCHEMA = pa.schema([f for f in SCHEMA if f.name not in ("committed", "place")])


def within(rows: Sequence[ShardRow], since: str = "", until: str = "") -> list[ShardRow]:
    """The rows of the days `since` to `until` (YYYY-MM-DD, both included; empty: no bound)."""
    return [row for row in rows if (not since or row.day >= since) and (not until or row.day <= until)]


class Answer:
    """The columns of a result, and its rows as they come."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection):
        self._cursor = cursor
        self.columns = [str(column[0]) for column in cursor.description or ()]

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        while rows := self._cursor.fetchmany(ROWS):
            yield from rows


@contextmanager
def query(store: ObjectStore, rows: Sequence[ShardRow], sql: str, parameters: Sequence[object] = ()) -> Iterator[Answer]:
    """Run one statement that only reads.  The answer can be read within the context.

    Raises ConfigError where the statement is wrong, NotFound or Corrupt where a sidecar is.
    """
    paths: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="streamlearn-query-") as folder, _connect(Path(folder)) as connection:
        try:
            _check(connection, sql)
            connection.register("shards", pa.Table.from_pylist([row.__dict__ for row in rows], schema=SHARDS_SCHEMA))
            if "outcomes" in sql.lower():  # else not one sidecar need be there
                paths = _local(store, rows, Path(folder))
                connection.register("outcomes", _outcomes(rows, paths))
            yield Answer(connection.execute(sql, list(parameters)))
        except duckdb.Error as e:
            if not isinstance(e, _OF_THE_STATEMENT):
                _look_for_damage(rows, paths)
            raise ConfigError(f"{sql}: {e}") from e


def _connect(folder: Path) -> duckdb.DuckDBPyConnection:
    settings: dict[str, str | bool | int | float | list[str]] = {
        "enable_external_access": "false",  # arrow is handed in; SQL itself opens nothing
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "memory_limit": MEMORY,
        "threads": str(THREADS),
        "temp_directory": str(folder / "spill"),
        "lock_configuration": "true",
    }
    return duckdb.connect(":memory:", config=settings)


def _check(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if len(kinds) != 1 or kinds[0] not in ("SELECT", "EXPLAIN"):
        raise ConfigError(f"{sql}: {' and '.join(kinds) or 'nothing'}: give one statement that reads, such as SELECT count(*) FROM shards")


def _look_for_damage(rows: Sequence[ShardRow], paths: Sequence[Path]) -> None:
    """DuckDB does not tell a sidecar that cannot be read from a statement that cannot be run.  Raises Corrupt naming the first one."""
    for row, path in zip(rows, paths, strict=False):  # no paths: no sidecar was asked for
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError) as e:
            raise Corrupt(f"{sidecar_key(row.key)}: {e}; `streamlearn dataset verify` tells what else is wrong") from e


def _outcomes(rows: Sequence[ShardRow], paths: Sequence[Path]) -> ds.FileSystemDataset:
    """All sidecars as one table that nobody has read yet; what a file does not hold itself is told of it as a whole."""
    of_shard = [
        (ds.field("day") == row.day)
        & (ds.field("topic") == row.topic)
        & (ds.field("partition") == row.partition)
        & (ds.field("shard") == row.key)
        for row in rows
    ]
    return ds.FileSystemDataset.from_paths(
        [str(path) for path in paths],
        schema=OUTCOMES_SCHEMA,
        format=ds.ParquetFileFormat(),
        filesystem=LocalFileSystem(),
        partitions=of_shard,
    )


def _local(store: ObjectStore, rows: Sequence[ShardRow], folder: Path) -> list[Path]:
    """Where the sidecars lie, or were copied to.  Raises NotFound."""
    if isinstance(store, FolderStore):
        return [(store.root / sidecar_key(row.key)).resolve() for row in rows]
    paths = [folder / f"{number}.parquet" for number in range(len(rows))]
    with ThreadPoolExecutor(COPIERS, thread_name_prefix="sidecars") as pool:
        futures = [pool.submit(store.get_file, sidecar_key(row.key), path) for row, path in zip(rows, paths, strict=True)]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return paths
