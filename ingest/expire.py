"""Expiry and purging: what is older than the window ends, and what has ended is deleted.

  1. replace  up to BATCH rows become `expired`, without successor                          <- THE COMMIT POINT, one a batch
  2. delete   objects of rows that ended more than `grace` ago: tar, then sidecar                            object store

Killed after   what is left                              who mends it
  1            old objects                               purge
  2            a sidecar without its tar, or neither     purge: it looks at what is in the store

The catalog keeps the rows, so coverage stays whole: the learner passes over what expired above its cursor, and counts it as unseen.
Objects of what was taken down know no grace.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ingest.takedown import delete
from streamlearn.contract.catalog import EXPIRED, LIVE, TAKEN_DOWN, Catalog
from streamlearn.contract.errors import Conflict
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import sidecar_key

BATCH = 500  # rows in one commit
logger = logging.getLogger(__name__)


@dataclass
class Ended:
    shards: int = 0
    samples: int = 0
    bytes: int = 0


def expire(catalog: Catalog, *, window: timedelta, at: datetime, dry_run: bool = False) -> Ended:
    """End every row whose last image was fetched before `at` - `window`; of one without images its day counts."""
    before, done = _stamp(at - window), Ended()
    old = [r for r in catalog.rows() if (r.last_fetched_at or r.day) < before]
    for first in range(0, len(old), BATCH):
        batch = old[first : first + BATCH]
        if not dry_run:
            try:
                catalog.replace([r.key for r in batch], [], status=EXPIRED, note=f"fetched before {before}")
            except Conflict as e:  # rewritten since we looked: the next run sees the new row
                logger.info("not expired: %s", e)
                continue
        done.shards += len(batch)
        done.samples += sum(r.num_samples for r in batch)
        done.bytes += sum(r.bytes for r in batch)
    return done


def purge(store: ObjectStore, catalog: Catalog, *, grace: timedelta, at: datetime, dry_run: bool = False) -> Ended:
    """Delete the objects of rows that ended before `at` - `grace`, of rows that were taken down at once."""
    before, done = _stamp(at - grace), Ended()
    there = set(store.list("shards/"))  # before the rows: whatever a row says afterwards is younger than the list
    history = catalog.history()
    live = {row.key for row in history if row.status == LIVE}
    for row in history:
        over = row.status == TAKEN_DOWN or (row.status != LIVE and row.ended_at < before)
        if not over or row.key in live or not there & {row.key, sidecar_key(row.key)}:
            continue
        done.shards += 1
        done.samples += row.num_samples
        done.bytes += row.bytes
        if not dry_run:
            delete(store, [row.key])
    return done


def _stamp(at: datetime) -> str:
    """As rows write it: RFC 3339 UTC, so that text compares as time."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
