"""Whose hosts they are, and what of them outlives whoever asked."""

import json
import math
import threading
import time

import pytest
from prometheus_client import CollectorRegistry

from ingest.fetch.hosts import Hosts
from ingest.fetch.run import run_fetch
from ingest.fetch.tenure import Tenure, records
from streamlearn.contract.errors import Retryable
from streamlearn.contract.event_log import CANDIDATES, HOSTS, NewRecord, SqliteLog, partition_of
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.status import Heartbeat
from tests.crash.sealing import feed
from tests.ingest.server import Place, Site, serving
from tests.ingest.test_hosts import config

TOPICS = (CANDIDATES, "retry.0")


class Troubled(SqliteLog):
    """Brokers that do not take, or do not tell of, `hosts` while they are in trouble."""

    takes, tells, refused = True, True, 0

    def append(self, records):
        if not self.takes and any(r.topic == HOSTS for r in records):
            type(self).refused += 1
            raise Retryable("no broker", after_s=0.05)
        return super().append(records)

    def table(self, topic):
        if not self.tells and topic == HOSTS:
            type(self).refused += 1
            raise Retryable("no broker", after_s=0.05)
        return super().table(topic)


def running(home, kind):
    """The role in a thread, over a log of some kind; how to end it."""
    place, stop = Place(home), threading.Event()
    place.log = kind(home / "log.sqlite")
    args = (place.config, place.log, place.store, place.catalog, FetchMetrics(CollectorRegistry()), Heartbeat(home, "fetch"))
    thread = threading.Thread(target=lambda: run_fetch(*args, stop=stop, home=home), daemon=True)
    thread.start()

    def end():
        stop.set()
        thread.join(60)
        assert not thread.is_alive()

    return end


def until(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kind():
    """A class of its own for each test: the role's log is another instance than the test's."""
    return type("Troubled", (Troubled,), {})


def test_what_could_not_be_told_is_told_on_the_way_out(tmp_path):
    site, log = Site(), kind()
    with serving(site) as base:
        feed(Place(tmp_path).log, base, ["trouble/busy"])  # Retry-After: 77
        log.takes = False
        end = running(tmp_path, log)
        until(lambda: log.refused)
        log.takes = True
        end()
    assert json.loads(Place(tmp_path).log.table(HOSTS)[b"127.0.0.1"])["hold_until"] > time.time()


def test_while_nobody_tells_what_hosts_have_asked_for_they_are_left_alone_and_then_asked(tmp_path):
    site, log = Site(), kind()
    with serving(site) as base:
        feed(Place(tmp_path).log, base, ["1.jpg"])
        log.tells = False
        end = running(tmp_path, log)
        until(lambda: log.refused >= 5)
        assert not site.hits
        log.tells = True
        until(lambda: site.hits)
        end()


def test_what_is_over_is_forgotten_and_what_is_no_answer_too(tmp_path):
    place = Place(tmp_path)
    place.log.ensure_topic(HOSTS, place.config.log.partitions)
    past, later = time.time() - 10, time.time() + 1000
    kept = {"over": {"at": past, "hold_until": past}, "held": {"at": past, "hold_until": later}, "garbage": [1], "none": None}
    place.log.append([NewRecord(HOSTS, name.encode(), json.dumps(value).encode()) for name, value in kept.items()])
    place.log.append([NewRecord(HOSTS, b"\xff", b"{")])
    end = running(tmp_path, SqliteLog)
    until(lambda: set(place.log.table(HOSTS)) == {b"held", b"\xff"})
    end()


class Group:
    """A subscription that a test moves."""

    def __init__(self):
        self.places, self.held = frozenset(), None

    def give(self, *numbers, topics=TOPICS):
        self.places = frozenset((t, n) for t in topics for n in numbers)

    def owned(self):
        return self.places

    def hold_only(self, places):
        self.held = places

    def sure(self):
        return True


@pytest.fixture
def group():
    return Group()


@pytest.fixture
def tenure(tmp_path, group):
    log = SqliteLog(tmp_path / "log.sqlite")
    log.ensure_topic(HOSTS, 4)
    return Tenure(log, group, TOPICS, 4, clock=lambda: 7.0)


def name_of(number):
    return next(name for name in (f"h{i}" for i in range(99)) if partition_of(name.encode(), 4) == number)


def taken(tenure, hosts):
    new = tenure.begin()
    tenure.finish(new, tenure.read(new), hosts)
    return new


def test_a_host_is_ours_from_the_moment_that_its_number_is_taken_over_until_it_is_taken_back(tenure, group):
    hosts = Hosts(config(), tenure)
    group.give(1, 2)
    assert tenure.since(name_of(1)) == math.inf  # not yet
    assert taken(tenure, hosts) == {1, 2} and [tenure.since(name_of(n)) for n in range(4)] == [math.inf, 7.0, 7.0, math.inf]
    group.give(2)
    assert tenure.since(name_of(1)) == math.inf and tenure.end() == {1} and tenure.taken == {2}
    tenure.let_go()
    assert group.held == {(t, 2) for t in TOPICS}


def test_a_number_is_ours_only_with_all_its_topics(tenure, group):
    group.give(1, topics=TOPICS[:1])
    assert tenure.begin() == frozenset()


def test_a_number_that_is_taken_back_while_it_is_being_taken_over_is_not_begun(tenure, group):
    hosts = Hosts(config(), tenure)
    group.give(1)
    new = tenure.begin()
    group.give()
    assert tenure.end() == {1}
    group.give(1)  # again; what is being read may be too old
    tenure.finish(new, {}, hosts)
    assert tenure.taken == frozenset() and taken(tenure, hosts) == {1} == set(tenure.taken)


def test_a_table_that_cannot_be_read_is_tried_again(tenure, group):
    group.give(1)
    tenure.give_up(tenure.begin())
    assert tenure.begin() == {1}


def test_only_what_is_known_of_the_numbers_taken_over_is_taken_up(tenure, group):
    mine, others = name_of(1), name_of(2)
    first = Hosts(config())
    for name in (mine, others):
        first.hold(name, 500.0)
    tenure.append(records(first, [mine, others]))
    group.give(1)
    hosts = Hosts(config(), tenure)
    taken(tenure, hosts)
    assert hosts.kept(mine)["hold_until"] == pytest.approx(time.time() + 500, abs=100) and hosts.kept(others) == {}
