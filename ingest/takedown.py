"""Takedown: what someone may not have us keep goes, from the stream, the shards and the learner's memory.

  1. append   takedowns: the selector, denied from now on (the fetcher heeds it within seconds)              event log
  2. put      every live shard that holds a match, anew without it: tar and sidecar                          object store
  3. replace  the catalog: all these rows at once                                            <- THE COMMIT POINT
  4. empty    rows of other sidecars that only tell of a match (refused, deferred): in place
  5. delete   the objects of rows that have ended and hold a match: those of 3, and those that compaction or expiry left for the grace time
  6. append   takedowns: who, when, why and how much; no content

Killed after   what is left                              who mends it
  1            a selector that is denied but not applied the next run of any takedown: it applies every selector that is not applied
  2            objects that no row names                 the next run puts the same bytes again; else swept by age
  3, 4, 5      old objects; a selector not yet applied   the next run finds them by the same matching: a sidecar is deleted after its tar, so
                                                         whatever is left can still be found
  6            nothing

The learner sees 3 when it looks at the catalog, every few seconds (stream/loader.py), and drops its copies.  If a shard is compacted between
2 and 3, 3 raises Conflict, and the run begins anew at 2.  A unit that is being sealed meanwhile may still hold a match that was fetched just
before 1 was heeded: `again=True` applies every selector once more, and is worth a run after shard.max_age_s.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingest.denied import Denied, Selector
from ingest.rewrite import Rewritten, emptied_sidecar, rewritten
from streamlearn.contract.catalog import LIVE, TAKEN_DOWN, Catalog, ShardRow
from streamlearn.contract.errors import Conflict, NotFound
from streamlearn.contract.event_log import TAKEDOWNS, EventLog, NewRecord
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from streamlearn.contract.status import now

DENIED, APPLIED = "denied", "applied"
ATTEMPTS = 5  # while others replace the same shards
logger = logging.getLogger(__name__)


@dataclass
class Done:
    """What a run did, or would do."""

    selectors: int = 0
    shards: int = 0  # rewritten
    samples: int = 0  # taken out of them
    emptied: int = 0  # rows of sidecars that tell nothing any more
    purged: int = 0  # shards whose old objects were deleted


def denial(selector: Selector, *, reason: str, by: str) -> NewRecord:
    """Step 1, for whoever appends it."""
    value = {"kind": selector.kind, "selector": selector.digest, "why": reason, "by": by, "at": now(), "state": DENIED}
    return NewRecord(TAKEDOWNS, selector.key, json.dumps(value).encode())


def takedown(
    log: EventLog,
    store: ObjectStore,
    catalog: Catalog,
    *,
    folder: Path,
    url: str | None = None,
    host: str | None = None,
    sha256: str | None = None,
    reason: str = "",
    by: str = "",
    again: bool = False,
    dry_run: bool = False,
) -> Done:
    """Take down what a url, a host with its subdomains or an image's sha256 names, and all that is denied but not applied yet.

    `folder` holds the shards that are being rewritten; `again`: every selector there ever was.  Raises ValueError, NotFound, Retryable.
    """
    given = {"url": url, "host": host, "sha256": sha256}
    selectors = [Selector.of(kind, value) for kind, value in given.items() if value is not None]
    known = {key: json.loads(value) for key, value in log.table(TAKEDOWNS).items()}
    new = [s for s in selectors if s.key not in known]
    if not dry_run:
        log.append([denial(s, reason=reason, by=by) for s in new])
        known |= {s.key: json.loads(denial(s, reason=reason, by=by).value) for s in new}
    wanted = {s.key for s in selectors} | {key for key, value in known.items() if again or value["state"] != APPLIED}
    done = Done(selectors=len(wanted))
    if wanted:
        _Run(store, catalog, Denied(wanted), folder, done, dry_run).run()
    if not dry_run and wanted:
        log.append([_applied(key, known[key], done) for key in sorted(wanted)])
    return done


def _applied(key: bytes, value: dict[str, Any], done: Done) -> NewRecord:
    """Step 6.  Counts add up over runs; those of a run with several selectors are the run's."""
    total = {name: value.get(name, 0) + getattr(done, name) for name in ("shards", "samples", "emptied", "purged")}
    return NewRecord(TAKEDOWNS, key, json.dumps(value | total | {"state": APPLIED, "applied_at": now()}).encode())


class _Run:
    """Steps 2 to 5 for a set of selectors."""

    def __init__(self, store: ObjectStore, catalog: Catalog, denied: Denied, folder: Path, done: Done, dry_run: bool):
        self.store, self.catalog, self.denied, self.folder, self.done, self.dry_run = store, catalog, denied, folder, done, dry_run
        folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        for attempt in range(ATTEMPTS):
            try:
                self._rewrite()
                break
            except (Conflict, NotFound) as e:  # compacted meanwhile: look again
                if attempt == ATTEMPTS - 1:
                    raise
                logger.info("takedown begins anew: %s", e)
        self._purge()

    def _rewrite(self) -> None:
        """Steps 2 to 4."""
        holding, telling = list[ShardRow](), list[ShardRow]()
        for row in self.catalog.rows():
            stored, told = self._matches(row.key)
            if stored:
                holding.append(row)
            elif told:
                telling.append(row)
            if self.dry_run:
                self.done.samples += stored
                self.done.emptied += stored + told
        if self.dry_run:
            self.done.shards = len(holding)
            return
        new = [self._new(row) for row in holding]
        if new:
            removed = {key: gone for n in new for key, gone in n.removed.items()}
            self.catalog.replace([r.key for r in holding], [n.row for n in new], status=TAKEN_DOWN, note="takedown", removed=removed)
        self.done.shards += len(new)
        self.done.samples += sum(len(gone) for n in new for gone in n.removed.values())
        self.done.emptied += sum(n.emptied for n in new)
        self.done.emptied += sum(emptied_sidecar(self.store, row, self.denied.outcome, self.folder) for row in telling)

    def _new(self, row: ShardRow) -> Rewritten:
        new = rewritten(self.store, [row], self.folder, self.denied.outcome)
        try:
            new.put(self.store)
        finally:
            new.unlink()
        return new

    def _matches(self, key: str) -> tuple[int, int]:
        """(stored samples, other rows) of a shard that match."""
        table = read_sidecar(self.store.get(sidecar_key(key))).select(["outcome", "url", "final_url", "sha256"])
        found = [row["outcome"] for row in table.to_pylist() if self.denied.outcome(row)]
        return found.count(STORED), len(found) - found.count(STORED)

    def _purge(self) -> None:
        """Step 5.  Objects that no row names may belong to a unit that is being sealed: they are left alone."""
        there = {key for key in self.store.list("shards/") if key.endswith(".parquet")}
        history = self.catalog.history()
        live = {row.key for row in history if row.status == LIVE}
        for row in history:
            if row.key in live or sidecar_key(row.key) not in there or not any(self._matches(row.key)):
                continue
            self.done.purged += 1
            if not self.dry_run:
                delete(self.store, [row.key])


def delete(store: ObjectStore, keys: Sequence[str]) -> None:
    """The tar first: as long as the sidecar is there, what is left of a shard can be found."""
    for key in keys:
        store.delete(key)
        store.delete(sidecar_key(key))
