"""The role `connect`: every connector in turn, for ever.

  1. discover   the connector's next batch, from its cursor on
  2. append     candidates, dead letters of what is none, and the new cursor, in one append        <- THE COMMIT POINT

Killed before 2: nothing was said; the batch is discovered again.  Killed after 2: cursor and candidates are there together.  So nothing of a
source is missed and nothing is announced twice.
"""

import json
import logging
import threading
import time

from ingest.connectors.base import Connector, Found, dump, load
from ingest.connectors.folder import FolderConnector
from ingest.connectors.urls import UrlsConnector
from streamlearn.contract.candidate import politeness_key
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import Retryable
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, SOURCE_STATE, EventLog, NewRecord
from streamlearn.contract.metrics import ConnectMetrics
from streamlearn.contract.status import Heartbeat, now

logger = logging.getLogger(__name__)


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
    due = dict.fromkeys(connectors, 0.0)
    counts = dict.fromkeys(connectors, 0)
    while not stop.is_set():
        metrics.heartbeat.set_to_current_time()
        for name, (settings, connector) in connectors.items():
            if time.monotonic() < due[name] or stop.is_set():
                continue
            try:
                counts[name] += poll(name, connector, log, metrics, stop)
            except Retryable as e:
                logger.error("connector %s waits: %s", name, e)
            due[name] = time.monotonic() + (settings.poll_s if settings.follow else 60.0)
        heartbeat.beat(state="watching", sources=counts, candidates=sum(counts.values()))
        stop.wait(min(0.25, *(c.poll_s for c, _ in connectors.values())) if connectors else 0.5)


def poll(name: str, connector: Connector, log: EventLog, metrics: ConnectMetrics, stop: threading.Event) -> int:
    """Append everything a connector has beyond its cursor; the number of candidates."""
    appended = 0
    for found in connector.discover(load(log.latest(SOURCE_STATE, name.encode()))):
        log.append(records(name, found))
        appended += len(found.candidates)
        metrics.candidates.inc(len(found.candidates))
        metrics.refused.inc(len(found.refused))
        if stop.is_set():
            break
    return appended


def records(name: str, found: Found) -> list[NewRecord]:
    new = [NewRecord(CANDIDATES, politeness_key(c.url), c.to_json()) for c in found.candidates]
    for where, what, why in found.refused:
        letter = {"origin": f"{name}: {where}", "url": what, "reason": "bad_url", "detail": why[:500], "at": now()}
        new.append(NewRecord(DEAD_LETTERS, name.encode(), json.dumps(letter, ensure_ascii=False).encode()))
    return [*new, NewRecord(SOURCE_STATE, name.encode(), dump(found.cursor))]
