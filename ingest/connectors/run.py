"""The role `connect`: every connector in turn, for ever.

  1. discover   the connector's next batch, from its cursor on
  2. append     the candidates, and dead letters of what is none
  3. append     the new cursor, with the ends of the candidates' partitions as 2 left them      <- THE COMMIT POINT

Killed after   what is left                                   who mends it
  1            nothing                                        the batch is discovered again
  2            candidates (perhaps some) without their cursor the next start reads what this connector has told beyond the recorded ends,
                                                              and does not tell it again when the batch is discovered again
  3            nothing

So nothing of a source is missed and nothing is announced twice, on a log that appends all or none and on one that does not.  Dead letters of
a batch that is discovered again may stand twice: they are reports.  A connector has one owner at a time.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator

from ingest.connectors.base import Connector, Cursor, Found, dump, load
from ingest.connectors.folder import FolderConnector
from ingest.connectors.urls import UrlsConnector
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import Corrupt, Retryable
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, SOURCE_STATE, EventLog, NewRecord
from streamlearn.contract.metrics import ConnectMetrics
from streamlearn.contract.status import Heartbeat, now

logger = logging.getLogger(__name__)
Told = tuple[str, str, str | None]
RENEW_S = 3600.0


def build(config: ConnectorConfig) -> Connector:
    kinds: dict[str, type[FolderConnector] | type[UrlsConnector]] = {"folder": FolderConnector, "urls": UrlsConnector}
    return kinds[config.kind](config)


def run_connect(config: Config, log: EventLog, metrics: ConnectMetrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    """Discover until `stop`."""
    connectors = {c.name: (c, build(c)) for c in config.connectors}
    for _, connector in connectors.values():
        connector.check()
    for topic in (CANDIDATES, DEAD_LETTERS, SOURCE_STATE):
        log.ensure_topic(topic, config.log.partitions)
    sources = {name: Source(name, connector, log, metrics) for name, (_, connector) in connectors.items()}
    due = dict.fromkeys(connectors, 0.0)
    counts = dict.fromkeys(connectors, 0)
    while not stop.is_set():
        metrics.heartbeat.set_to_current_time()
        for name, (settings, _) in connectors.items():
            if time.monotonic() < due[name] or stop.is_set():
                continue
            try:
                counts[name] += sources[name].poll(stop)
            except Retryable as e:
                logger.error("connector %s waits: %s", name, e)
            due[name] = time.monotonic() + (settings.poll_s if settings.follow else 60.0)
        heartbeat.beat(state="watching", sources=counts, candidates=sum(counts.values()))
        stop.wait(min(0.25, *(c.poll_s for c, _ in connectors.values())) if connectors else 0.5)


class Source:
    """One connector and how far it has got."""

    def __init__(self, name: str, connector: Connector, log: EventLog, metrics: ConnectMetrics):
        self.name, self.connector, self.log, self.metrics = name, connector, log, metrics
        self.cursor: Cursor | None = None
        self.ends: dict[int, int] = {}  # of the candidates' partitions, when the cursor was recorded
        self.told: set[Told] = set()  # beyond them: by an owner that died before it recorded its cursor
        self.known = False  # whether the above are as the log has them
        self.recorded = 0.0  # monotonic

    def poll(self, stop: threading.Event) -> int:
        """Append everything the connector has beyond its cursor; the number of candidates.  Raises Retryable."""
        if not self.known:
            self._resume()
        self.known = False  # until the end: whatever goes wrong in between, the log is looked at again
        appended = 0
        for found in self.connector.discover(self.cursor):
            appended += self._tell(found)
            if stop.is_set():
                break
        if time.monotonic() - self.recorded > RENEW_S:  # the ends of a quiet connector fall behind, and with them the next start
            self.ends = {p: self.log.bounds(CANDIDATES, p)[1] for p in range(self.log.partitions(CANDIDATES))}
            self._record()
        self.known = True
        return appended

    def _resume(self) -> None:
        state = load(self.log.latest(SOURCE_STATE, self.name.encode()))
        places = range(self.log.partitions(CANDIDATES))
        if state is None:  # from now on a death can be mended
            self.cursor, self.ends = None, {p: self.log.bounds(CANDIDATES, p)[1] for p in places}
            self._record()
        else:
            self.cursor, self.ends = state["cursor"], {int(p): int(end) for p, end in state["ends"].items()}
            self.recorded = time.monotonic()
        self.told = {key for p in places for key in self._told(p, self.ends.get(p, 0))}

    def _told(self, partition: int, at: int) -> Iterator[Told]:
        """What this connector has told beyond an offset; what the log has dropped since was fetched long ago."""
        at = max(at, self.log.bounds(CANDIDATES, partition)[0])
        while records := self.log.read(CANDIDATES, partition, at, 1000):
            for record in records:
                with contextlib.suppress(Corrupt):  # another producer's garbage is not ours
                    candidate = Candidate.from_json(record.value)
                    if candidate.source == self.name:
                        yield key_of(candidate)
            at = records[-1].offset + 1

    def _tell(self, found: Found) -> int:
        new = [c for c in found.candidates if key_of(c) not in self.told]
        records = [NewRecord(CANDIDATES, politeness_key(c.url), c.to_json()) for c in new]
        for where, what, why in found.refused:
            letter = {"origin": f"{self.name}: {where}", "url": what, "reason": "bad_url", "detail": why[:500], "at": now()}
            records.append(NewRecord(DEAD_LETTERS, self.name.encode(), json.dumps(letter, ensure_ascii=False).encode()))
        places = self.log.append(records) if records else []
        for (partition, offset), _ in zip(places, new, strict=False):  # the candidates come first
            self.ends[partition] = max(self.ends.get(partition, 0), offset + 1)
        self.cursor = found.cursor
        self._record()
        if found.settled is not None:
            found.settled()
        self.metrics.candidates.inc(len(new))
        self.metrics.refused.inc(len(found.refused))
        return len(new)

    def _record(self) -> None:
        state = {"cursor": self.cursor, "ends": self.ends}
        self.log.append([NewRecord(SOURCE_STATE, self.name.encode(), dump(state))])
        self.recorded = time.monotonic()


def key_of(candidate: Candidate) -> Told:
    """The same thing, told again."""
    return candidate.url, candidate.source_ref, candidate.etag
