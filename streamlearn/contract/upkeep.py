"""What keeps the catalog's table durable and quick.

Every commit adds one small parquet file, and a reader opens each: after 1,400 commits the rows took 2 s to read, from three merged files 8 ms.
So whichever writer's commit crosses a multiple of TIDY_EVERY versions tidies up:

  1. read     the rows that changed since the last multiple of TIER versions
  2. write    one parquet file with them all
  3. put      _delta_log/<version>.json, if absent, which puts that file in the place of theirs   <- THE COMMIT POINT
  4. after    a checkpoint of the log; every VACUUM_EVERY versions, what no version of the last week names is removed

Killed after 2 it leaves a file that no version names, for the next vacuum.  Any other commit between 1 and 3 wins: the merging is tried again,
or left to the next multiple.  The commit that made it due stands whatever becomes of it.

Not delta-rs's own `optimize`: 1.6 rebases it over whatever was committed since, another optimize included, and rows are there twice
(tests/contract/test_upkeep.py finds it on S3 with three writers).
"""

import json
import logging
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, QueryBuilder, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from streamlearn.contract import durable

TIDY_EVERY, VACUUM_EVERY = 100, 1000  # versions
TIER = 10_000  # versions of a merged file: to write its 3 MB again every hundred commits is nothing, and ten million shards are a thousand files
ATTEMPTS = 3
logger = logging.getLogger("streamlearn")


def secure(uri: str, first: int, last: int) -> None:
    """Make versions first..last of a table in a folder survive power loss: delta-rs renames without syncing."""
    if "://" in uri:
        return  # an object store has them before it answers
    for version in range(first, last + 1):
        entry = Path(uri) / "_delta_log" / f"{version:020d}.json"
        actions = [json.loads(line) for line in entry.read_text().splitlines()]
        for path in (unquote(action["add"]["path"]) for action in actions if "add" in action):
            durable.sync(Path(uri) / path)
        durable.sync(entry)


def tidy(table: DeltaTable, since: int) -> None:
    """Whatever is due now that the table has gone on from version `since`."""
    now = table.version()
    if since // TIDY_EVERY == now // TIDY_EVERY:
        return
    try:
        _merge(table)
        if since // VACUUM_EVERY != now // VACUUM_EVERY:
            table.vacuum(dry_run=False, full=True)
        table.update_incremental()
        secure(table.table_uri.removeprefix("file://"), now + 1, table.version())
        table.create_checkpoint()
    except (DeltaError, OSError, pa.ArrowException) as e:  # full, out of reach, or another was first
        logger.warning("%s: not tidied at version %d, the next will do: %s", table.table_uri, now, str(e).partition("\n")[0])


def _merge(table: DeltaTable) -> None:
    """Steps 1 to 3."""
    for attempt in range(ATTEMPTS):
        newest = f"changed > {table.version() // TIER * TIER}"
        rows = read(table, f"SELECT * FROM shards WHERE {newest}")
        try:
            write_deltalake(
                table, rows, mode="overwrite", predicate=newest, commit_properties=CommitProperties(max_commit_retries=0)
            )  # no retries inside: each would rest on rows that are no longer the newest
            return
        except CommitFailedError:
            if attempt == ATTEMPTS - 1:
                raise
            table.update_incremental()


def read(table: DeltaTable, sql: str) -> pa.Table:
    """What the table called `shards` answers.

    Not by to_pyarrow_table: its threads abort the interpreter at exit (pyarrow dataset over delta-rs's file system); nor by delta-rs's own
    read_all: it keeps the interpreter lock while it waits for S3; pyarrow lets go of it.
    """
    return pa.RecordBatchReader.from_stream(QueryBuilder().register("shards", table).execute(sql)).read_all()
