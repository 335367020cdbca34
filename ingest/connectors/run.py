"""The role `connect`: every connector in a thread of its own (worker.py), for ever, as the book says (book.py).  Of each one, in turn:

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

The role waits while the log can be neither read nor written (brokers, a full disk), says so as the others do, and goes on by itself.  What a
connector waits for at its source is the connector's own (`retrying`), and no other's.
"""

import contextlib
import functools
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ingest.connectors import book
from ingest.connectors.base import Answers, Connector, Cursor, Found, dump, load
from ingest.connectors.configure import build
from ingest.connectors.worker import Workers
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import ConfigError, Corrupt, Retryable
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, DEAD_LETTERS, SOURCE_STATE, EventLog, NewRecord
from streamlearn.contract.metrics import ANSWERED, CONNECTOR_STATES, ConnectMetrics, set_waiting
from streamlearn.contract.status import Heartbeat, now
from streamlearn.contract.waits import Waits

if TYPE_CHECKING:
    from ingest.api import Server

__all__ = ["Source", "build", "run_connect"]
logger = logging.getLogger(__name__)
Told = tuple[str, str, str | None]
RENEW_S = 3600.0
ROUND_S = 0.25  # between looks at the book
BOOK, RECOVER, ANNOUNCE = "book", "recover", "announce"  # steps that may have to wait for the log
END_S = 10.0  # for the threads to finish the batch at hand; one that is killed in it is mended at the next start


def run_connect(
    config: Config, log: EventLog, metrics: ConnectMetrics, heartbeat: Heartbeat, stop: threading.Event, *, token: str = ""
) -> None:
    """Discover until `stop`.  `token`: what the REST API asks for; empty: nothing.  Raises ConfigError for a port that is taken."""
    for topic in (CANDIDATES, DEAD_LETTERS, SOURCE_STATE, CONNECTOR_CONFIGS):
        log.ensure_topic(topic, config.log.partitions)

    def open_source(entry: book.Entry) -> Source:
        connector = build(entry.config)
        if isinstance(connector, Answers):
            connector.answered = functools.partial(_answered, metrics)
        try:
            connector.check()
            log.ensure_topic(entry.config.dead_letter_topic, config.log.partitions)
        except BaseException:
            connector.close()
            raise
        return Source(entry.config.name, connector, log, metrics, errors=entry.config, waits=waits)

    waits, wanted = Waits("connect"), dict[str, book.Entry]()
    workers = Workers(open_source, metrics.failures.inc)
    api = _serve(config, log, workers, metrics, token)
    try:
        while not stop.is_set():
            metrics.heartbeat.set_to_current_time()
            try:
                wanted = book.entries(config, log)
            except Retryable as e:  # they go on as they were told last
                waits.out(BOOK, e)
                pause_s = e.after_s
            else:
                waits.over(BOOK)
                workers.follow(wanted)
                pause_s = ROUND_S
            _tell_state(workers.states(wanted), waits, metrics, heartbeat)
            stop.wait(pause_s)
    finally:
        if api is not None:
            api.close()
        workers.end(END_S)


def _serve(config: Config, log: EventLog, workers: Workers, metrics: ConnectMetrics, token: str) -> "Server | None":
    if not config.connect.rest_port:
        return None
    from ingest.api import Api, serve

    return serve(Api(config, log, workers, token=token), config.connect, metrics)


def _answered(metrics: ConnectMetrics, status: int, seconds: float) -> None:
    code = f"{status // 100}xx"
    metrics.pushes.labels(code if code in ANSWERED else "5xx").inc()  # whatever a plugin says: the set is closed
    metrics.push_seconds.observe(seconds)


def _tell_state(states: dict[str, dict[str, object]], waits: Waits, metrics: ConnectMetrics, heartbeat: Heartbeat) -> None:
    for name, status in states.items():
        if status["state"] == book.PAUSED:
            waits.gone(f"{RECOVER} {name}")  # it does not try
            waits.gone(f"{ANNOUNCE} {name}")
    told = waits.told()
    set_waiting(metrics.waiting, told["waiting_on"], told["waiting_s"])
    for state in CONNECTOR_STATES:
        metrics.connectors.labels(state).set(sum(status["state"] == state for status in states.values()))
    counts = {name: int(str(status["candidates"])) for name, status in states.items()}
    state = "waiting" if told["waiting"] else "watching"
    heartbeat.beat(state=state, sources=counts, connectors=states, candidates=sum(counts.values()), **told)


