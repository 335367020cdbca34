"""Generations and refresh: the dataset of a quarter gets a name, and its images are asked for again.

Cutting: 1. read the catalog  2. create generations/<name>.json, if absent    <- THE COMMIT POINT.  Killed after 1: nothing is left.

Refreshing a generation, shard by shard:
  1. read     the sidecars of the live rows that were there when it was cut, beyond the cursor
  2. append   candidates with purpose=refresh, validators and digest of what is stored
  3. append   the cursor, topic/partition -> offset, to source-state under refresh/<name>      <- THE COMMIT POINT, one a shard

Killed after   what is left                              who mends it
  1            nothing
  2            candidates (perhaps some) without cursor  they are appended again, and asked for twice: the second answer is as harmless as
                                                         the first
  3            nothing

The fetcher asks with If-None-Match and If-Modified-Since.  304: `unchanged`.  The same bytes: `duplicate`, same_bytes.  Other bytes: a new
sample.  404, 410 or an opt-out: `rejected`, and the url goes to `takedowns`, for the next takedown run.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamlearn.contract.candidate import REFRESH, Candidate, politeness_key
from streamlearn.contract.catalog import Catalog, ShardRow
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.event_log import CANDIDATES, SOURCE_STATE, EventLog, NewRecord
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from streamlearn.contract.status import now


@dataclass(frozen=True)
class Generation:
    """The dataset as it was at one version of the catalog."""

    name: str
    version: int
    at: str  # RFC 3339 UTC
    shards: int
    samples: int
    size: int  # bytes
    window: tuple[str, str]  # first and last fetch

    def to_json(self) -> bytes:
        return json.dumps(self.__dict__ | {"window": list(self.window)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Generation":
        try:
            raw = json.loads(data)
            return cls(**raw | {"window": (raw["window"][0], raw["window"][1])})
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise Corrupt(f"{where}: not a generation: {e}; restore it from a backup") from e


def generation_key(name: str) -> str:
    return f"generations/{name}.json"


def cut(store: ObjectStore, catalog: Catalog, *, name: str, dry_run: bool = False) -> Generation:
    """Name what is live now.  Raises ConfigError where the name is taken or there is nothing to name."""
    changes = catalog.changes(-1)
    if changes.version < 0:
        raise ConfigError("there is no dataset yet; nothing to cut")
    rows = changes.live
    fetched = sorted(t for r in rows for t in (r.first_fetched_at, r.last_fetched_at) if t)
    window = (fetched[0], fetched[-1]) if fetched else ("", "")
    made = Generation(name, changes.version, now(), len(rows), sum(r.num_samples for r in rows), sum(r.bytes for r in rows), window)
    if not dry_run and not store.put_if_absent(generation_key(name), made.to_json()):
        raise ConfigError(f"{generation_key(name)}: there is a generation of this name; choose another")
    return made


def generation(store: ObjectStore, name: str) -> Generation:
    """Raises ConfigError, Corrupt."""
    try:
        return Generation.from_json(store.get(generation_key(name)), generation_key(name))
    except NotFound:
        raise ConfigError(f"{generation_key(name)}: no generation of this name; `streamlearn dataset cut --name {name}` makes it") from None


@dataclass
class Requeued:
    shards: int = 0
    candidates: int = 0


def refresh(
    log: EventLog,
    store: ObjectStore,
    catalog: Catalog,
    *,
    name: str,
    rate: float,
    dry_run: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Requeued:
    """Re-queue the stored samples of a generation, `rate` candidates a second (0: no limit), from where the last run stopped."""
    version, done = generation(store, name).version, Requeued()
    if not dry_run:
        log.ensure_topic(SOURCE_STATE, log.partitions(CANDIDATES))  # no connector may have run here
    cursor = _cursor(log, name)
    for row in catalog.rows():
        place = f"{row.topic}/{row.partition}"
        if row.committed > version or row.end_offset <= cursor.get(place, 0):
            continue
        candidates = _candidates(store, row, cursor.get(place, 0), name)
        cursor[place] = row.end_offset
        done.shards += 1
        done.candidates += len(candidates)
        if dry_run:
            continue
        if candidates:
            log.append([NewRecord(CANDIDATES, politeness_key(c.url), c.to_json()) for c in candidates])
        log.append([NewRecord(SOURCE_STATE, _cursor_key(name), json.dumps({"cursor": cursor}).encode())])
        if rate:
            sleep(len(candidates) / rate)
    return done


def _cursor_key(name: str) -> bytes:
    return f"refresh/{name}".encode()  # no connector's name holds a slash


def _cursor(log: EventLog, name: str) -> dict[str, int]:
    try:
        state = log.latest(SOURCE_STATE, _cursor_key(name))
    except NotFound:
        return {}
    return dict(json.loads(state)["cursor"]) if state else {}


def _candidates(store: ObjectStore, row: ShardRow, beyond: int, name: str) -> list[Candidate]:
    """What is stored of a shard from offset `beyond` on."""
    found = read_sidecar(store.get(sidecar_key(row.key))).to_pylist() if row.num_samples else []
    return [_candidate(o, name) for o in found if o["outcome"] == STORED and o["offset"] >= beyond]


def _candidate(stored: Mapping[str, Any], name: str) -> Candidate:
    return Candidate(
        url=stored["url"],
        source=stored["source"],
        source_ref=f"refresh/{name}",
        discovered_at=now(),
        license=stored["license"] or None,
        purpose=REFRESH,
        etag=stored["etag"] or None,
        last_modified=stored["last_modified"] or None,
        sha256=stored["sha256"],
    )
