"""What became of one image: a URL, a digest, or an offset, from the log to the weights.

Nothing is written for it: the sidecars name every offset, the recorded rounds name the shards that were learnt, the log holds what still waits.  It reads
the sidecars of all live shards and the rounds up to the one that is looked for, so it is a question for a person, not for a loop.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingest.audit import fetched_topics
from ingest.look import MAX_FOUND
from ingest.query import query
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.catalog import Catalog, ShardRow
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.event_log import DEAD_LETTERS, EventLog, SqliteLog, partition_of, place_name
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import STORED
from streamlearn.stream.rounds import Round

PLACE = re.compile(r"(?P<topic>[^/:]+)/(?P<partition>\d+)/(?P<offset>\d+)")
MANY = 1000  # records read at once
ROUNDS = "rounds/"


@dataclass(frozen=True)
class Event:
    """One thing that happened to it, or that it waits for."""

    what: str  # waits, stored, rejected, deferred, dead, …, learnt, not learnt yet
    where: str  # topic/partition/offset, or shard
    at: str = ""  # RFC 3339
    more: dict[str, Any] = field(default_factory=dict)


def trace(log: EventLog, store: ObjectStore, catalog: Catalog, name: str) -> list[Event]:
    """In the order in which it went on.  Raises NotFound where nothing knows of it."""
    rows = {row.key: row for row in catalog.rows()}
    outcomes = _outcomes(store, list(rows.values()), name)
    events = []
    for outcome in outcomes:
        row = rows[outcome["shard"]]
        events.append(_event(log, row, outcome))
        if outcome["outcome"] == STORED:
            events.append(_learnt(store, row))
    events += _waiting(log, catalog, name)
    if not events:
        raise NotFound(
            f"{name}: neither a live shard nor the log knows of it; name topic/partition/offset, a sha256 or the URL as the connector gave it. "
            "What was taken down or has expired leaves no trace here"
        )
    return events


def _outcomes(store: ObjectStore, rows: Sequence[ShardRow], name: str) -> list[dict[str, Any]]:
    """Of the thing itself, and of every retry of it, oldest first."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    todo, asked = [name], set[str]()
    while todo:
        asked.add(one := todo.pop())
        for outcome in _asked(store, rows, one):
            here = f"{outcome['topic']}/{outcome['partition']}/{outcome['offset']}"
            found[outcome["shard"], outcome["offset"]] = outcome
            todo += [place for place in (outcome["origin"], here) if place and place not in asked]
    return sorted(found.values(), key=lambda o: (o["attempt"], o["fetched_at"], o["topic"], o["offset"]))[:MAX_FOUND]


def _asked(store: ObjectStore, rows: Sequence[ShardRow], name: str) -> Iterator[dict[str, Any]]:
    place = PLACE.fullmatch(name)
    where, values = ("url = ? OR sha256 = ?", [name, name])
    if place:
        where = 'origin = ? OR (topic = ? AND partition = ? AND "offset" = ?)'
        values = [name, place["topic"], int(place["partition"]), int(place["offset"])]  # type: ignore[list-item]
    with query(store, rows, f"SELECT * FROM outcomes WHERE {where} LIMIT {MAX_FOUND}", values) as answer:
        for row in answer:
            yield dict(zip(answer.columns, row, strict=True))


def _event(log: EventLog, row: ShardRow, outcome: dict[str, Any]) -> Event:
    place = f"{row.topic}/{row.partition}/{outcome['offset']}"
    more = {k: outcome[k] for k in ("reason", "url", "source", "source_ref", "sha256", "http_status", "attempt", "origin") if outcome[k]}
    letter = log.latest(DEAD_LETTERS, place.encode()) if isinstance(log, SqliteLog) and outcome["reason"] else None
    if letter:
        more["detail"] = json.loads(letter).get("detail", "")
    return Event(outcome["outcome"], place, outcome["fetched_at"], more | {"shard": row.key, "catalog_version": row.committed})


def _learnt(store: ObjectStore, row: ShardRow) -> Event:
    """The round that took its shard as fresh, or a shard that this one stands for."""
    names, batches = {row.key, *row.replaces.split(",")}, 0
    for key in store.list(ROUNDS):
        round_ = Round.from_json(store.get(key), key)
        if any(shard.key in names for shard in round_.shards):
            more = {"round": round_.number, "first_batch": batches + 1, "last_batch": batches + round_.batches}
            return Event("learnt", row.key, "", more)  # or being learnt, where it is the newest round
        batches += round_.batches
    return Event("not learnt yet", row.key)


def _waiting(log: EventLog, catalog: Catalog, name: str) -> Iterator[Event]:
    """Records that no shard covers yet."""
    place = PLACE.fullmatch(name)
    if place is None and "://" not in name:
        return  # a digest is not known before it is fetched
    for topic in fetched_topics(log):
        number = int(place["partition"]) if place else partition_of(politeness_key(name), log.partitions(topic))
        if number >= log.partitions(topic):
            continue
        at = catalog.position(place_name(log, topic), number)
        while records := log.read(topic, number, at, MANY):
            for record in records:
                here = f"{place_name(log, topic)}/{number}/{record.offset}"
                try:
                    candidate = Candidate.from_json(record.value)
                except Corrupt:
                    continue
                if name in (candidate.url, candidate.origin, here):
                    more = {"url": candidate.url, "attempt": candidate.attempt, "not_before": candidate.not_before}
                    yield Event("waits", here, candidate.discovered_at, {k: v for k, v in more.items() if v})
            at = records[-1].offset + 1