class Source:
    """One connector and how far it has got."""

    def __init__(
        self,
        name: str,
        connector: Connector,
        log: EventLog,
        metrics: ConnectMetrics,
        *,
        errors: ConnectorConfig | None = None,
        waits: Waits | None = None,
    ):
        self.name, self.connector, self.log, self.metrics = name, connector, log, metrics
        self.waits = waits or Waits("connect")
        self.errors = errors or ConnectorConfig.of(name, "any")  # what becomes of refused entries
        self.appended = 0  # candidates
        self.cursor: Cursor | None = None
        self.ends: dict[int, int] = {}  # of the candidates' partitions, when the cursor was recorded
        self.told: set[Told] = set()  # beyond them: by an owner that died before it recorded its cursor
        self.known = False  # whether the above are as the log has them
        self.recorded = 0.0  # monotonic

    def poll(self, stop: threading.Event) -> int:
        """Append everything the connector has beyond its cursor; the number of candidates.  Raises Retryable."""
        if not self.known:
            with self._on_log(RECOVER):
                self._resume()
        self.known = False  # until the end: whatever goes wrong in between, the log is looked at again
        appended = 0
        for found in self.connector.discover(self.cursor):
            appended += self._tell(found)
            if stop.is_set():
                break
        if time.monotonic() - self.recorded > RENEW_S:  # the ends of a quiet connector fall behind, and with them the next start
            with self._on_log(ANNOUNCE):
                self.ends = {p: self.log.bounds(CANDIDATES, p)[1] for p in range(self.log.partitions(CANDIDATES))}
                self._record()
        self.known = True
        return appended

    def close(self) -> None:
        self.waits.gone(f"{RECOVER} {self.name}")
        self.waits.gone(f"{ANNOUNCE} {self.name}")
        self.connector.close()

    @contextlib.contextmanager
    def _on_log(self, step: str) -> Iterator[None]:
        """What fails in here is the log, and the role says so; what fails elsewhere is the connector's source."""
        what = f"{step} {self.name}"
        try:
            yield
        except Retryable as e:
            self.waits.out(what, e)
            raise
        self.waits.over(what)

    def _resume(self) -> None:
        state = load(self.name, self.log.latest(SOURCE_STATE, self.name.encode()))
        places = range(self.log.partitions(CANDIDATES))
        if state is None:  # from now on a death can be mended
            self.cursor, self.ends = None, {p: self.log.bounds(CANDIDATES, p)[1] for p in places}
            self._record()
        else:
            self.cursor, self.ends = state
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
        self._judge(found)
        new = [c for c in found.candidates if key_of(c) not in self.told]
        records = [NewRecord(CANDIDATES, politeness_key(c.url), c.to_json()) for c in new]
        for where, what, why in found.refused:
            letter = {"origin": f"{self.name}: {where[:1000]}", "url": what[:2000], "reason": "bad_url", "detail": why[:500], "at": now()}
            text = json.dumps(letter, ensure_ascii=False).encode("utf-8", "replace")  # a file's name, and so on, may be no text
            records.append(NewRecord(self.errors.dead_letter_topic, self.name.encode(), text))
        with self._on_log(ANNOUNCE):
            places = self.log.append(records) if records else []
            for (partition, offset), _ in zip(places, new, strict=False):  # the candidates come first
                self.ends[partition] = max(self.ends.get(partition, 0), offset + 1)
            self.cursor = found.cursor
            self._record()
        self.appended += len(new)
        if found.settled is not None:
            found.settled()
        self.metrics.candidates.inc(len(new))
        self.metrics.refused.inc(len(found.refused))
        return len(new)

    def _judge(self, found: Found) -> None:
        """Raises ConfigError for a refused entry where none is tolerated: before anything of its batch is appended."""
        for where, what, why in found.refused if self.errors.errors_log else []:
            logger.warning("connector %s refuses %s: %r: %s", self.name, where, what[:200], why)
        if found.refused and self.errors.errors_tolerance == "none":
            where, what, why = found.refused[0]
            raise ConfigError(
                f"connector {self.name}: {where}: {what[:200]!r}: {why}; errors_tolerance = 'none': mend the source and restart, or set 'all'"
            )

    def _record(self) -> None:
        state = {"cursor": self.cursor, "ends": self.ends}
        self.log.append([NewRecord(SOURCE_STATE, self.name.encode(), dump(state))])
        self.recorded = time.monotonic()


def key_of(candidate: Candidate) -> Told:
    """The same thing, told again."""
    return candidate.url, candidate.source_ref, candidate.etag
