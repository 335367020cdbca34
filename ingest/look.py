"""What the dataset holds: in short, by generation, and one shard or sample of it."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from ingest.audit import Partition
from ingest.query import query, within
from streamlearn.contract.catalog import ShardRow
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import REJECTED, STORED

RECENT_DAYS = 7
MAX_FOUND = 20  # samples of one URL or digest
_PLACE = re.compile(r"(?P<topic>[^/]+)/(?P<partition>\d+)/(?P<offset>\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def overview(store: ObjectStore, rows: Sequence[ShardRow], partitions: Sequence[Partition], since: str = "") -> dict[str, Any]:
    """The dataset in numbers; outcomes and sources of the days from `since` on (YYYY-MM-DD; empty: the last RECENT_DAYS that it has)."""
    days = sorted({row.day for row in rows})
    if days and not since:
        since = (date.fromisoformat(days[-1]) - timedelta(days=RECENT_DAYS - 1)).isoformat()
    recent = within(rows, since)
    fetched = [row for row in rows if row.first_fetched_at]
    newest = max((row.last_fetched_at for row in fetched), default="")
    return {
        "shards": len(rows),
        "samples": sum(row.num_samples for row in rows),
        "bytes": sum(row.bytes for row in rows),
        "days": [days[0], days[-1]] if days else [],
        "window_days": (date.fromisoformat(days[-1]) - date.fromisoformat(days[0])).days + 1 if days else 0,
        "oldest": min((row.first_fetched_at for row in fetched), default=""),
        "newest": newest,
        "freshness_s": (datetime.now(UTC) - datetime.fromisoformat(newest)).total_seconds() if newest else None,
        "since": since,
        **_counts(store, recent),
        "partitions": [asdict(p) | {"lag": p.lag, "owed": p.owed} for p in partitions],
    }


def _counts(store: ObjectStore, rows: Sequence[ShardRow]) -> dict[str, dict[str, int]]:
    """Outcomes by kind, rejected by reason, stored by source."""
    outcomes, rejected, sources = Counter[str](), Counter[str](), Counter[str]()
    with query(store, rows, "SELECT outcome, reason, source, count(*) FROM outcomes GROUP BY ALL") as answer:
        for outcome, reason, source, count in answer:
            outcomes[outcome] += count
            rejected[reason] += count if outcome == REJECTED else 0
            sources[source] += count if outcome == STORED else 0
    return {
        "outcomes": dict(outcomes.most_common()),
        "rejected": dict((+rejected).most_common()),
        "sources": dict((+sources).most_common()),
    }


def generations(history: Sequence[ShardRow]) -> list[dict[str, Any]]:
    """By name: the version that first and last added to each, its live shards and their samples."""
    found: dict[str, dict[str, Any]] = {}
    for row in history:
        if row.generation:
            entry = found.setdefault(row.generation, {"generation": row.generation, "version": row.committed, "shards": 0, "samples": 0})
            entry["version"] = max(entry["version"], row.committed)
            if row.status == "live":
                entry["shards"] += 1
                entry["samples"] += row.num_samples
    return [found[name] for name in sorted(found)]


@dataclass(frozen=True)
class Sample:
    """One offset: the shard that covers it, and what became of it there."""

    row: ShardRow
    outcome: Mapping[str, Any]  # as `outcomes` of ingest/query.py has it

    @property
    def name(self) -> str:
        return f"{self.row.topic}/{self.row.partition}/{self.outcome['offset']}"


def find_shard(rows: Sequence[ShardRow], key: str) -> ShardRow:
    """Raises NotFound."""
    for row in rows:
        if row.key == key:
            return row
    raise NotFound(f"{key}: the catalog has no such shard; `streamlearn dataset query 'SELECT key FROM shards'` lists them")


def find_samples(store: ObjectStore, rows: Sequence[ShardRow], name: str) -> list[Sample]:
    """By topic/partition/offset, sha256 or URL, newest first, at most MAX_FOUND.  Raises NotFound."""
    place = _PLACE.fullmatch(name)
    which: str
    value: int | str
    if place and "://" not in name:
        offset = int(place["offset"])
        rows = [row for row in rows if (row.topic, row.partition) == (place["topic"], int(place["partition"]))]
        rows = [row for row in rows if row.first_offset <= offset < row.end_offset]
        which, value = '"offset"', offset  # a word of SQL, hence the quotes
    else:
        which, value = ("sha256" if _SHA256.fullmatch(name) else "url"), name
    sql = f'SELECT * FROM outcomes WHERE {which} = ? ORDER BY fetched_at DESC, shard, "offset" LIMIT {MAX_FOUND}'
    by_key = {row.key: row for row in rows}
    with query(store, rows, sql, [value]) as answer:
        found = [dict(zip(answer.columns, values, strict=True)) for values in answer]
    if not found:
        raise NotFound(f"{name}: no live shard covers it; a sample is named by topic/partition/offset, by its sha256 or by its URL")
    return [Sample(by_key[outcome["shard"]], outcome) for outcome in found]


def image_of(store: ObjectStore, sample: Sample) -> bytes:
    """The bytes as fetched.  Raises NotFound where the offset did not end as stored, Corrupt where they are not what was fetched."""
    outcome = sample.outcome
    if outcome["outcome"] != STORED:
        raise NotFound(f"{sample.name}: ended as {outcome['outcome']} ({outcome['reason']}): there is no image")
    data = store.get_range(sample.row.key, outcome["member_offset"], outcome["member_size"])
    if hashlib.sha256(data).hexdigest() != outcome["sha256"]:
        raise Corrupt(f"{sample.name}: the bytes in {sample.row.key} have another sha256; `streamlearn dataset verify --deep` tells more")
    return data
