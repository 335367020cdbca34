"""What must hold after the crashes, whatever happened: read with connections of its own, from the log, the store and the catalog alone."""

import hashlib
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.crash_world import PARTITIONS, TOPICS, body, kind_of
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.catalog import Catalog, ShardRow
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.event_log import CANDIDATES, EventLog
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import DEAD, DEFERRED, DUPLICATE, REJECTED, STORED, index_shard, read_sidecar, sidecar_key

MUST = {"good": STORED, "flaky": STORED, "gone": REJECTED, "garbage": REJECTED, "never": DEAD}
ENDS = (STORED, REJECTED, DEAD)
Place = tuple[str, int]


@dataclass
class Audit:
    """Counts, and the first few of what is wrong, in words."""

    wanted: int = 0  # offsets of candidates and retries
    missing: int = 0
    duplicate: int = 0
    corrupt: int = 0
    stored: int = 0
    again: int = 0  # retries that stand in the log twice
    shards: int = 0
    orphans: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return self.missing + self.duplicate + self.corrupt

    def say(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.said) < 50:
            self.said.append(f"{kind}: {what}")


@dataclass
class Books:
    """What the catalog and its sidecars say, read on from where it was read last."""

    store: ObjectStore
    catalog: Catalog
    version: int = -1
    rows: list[ShardRow] = field(default_factory=list)
    outcomes: dict[Place, dict[int, list[dict[str, Any]]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    dangling: list[str] = field(default_factory=list)

    def read(self) -> "Books":
        self.version, rows = self.catalog.follow(self.version)
        for row in rows:
            try:
                for outcome in read_sidecar(self.store.get(sidecar_key(row.key))).to_pylist():
                    self.outcomes[row.topic, row.partition][outcome["offset"]].append(outcome | {"key": row.key})
            except (NotFound, Corrupt) as e:
                self.dangling.append(f"{row.key}: {e}")
        self.rows += rows
        return self

    def ends(self) -> dict[str, list[dict[str, Any]]]:
        """How each candidate ended, by the place where it first stood."""
        found = defaultdict(list)
        for (topic, partition), by_offset in self.outcomes.items():
            for offset, outcomes in by_offset.items():
                for o in outcomes:
                    if o["outcome"] in ENDS or o["reason"] == "same_url_same_bytes":
                        found[o["origin"] or f"{topic}/{partition}/{offset}"].append(o)
        return found


def settled(log: EventLog, books: Books) -> bool:
    """Everything in the log is covered, and every candidate has ended: no retry is owed."""
    bounds = {(t, p): log.bounds(t, p)[1] for t in TOPICS for p in range(PARTITIONS)}
    if any(books.catalog.position(t, p) != end for (t, p), end in bounds.items()):
        return False
    ended = books.read().ends()
    return all(f"{CANDIDATES}/{p}/{o}" in ended for p in range(PARTITIONS) for o in range(bounds[CANDIDATES, p]))


def number(url: str) -> int:
    return int(url.rsplit("/", 1)[1].removesuffix(".jpg"))


def audit(log: EventLog, store: ObjectStore, catalog: Catalog, images: int) -> Audit:
    found, books = Audit(), Books(store, catalog).read()
    records = {(t, p): candidates(log, t, p) for t in TOPICS for p in range(PARTITIONS)}
    for what in books.dangling:
        found.say("corrupt", f"dangling row {what}")
    _offsets(found, books, records)
    _ends(found, books, records, images)
    _retries(found, books, records)
    _ranges(found, books, catalog)
    for row in books.rows:
        _shard(found, store, row, books)
    named = {row.key for row in books.rows}
    found.orphans = len(set(store.list("shards/")) - named - {sidecar_key(key) for key in named})
    found.shards = len(books.rows)
    return found


def candidates(log: EventLog, topic: str, partition: int) -> list[Candidate | None]:
    """Every record of a partition; None for one that is no candidate."""
    found: list[Candidate | None] = []
    end = log.bounds(topic, partition)[1]
    while len(found) < end:
        for record in log.read(topic, partition, len(found), 1000):
            assert record.offset == len(found)
            try:
                found.append(Candidate.from_json(record.value))
            except Corrupt:
                found.append(None)
    return found


def _offsets(found: Audit, books: Books, records: dict[Place, list[Candidate | None]]) -> None:
    """Every offset of the log in exactly one row of exactly one sidecar, and no other."""
    for (topic, partition), those in records.items():
        rows = books.outcomes[topic, partition]
        found.wanted += len(those)
        for offset, candidate in enumerate(those):
            at = f"{topic}/{partition}/{offset}"
            if not rows.get(offset):
                found.say("missing", f"offset {at}")
                continue
            for extra in rows[offset][1:]:
                found.say("duplicate", f"offset {at} also in {extra['key']}")
            outcome = rows[offset][0]
            found.outcomes[outcome["outcome"]] += 1
            found.again += outcome["reason"] == "same_retry"
            if candidate and candidate.url != outcome["url"]:
                found.say("corrupt", f"{at}: the sidecar tells of {outcome['url']}, the log of {candidate.url}")
        for offset in rows.keys() - range(len(those)):
            found.say("corrupt", f"{topic}/{partition}/{offset} is in a sidecar, and not in the log")


def _ends(found: Audit, books: Books, records: dict[Place, list[Candidate | None]], images: int) -> None:
    """Every candidate ended once, as its kind must; every image that was fed is stored."""
    ends, stored = books.ends(), Counter[int]()
    fed = Counter(number(c.url) for p in range(PARTITIONS) for c in records[CANDIDATES, p] if c)
    for p in range(PARTITIONS):
        for offset, candidate in enumerate(records[CANDIDATES, p]):
            place = f"{CANDIDATES}/{p}/{offset}"
            how = [o["outcome"] for o in ends.get(place, [])]
            must = MUST[kind_of(number(candidate.url))] if candidate else REJECTED
            if not how:
                found.say("missing", f"{place} ({candidate.url if candidate else 'no candidate'}) has not ended")
            for _ in how[1:]:
                found.say("duplicate", f"{place} ended as {how}")
            if candidate and how:
                stored[number(candidate.url)] += how.count(STORED)
                if how[0] != must and not (how[0] == DUPLICATE and fed[number(candidate.url)] > 1):
                    found.say("missing", f"{place}: {candidate.url} must be {must}, is {how[0]}")
    for n in range(images):
        if MUST[kind_of(n)] == STORED and not stored[n]:
            found.say("missing", f"image {n} is not stored; fed {fed[n]} times")
        for _ in range(stored[n] - fed[n]):
            found.say("duplicate", f"image {n} is stored {stored[n]} times, fed {fed[n]} times")
    found.stored = sum(stored.values())


def _retries(found: Audit, books: Books, records: dict[Place, list[Candidate | None]]) -> None:
    """What a sidecar deferred stands in the topic that it names, and nothing else stands there."""
    owed: dict[str, set[str]] = defaultdict(set)
    for (topic, partition), by_offset in books.outcomes.items():
        for offset, outcomes in by_offset.items():
            for o in outcomes:
                if o["outcome"] == DEFERRED:
                    owed[o["reason"]].add(o["origin"] or f"{topic}/{partition}/{offset}")
    for topic in TOPICS[1:]:
        held = {c.origin for p in range(PARTITIONS) for c in records[topic, p] if c}
        for origin in owed[topic] - held:
            found.say("missing", f"the retry of {origin} in {topic}")
        for origin in held - owed[topic]:
            found.say("duplicate", f"a retry of {origin} in {topic} that no sidecar decided")


def _ranges(found: Audit, books: Books, catalog: Catalog) -> None:
    """The shards of a partition follow one another without gap, up to the position."""
    at: Counter[Place] = Counter()
    for row in books.rows:
        place = row.topic, row.partition
        if row.first_offset != at[place]:
            found.say("corrupt", f"{row.key} begins at {row.first_offset}, the one before it ended at {at[place]}")
        at[place] = row.end_offset
    for (topic, partition), end in at.items():
        if (position := catalog.position(topic, partition)) != end:
            found.say("corrupt", f"{topic}/{partition}: the position is {position}, the last shard ends at {end}")


def _shard(found: Audit, store: ObjectStore, row: ShardRow, books: Books) -> None:
    """A tar as digested, with what its sidecar says, each image byte for byte as it is served."""
    try:
        data = store.get(row.key)
    except NotFound:
        return found.say("corrupt", f"dangling row {row.key}")
    if hashlib.sha256(data).hexdigest() != row.sha256 or len(data) != row.bytes:
        return found.say("corrupt", f"{row.key} is not as digested")
    with tempfile.NamedTemporaryFile(suffix=".tar") as f:
        f.write(data)
        f.flush()
        samples = {s.offset: s for s in index_shard(Path(f.name))}
    at = books.outcomes[row.topic, row.partition]
    rows = [o for offset in range(row.first_offset, row.end_offset) for o in at[offset] if o["key"] == row.key]
    stored = {o["offset"]: o for o in rows if o["outcome"] == STORED}
    if samples.keys() != stored.keys() or len(samples) != row.num_samples:
        return found.say("corrupt", f"{row.key}: {len(samples)} images, {len(stored)} in the sidecar, {row.num_samples} in the catalog")
    if [o["offset"] for o in rows] != list(range(row.first_offset, row.end_offset)):
        return found.say("corrupt", f"{row.key}: the sidecar has not one row for each offset of its range")
    for offset, o in stored.items():
        image = data[o["member_offset"] : o["member_offset"] + o["member_size"]]
        n = number(o["url"])
        if (samples[offset].start, samples[offset].size) != (o["member_offset"], o["member_size"]) or image != body(n):
            found.say("corrupt", f"{row.key}, offset {offset}: not the bytes of {o['url']}")
