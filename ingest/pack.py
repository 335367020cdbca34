"""Sealing: the outcomes of contiguous offsets become one shard, exactly once.

  0. seek     to catalog.position, having recovered what steps 5 to 6 of its last unit owe (Packer.recover)
  1. fetch    spool the images to local disk in offset order; every offset ends as exactly one of
              stored, duplicate, rejected(reason), deferred, dead                      (unchanged: only of a refresh)
  2. close    the tar (its digest names it) and the sidecar, one row for every offset
  3. put      tar and sidecar, content-addressed                                         object store
  4. commit   the catalog: the shard's row, and the partition's position s -> e        <- THE COMMIT POINT
  5. append   what the sidecar decided: retries of the deferred, dead letters, takedowns of what a refresh found gone; all in one append, durable
  6. commit   the log's group offset: it says that 5 is done (the position itself is the catalog's)
  7. append   a hint to `shards`

Killed after   what is left                              who mends it
  1, 2         spool files                               the next start empties the spool; the offsets are fetched again
  3            objects that no row names                 swept by age
  4            deferred offsets without their retries    whoever takes the partition next: the group offset is behind the position, so the
                                                         sidecars between the two are read and what the log does not hold is appended
  5            a group offset that is behind             the same; it finds every retry in the log, and appends nothing
  6, 7         nothing; a missing hint costs the learner one poll

Retries follow the commit, never precede it: two owners of one partition may see different answers to one URL, and only the one whose
sidecar is committed has decided.  A zombie (an owner that was presumed dead) is fenced at 4: Fenced, drop the unit, read the position
anew.  If it comes back between 4 and 5 its retries may stand in the log twice; the second is a duplicate where it is read (Lane.seen).
A lost reply at 4 is resolved by reading back (contract/catalog.py).  A store, catalog or log that is full or out of reach (Retryable) at 3 to 7
is waited out with the unit in hand.  A spool without room (StoreFull) at 1 closes the unit before its time, which makes some; at 2 it costs the
unit, and the offsets are fetched again (fetch/lane.py).
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingest.denied import Denied, Selector
from ingest.fetch.client import Fetched, Unanswered, Unchanged
from ingest.fetch.screen import Reason, Refused
from ingest.takedown import denial
from streamlearn.contract.candidate import MAX_BYTES, REFRESH, ROOM, Candidate, politeness_key
from streamlearn.contract.catalog import Advance, Catalog, ShardRow
from streamlearn.contract.config import ShardConfig
from streamlearn.contract.errors import Corrupt, OffsetGap
from streamlearn.contract.event_log import DEAD_LETTERS, SHARDS, EventLog, NewRecord, place_name, retry_index, retry_topic
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import (
    DEAD,
    DEFERRED,
    DUPLICATE,
    REJECTED,
    STORED,
    UNCHANGED,
    Outcome,
    ShardWriter,
    read_sidecar,
    shard_key,
    sidecar_key,
    write_sidecar,
)
from streamlearn.contract.status import now

GROUP = "streamlearn-fetch"
_WITHDRAWN = {str(Reason.GONE): "gone", str(Reason.OPT_OUT): "opt-out"}
_GONE_FOR_GOOD = {404, 410}
MAX_WAITS = 1000  # a host that never has room for a candidate


@dataclass(frozen=True)
class Taken:
    """One record of the log and what became of it, before it is packed."""

    offset: int
    candidate: Candidate | None  # None: the record was no candidate
    result: Fetched | Refused | Unanswered | Unchanged | None
    again: bool = False  # a retry that stands in the log twice
    absent: bool = False  # the log holds no record of this offset, though it does of later ones


@dataclass
class Unit:
    """Contiguous offsets [start, end) of one partition, spooled."""

    topic: str
    partition: int
    start: int
    spool: Path
    opened_at: float  # monotonic, at its first record
    outcomes: list[Outcome] = field(default_factory=list)
    after: list[NewRecord] = field(default_factory=list)  # retries and dead letters, for step 5
    discovered: list[str] = field(default_factory=list)  # when, RFC 3339, each that is stored: for the metrics
    closed: tuple[str, int] | None = None  # sha256, bytes
    spooled: bool = False  # step 2 is done: nothing more is written to its disk
    committed: bool = False  # step 4 is done

    def __post_init__(self) -> None:
        self.writer = ShardWriter(self.spool)
        self.known: dict[str, str] = {}  # url -> sha256, of this unit

    @property
    def end(self) -> int:
        return self.start + len(self.outcomes)

    @property
    def sidecar(self) -> Path:
        """Where it lies until it is put."""
        return self.spool.with_suffix(".parquet")

    @property
    def closing_bytes(self) -> int:
        """Room that closing it takes at most, roughly: the end of the tar, and a sidecar of long URLs."""
        return 2**16 + 2**11 * len(self.outcomes)

    def full(self, config: ShardConfig, at: float) -> bool:
        old = at - self.opened_at >= config.max_age_s
        return self.writer.size >= config.max_bytes or len(self.outcomes) >= config.max_samples or old

    def holds(self, denied: Denied) -> bool:
        """Whether an image in it has been taken down."""
        return bool(denied) and any(o.outcome == STORED and denied.outcome(dataclasses.asdict(o)) for o in self.outcomes)

    def drop(self) -> None:
        self.writer.abort()
        self.sidecar.unlink(missing_ok=True)  # it lies there once sealing has been tried


class Packer:
    """Turns what was taken into outcomes, and units into shards."""

    def __init__(
        self,
        log: EventLog,
        store: ObjectStore,
        catalog: Catalog,
        *,
        retry_delays_s: tuple[float, ...],
        clock: Callable[[], float] = time.time,
    ):
        self.log, self.store, self.catalog = log, store, catalog
        self.retry_delays_s, self.clock = retry_delays_s, clock

    def add(self, unit: Unit, taken: Taken) -> Outcome:
        """Give the next offset of the unit its one outcome.  Raises StoreFull when the spool is; then the unit is as it was."""
        if taken.offset != unit.end:
            raise AssertionError(f"{unit.topic}/{unit.partition}: offset {taken.offset} after {unit.end - 1}: a unit is contiguous")
        candidate, result = taken.candidate, taken.result
        if taken.again:
            outcome = _plain(taken, DUPLICATE, "same_retry")
        elif taken.absent:
            outcome = _plain(taken, REJECTED, Reason.NO_RECORD)
        elif isinstance(result, Fetched) and candidate is not None:
            outcome = self._store(unit, taken.offset, candidate, result)
        elif isinstance(result, Unanswered) and candidate is not None:
            outcome = self._defer(unit, taken, candidate, result)
        elif isinstance(result, Unchanged):
            outcome = _plain(taken, UNCHANGED, "", 304)
        else:
            refused = result if isinstance(result, Refused) else Refused(Reason.BAD_RECORD, "not a candidate")
            outcome = _plain(taken, REJECTED, refused.reason, refused.http_status)
            unit.after.append(_dead_letter(self._where(unit, taken), outcome.url, refused.reason, refused.detail))
            if candidate is not None:
                unit.after += _withdrawn(candidate, outcome)
        unit.outcomes.append(outcome)
        return outcome

    def seal(self, unit: Unit) -> ShardRow:
        """Steps 2 to 7.  Raises Fenced, Retryable; after Retryable the same unit may be sealed again."""
        row = self.close(unit)
        if not unit.committed:
            self.store.put_file(row.key, unit.spool)
            self.store.put_file(sidecar_key(row.key), unit.sidecar)
            self.catalog.commit([row], [Advance(row.topic, unit.partition, unit.start, unit.end)])
            unit.committed = True
        if unit.after:
            self.log.append(unit.after)
            unit.after = []
        self.log.commit(group_of(self.log), {(unit.topic, unit.partition): unit.end})
        self.log.append([NewRecord(SHARDS, row.key.encode(), json.dumps({"key": row.key, "samples": row.num_samples}).encode())])
        unit.spool.unlink(missing_ok=True)
        unit.sidecar.unlink(missing_ok=True)
        return row

    def recover(self, topic: str, partition: int) -> int:
        """The position to go on from, once steps 5 and 6 of every unit below it are done.  Raises Retryable."""
        named = place_name(self.log, topic)
        position, done = self.catalog.position(named, partition), self.log.committed(group_of(self.log), topic, partition) or 0
        if done >= position:
            return position
        held: dict[str, set[str]] = {}
        for row in self.catalog.covering(named, partition, done, position):
            owed = self._owed(topic, row, done, held)
            if owed:
                self.log.append(owed)
        self.log.commit(group_of(self.log), {(topic, partition): position})
        return position

    def _owed(self, topic: str, row: ShardRow, done: int, held: dict[str, set[str]]) -> list[NewRecord]:
        """Retries that a committed sidecar decided from offset `done` on and the log does not hold; its dead letters.
        `held`: origins by retry topic, read when first needed: what is appended meanwhile belongs to other offsets."""
        outcomes = [o for o in read_sidecar(self.store.get(sidecar_key(row.key))).to_pylist() if o["offset"] >= done]
        for name in {o["reason"] for o in outcomes if o["outcome"] == DEFERRED} - held.keys():
            held[name] = self._held(name)
        owed = []
        for outcome in outcomes:
            place = f"{row.topic}/{row.partition}/{outcome['offset']}"
            if outcome["outcome"] == DEFERRED and (outcome["origin"] or place) not in held[outcome["reason"]]:
                index = retry_index(outcome["reason"])
                owed.append(self._retry(place, self._candidate(topic, row, outcome), index, Unanswered("")))
            if outcome["outcome"] in (REJECTED, DEAD) and outcome["reason"] != Reason.NO_RECORD:  # a report: twice is better than never
                owed.append(_dead_letter(place, outcome["url"], outcome["reason"], "told again after a crash"))
            if outcome["outcome"] == REJECTED and outcome["reason"] in _WITHDRAWN:
                owed += _withdrawn(self._candidate(topic, row, outcome), Outcome(**outcome))
        return owed

    def _held(self, topic: str) -> set[str]:
        """Origins of every retry in a topic."""
        return set().union(*(origins(self.log, topic, p, self.log.bounds(topic, p)[1]) for p in range(self.log.partitions(topic))))

    def _candidate(self, topic: str, row: ShardRow, outcome: dict[str, Any]) -> Candidate:
        """As the log has it; once the log has dropped it, as the sidecar knows it."""
        with contextlib.suppress(OffsetGap):
            (record,) = self.log.read(topic, row.partition, outcome["offset"], 1)
            return Candidate.from_json(record.value)
        known = {name: outcome[name] for name in ("url", "source", "source_ref", "license", "attempt", "origin")}
        return Candidate(discovered_at=now(), **known)

    def close(self, unit: Unit) -> ShardRow:
        """Step 2.  May be repeated."""
        if unit.closed is None:
            unit.closed = unit.writer.close()
        sha256, size = unit.closed
        if not unit.spooled:
            write_sidecar(unit.sidecar, unit.outcomes)
            unit.spooled = True
        fetched = sorted(o.fetched_at for o in unit.outcomes if o.outcome == STORED)
        day = (fetched[0] if fetched else now())[:10]
        topic = place_name(self.log, unit.topic)
        return ShardRow(
            key=shard_key(day, topic, unit.partition, unit.start, unit.end, sha256),
            sha256=sha256,
            bytes=size,
            num_samples=unit.writer.num_samples,
            topic=topic,
            partition=unit.partition,
            first_offset=unit.start,
            end_offset=unit.end,
            first_fetched_at=fetched[0] if fetched else "",
            last_fetched_at=fetched[-1] if fetched else "",
            day=day,
        )

    def _store(self, unit: Unit, offset: int, candidate: Candidate, got: Fetched) -> Outcome:
        sha256 = hashlib.sha256(got.body).hexdigest()
        taken = Taken(offset, candidate, got)
        if candidate.purpose == REFRESH and candidate.sha256 == sha256:
            return _plain(taken, DUPLICATE, "same_bytes", got.http_status)
        if unit.known.get(candidate.url) == sha256:
            return dataclasses.replace(_plain(taken, DUPLICATE, "same_url_same_bytes", got.http_status), sha256=sha256)
        fields: dict[str, Any] = {
            "url": candidate.url,
            "final_url": got.final_url,
            "fetched_at": got.fetched_at,
            "source": candidate.source,
            "source_ref": candidate.source_ref,
            "license": candidate.license or "",
            "sha256": sha256,
            "width": got.seen.width,
            "height": got.seen.height,
            "http_status": got.http_status,
            "etag": got.etag,
            "last_modified": got.last_modified,
            "attempt": candidate.attempt,
            "origin": candidate.origin,
        }
        place = {"topic": place_name(self.log, unit.topic), "partition": unit.partition, "offset": offset}
        start = unit.writer.add(offset, got.body, got.seen.ext, fields | place | ({"alt": candidate.alt} if candidate.alt else {}))
        unit.known[candidate.url] = sha256
        size = len(got.body)
        return Outcome(offset=offset, outcome=STORED, ext=got.seen.ext, bytes=size, member_offset=start, member_size=size, **fields)

    def _defer(self, unit: Unit, taken: Taken, candidate: Candidate, why: Unanswered) -> Outcome:
        """To the next retry topic, or dead after the last."""
        if (why.asked and candidate.attempt >= len(self.retry_delays_s)) or candidate.waits >= MAX_WAITS:
            unit.after.append(_dead_letter(self._where(unit, taken), candidate.url, Reason.NO_ANSWER, why.detail))
            return _plain(taken, DEAD, Reason.NO_ANSWER)
        index = self._delay(candidate, why)
        unit.after.append(self._retry(self._where(unit, taken), candidate, index, why))
        return _plain(taken, DEFERRED, retry_topic(index))

    def _delay(self, candidate: Candidate, why: Unanswered) -> int:
        """The retry topic: the next one, or the first that waits long enough.  All that is in one topic waits equally long, so its head is
        the first to be due, and nothing is parked behind a record that a server has put off for a day (unless no topic waits so long)."""
        first, last = (candidate.attempt if why.asked else 0), len(self.retry_delays_s) - 1
        return next((i for i in range(first, last) if self.retry_delays_s[i] >= why.after_s), last)

    def _where(self, unit: Unit, taken: Taken) -> str:
        """Names an offset for ever."""
        return f"{place_name(self.log, unit.topic)}/{unit.partition}/{taken.offset}"

    def _retry(self, place: str, candidate: Candidate, index: int, why: Unanswered) -> NewRecord:
        via, hops = (why.via, why.hops) if why.via or why.asked else (candidate.via, candidate.hops)  # a new attempt begins at the URL
        later = dataclasses.replace(
            candidate,
            via=via,
            hops=hops,
            attempt=candidate.attempt + why.asked,
            waits=candidate.waits + (not why.asked),
            not_before=self.clock() + (0.0 if why.via else max(self.retry_delays_s[index], why.after_s)),  # handed over: at once
            origin=candidate.origin or place,  # where it first stood in the log
        )
        return NewRecord(retry_topic(index), politeness_key(via or candidate.url), later.to_json(MAX_BYTES + ROOM))


def group_of(log: EventLog) -> str:
    """The consumer group; its offsets, too, are of one making of the topics."""
    return place_name(log, GROUP)


def origins(log: EventLog, topic: str, partition: int, end: int) -> set[str]:
    """Origins of all retries in a partition below `end`."""
    found, at = set(), log.bounds(topic, partition)[0]
    while at < end:
        records = log.read(topic, partition, at, 1000)
        if not records:
            break
        for record in records:
            with contextlib.suppress(Corrupt):
                if record.offset < end:
                    found.add(Candidate.from_json(record.value).origin)
        at = records[-1].offset + 1
    return found


def _dead_letter(place: str, url: str, reason: str, detail: str) -> NewRecord:
    body = {"origin": place, "url": url, "reason": str(reason), "detail": detail[:500], "at": now()}
    return NewRecord(DEAD_LETTERS, place.encode(), json.dumps(body, ensure_ascii=False).encode())


def _withdrawn(candidate: Candidate, outcome: Outcome) -> list[NewRecord]:
    """A refresh that finds an image gone, or not to be learnt from any more, takes down what is stored of it (the next takedown run does)."""
    gone = outcome.reason == Reason.GONE and outcome.http_status in _GONE_FOR_GOOD
    if candidate.purpose != REFRESH or not (gone or outcome.reason == Reason.OPT_OUT):
        return []
    return [denial(Selector.of("url", candidate.url), reason=_WITHDRAWN[outcome.reason], by="refresh")]


def _plain(taken: Taken, outcome: str, reason: str, status: int = 0) -> Outcome:
    c = taken.candidate
    if reason == Reason.TAKEN_DOWN:
        return Outcome(offset=taken.offset, outcome=outcome, reason=str(reason))  # not a word of what it was
    return Outcome(
        offset=taken.offset,
        outcome=outcome,
        reason=str(reason),
        url=c.url if c else "",
        source=c.source if c else "",
        source_ref=c.source_ref if c else "",
        http_status=status,
        attempt=c.attempt if c else 0,
        origin=c.origin if c else "",
    )
