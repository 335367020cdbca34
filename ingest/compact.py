"""Compaction: small shards that are neighbours become one, so that a slow stream does not leave the learner a million little files.

  1. put      the merged tar and sidecar; their names follow from the old shards alone                       object store
  2. replace  the old rows by the new one, which holds the same samples in the same order    <- THE COMMIT POINT
  3. delete   the old objects, `grace` later (expire.purge): learners may be reading them

Killed after   what is left                              who mends it
  1            objects that no row names                 the next run makes the very same; else swept by age
  2            old objects beside the new                purge

Neighbours are rows of one partition whose offset ranges meet and whose images were fetched on the same day, so that a shard expires as a
whole and no later than its parts would.  Another compactor, a takedown or an expiry that comes first wins (Conflict): that merger is left out.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ingest.rewrite import rewritten
from streamlearn.contract.catalog import Catalog, ShardRow
from streamlearn.contract.errors import Conflict, NotFound
from streamlearn.contract.object_store import ObjectStore

logger = logging.getLogger(__name__)


@dataclass
class Compacted:
    shards: int = 0  # made
    merged: int = 0  # that they replace
    bytes: int = 0  # of the new ones
    lost: int = 0  # mergers that others came before


def mergers(rows: Sequence[ShardRow], *, max_bytes: int) -> Iterator[list[ShardRow]]:
    """Runs of neighbours, each under a quarter of `max_bytes`, that fit into one shard of `max_bytes`; in offset order, from the left."""
    ordered = sorted(rows, key=lambda r: (r.topic, r.partition, r.first_offset))
    for _, group in groupby(ordered, key=lambda r: (r.topic, r.partition)):
        run = list[ShardRow]()
        for row in group:
            small = row.bytes * 4 <= max_bytes
            joins = run and run[-1].end_offset == row.first_offset and run[-1].day == row.day
            if joins and small and sum(r.bytes for r in run) + row.bytes <= max_bytes:
                run.append(row)
                continue
            if len(run) > 1:
                yield run
            run = [row] if small else []
        if len(run) > 1:
            yield run


def compact(store: ObjectStore, catalog: Catalog, *, folder: Path, max_bytes: int, dry_run: bool = False) -> Compacted:
    """Merge what is small.  `folder` holds the shards that are being written.  Raises StoreFull, Corrupt, Retryable."""
    folder.mkdir(parents=True, exist_ok=True)
    done = Compacted()
    for run in mergers(catalog.rows(), max_bytes=max_bytes):
        if not dry_run and not _merge(store, catalog, run, folder, done):
            continue
        done.shards += 1
        done.merged += len(run)
    return done


def _merge(store: ObjectStore, catalog: Catalog, run: Sequence[ShardRow], folder: Path, done: Compacted) -> bool:
    try:
        new = rewritten(store, run, folder)
        try:
            new.put(store)
        finally:
            new.unlink()
        catalog.replace([r.key for r in run], [new.row], note="compaction")
    except (Conflict, NotFound) as e:  # taken down or expired since we looked
        logger.info("not merged: %s", e)
        done.lost += 1
        return False
    done.bytes += new.row.bytes
    return True
