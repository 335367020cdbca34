"""What the tests of the connectors share: a log that dies, a runner, and patience."""

import threading
import time

from prometheus_client import CollectorRegistry

from ingest.connectors import base
from ingest.connectors.run import Source
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.errors import Retryable
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, SOURCE_STATE, SqliteLog
from streamlearn.contract.metrics import ConnectMetrics


class Killed(BaseException): ...


class DyingLog(SqliteLog):
    """Dies before the n-th append, after it, or half way through it, as one on Kafka may."""

    countdown, when, appends = -1, "before", 0

    def append(self, records):
        self.countdown -= 1
        self.appends += 1
        if self.countdown == 0 and self.when == "before":
            raise Killed
        if self.countdown == 0 and self.when == "half way":
            records = records[: len(records) // 2]
        done = super().append(records)
        if self.countdown == 0:
            raise Killed
        return done


def make_log(folder):
    log = DyingLog(folder / "log.sqlite")
    for topic in (CANDIDATES, DEAD_LETTERS, SOURCE_STATE):
        log.ensure_topic(topic, 2)
    return log


def go(log, connector):
    """One poll of a runner that has just been started."""
    return Source("c", connector, log, ConnectMetrics(CollectorRegistry())).poll(threading.Event())


def go_until(log, connector, condition, seconds=120):
    """Polls, through whatever passes, until the condition holds."""
    source, deadline = Source("c", connector, log, ConnectMetrics(CollectorRegistry())), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s; announced: {len(urls(log))}"
        try:
            source.poll(threading.Event())
        except Retryable:
            time.sleep(0.02)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


def announced(log, topic=CANDIDATES):
    return [r for p in range(2) for r in log.read(topic, p, 0, 10**6)]


def candidates(log):
    return [Candidate.from_json(r.value) for r in announced(log)]


def urls(log):
    return sorted(c.url for c in candidates(log))


def letters(log):
    return [r.value.decode() for r in announced(log, DEAD_LETTERS)]


def cursor(log):
    return base.load("c", log.latest(SOURCE_STATE, b"c"))[0]
