"""Draining for maintenance: nothing new is taken in, and what is there is fetched and learnt.

  1. note     HOME/drain.json: the connectors that run
  2. pause    each of them: an order in the event log, obeyed once read, and kept over restarts       <- from here on nothing comes in
  3. wait     until every candidate, and every retry that is due, is in a shard, and every shard is learnt
  4. end      the loop, whose learner checkpoints as it ends                                          (embedded)

Killed or out of time after 2 it may be given again: what was noted stays noted.  `streamlearn drain --end` starts those connectors again and forgets
the note.  Retries that are not due yet stay in the log, and are made when the fetchers are back.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ingest.audit import fetched_topics
from ingest.connectors import book
from streamlearn.contract import durable
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.event_log import CANDIDATES, EventLog, place_name

NOTE = "drain.json"
MANY = 1000  # records read at once


@dataclass(frozen=True)
class Left:
    """What is between the sources and the weights."""

    candidates: int  # records that no shard covers yet
    due: int  # of retries, likewise
    later: int  # retries that are not due yet
    shards: int  # with images that are not learnt yet
    images: int  # at most: of a shard that is partly learnt, all

    @property
    def nothing(self) -> bool:
        return not (self.candidates or self.due or self.shards)

    def __str__(self) -> str:
        waits = f", {self.later} retries wait for their time" if self.later else ""
        return (
            f"{self.candidates} candidates and {self.due} due retries to fetch, {self.shards} shards ({self.images} images) to learn{waits}"
        )


def left(log: EventLog, catalog: Catalog, cursor: Mapping[str, int], clock: Callable[[], float] = time.time) -> Left:
    """`cursor`: the learner's.  Raises Retryable."""
    candidates = due = later = 0
    for topic in fetched_topics(log):
        for partition in range(log.partitions(topic)):
            at, end = catalog.position(place_name(log, topic), partition), log.bounds(topic, partition)[1]
            if topic == CANDIDATES:
                candidates += max(0, end - at)
            elif at < end:
                ready = _due(log, topic, partition, at, clock())
                due, later = due + ready, later + end - at - ready
    unlearnt = [row for row in catalog.rows() if row.num_samples and row.end_offset > cursor.get(f"{row.topic}/{row.partition}", 0)]
    return Left(candidates, due, later, len(unlearnt), sum(row.num_samples for row in unlearnt))


def _due(log: EventLog, topic: str, partition: int, at: int, moment: float) -> int:
    """Retries from an offset on whose time has come: all that wait in one topic wait equally long, so it ends with the first that is not due."""
    count = 0
    while records := log.read(topic, partition, at, MANY):
        for record in records:
            if _time(record.value) > moment:
                return count
            count += 1
        at = records[-1].offset + 1
    return count


def _time(value: bytes) -> float:
    """When it may be tried; what is no candidate has no time, and is rejected as it is read."""
    try:
        return Candidate.from_json(value).not_before or 0.0
    except Corrupt:
        return 0.0


def pause(config: Config, log: EventLog, home: Path) -> list[str]:
    """Steps 1 and 2; the names of those that ran."""
    names = sorted({*noted(home), *(name for name, entry in book.entries(config, log).items() if entry.target == book.RUNNING)})
    durable.write(home / NOTE, json.dumps({"paused": names}).encode())
    for name in names:
        book.aim(config, log, name, book.PAUSED)
    return names


def end(config: Config, log: EventLog, home: Path) -> list[str]:
    """Start again what `pause` paused; the names."""
    names = []
    for name in noted(home):
        try:
            book.aim(config, log, name, book.RUNNING)
            names.append(name)
        except NotFound:
            continue  # deleted meanwhile
    (home / NOTE).unlink(missing_ok=True)
    return names


def noted(home: Path) -> list[str]:
    try:
        found: list[str] = json.loads((home / NOTE).read_text())["paused"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError) as e:
        raise Corrupt(
            f"{home / NOTE}: not a note of `streamlearn drain`: {e}; delete it, and `streamlearn connectors resume` each by hand"
        ) from e
    return found
