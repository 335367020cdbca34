"""Hosts are asked politely whoever comes, goes or dies: real roles in processes of their own, judged by the servers' log."""

import json
import math
import time

import pytest

from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.config import FetchConfig
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, HOSTS, NewRecord, SqliteLog, partition_of, retry_topic
from tests.adapters.kafka import MockCluster, mock_config, open_mocked
from tests.crash.fetchers import Fetchers
from tests.ingest.manners import Rules, Town, audit, changes_of_asker

PARTITIONS = 4
TOPICS = [CANDIDATES, DEAD_LETTERS, "shards", "connector-configs", "takedowns", HOSTS, *(retry_topic(i) for i in range(3))]
NAMES = [f"127.0.0.{i}" for i in range(2, 200)]


def hosts_of(number, count):
    """Some hosts whose partition number it is."""
    return [name for name in NAMES if partition_of(name.encode(), PARTITIONS) == number][:count]


PLAIN, SLOW, DELAYED = ([hosts_of(number, 4)[i] for number in range(PARTITIONS)] for i in range(3))  # one of each in each partition
SPARE = [hosts_of(number, 4)[3] for number in range(PARTITIONS)]  # nobody's candidates name them; redirects do
RULES = Rules(rate=1.0, burst=3, per_host=2, delays=dict.fromkeys(DELAYED, 2.0))


def settings(**more):
    return FetchConfig(
        **{
            "allow_networks": ("127.0.0.0/8",),
            "host_rate": RULES.rate,
            "host_burst": RULES.burst,
            "per_host": RULES.per_host,
            "attempts": 1,
            "total_timeout_s": 20.0,
            "max_wait_s": 3.0,
            "retry_delays_s": (1.0, 1.0, 1.0),
            "breaker_failures": 0,
            "robots_retry_s": 1.0,
        }
        | more
    )


def feed(log, town, count):
    """In turn for each host; a third of the plain ones' lead to a spare host of another partition."""
    records = []
    for i in range(count):
        for host in (*PLAIN, *SLOW, *DELAYED):
            far = SPARE[(PLAIN.index(host) + 1 + i) % PARTITIONS] if host in PLAIN and i % 3 == 1 else ""
            url = town.url(host, f"/to/{far}/{i}.jpg" if far else f"/{i}.jpg")
            candidate = Candidate(url=url, source="t", source_ref=str(i), discovered_at="2026-11-21T00:00:00Z")
            records.append(NewRecord(CANDIDATES, politeness_key(url), candidate.to_json()))
    log.append(records)


class Watch:
    """What the log of the town tells of the fetchers."""

    def __init__(self, town, fetchers):
        self.town, self.fetchers = town, fetchers

    def hosts(self, name, since=-math.inf):
        """Whom it has asked."""
        return {hit.host for hit in self.town.log() if f"({name})" in hit.asker and hit.began > since}

    def asked_by_others(self, hosts, name, since):
        """Wait until each of some hosts has been asked by another."""

        def done():
            return {hit.host for hit in self.town.log() if f"({name})" not in hit.asker and hit.began > since} >= set(hosts)

        self.fetchers.wait(done)

    def handed_over(self):
        """Whether a redirect was followed by another than the one that met it."""
        met = {hit.path: hit.asker for hit in self.town.log() if hit.path.startswith("/to/")}
        followed = [(hit.path.removeprefix("/from/"), hit.asker) for hit in self.town.log() if hit.path.startswith("/from/")]
        return any(met["/" + path.partition("/")[2]] != asker for path, asker in followed)

    def busy(self, host, after_s):
        """Let a host name a time, and wait until it has."""
        before = self.town.told(host)
        self.town.busy[host] = after_s
        self.fetchers.wait(lambda: self.town.told(host) != before)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_host_is_asked_too_often_while_fetchers_join_stop_and_are_killed(tmp_path):
    cluster = MockCluster()
    for topic in TOPICS:
        cluster.make_topic(topic, PARTITIONS)
    town = Town([*PLAIN, *SLOW, *DELAYED, *SPARE], delays=RULES.delays, takes=dict.fromkeys(SLOW, 5.0))
    fetchers = Fetchers(tmp_path, mock_config(cluster), settings(), PARTITIONS)
    watch = Watch(town, fetchers)
    log = open_mocked(cluster)
    try:
        with town.open(), fetchers.ending():
            feed(log, town, 60)
            fetchers.start("a")
            fetchers.wait(lambda: watch.hosts("a") >= {*PLAIN, *SLOW, *DELAYED})
            fetchers.start("b")  # which takes some from a
            fetchers.wait(lambda: len(watch.hosts("b") & {*PLAIN, *SLOW, *DELAYED}) == 6)
            fetchers.start("c")
            fetchers.wait(lambda: watch.hosts("c") & set(SLOW))
            joined = time.monotonic()
            fetchers.wait(lambda: watch.hosts("a", joined) & set(PLAIN))

            (host, *_) = sorted(watch.hosts("a", joined) & set(PLAIN))
            watch.busy(host, 12)
            theirs, now = watch.hosts("a", joined) - set(SPARE), time.monotonic()
            assert fetchers.stop("a") == 0  # at once: what the host has asked for is told on the way out
            watch.asked_by_others(theirs - {host}, "a", now)

            fetchers.wait(watch.handed_over)
            fetchers.wait(lambda: (watch.hosts("b", now) & set(PLAIN)) - {host})
            theirs = watch.hosts("b", now) - set(SPARE) - {host}
            second = min(theirs & set(PLAIN))
            watch.busy(second, 12)
            fetchers.wait(lambda: b"hold_until" in log.table(HOSTS).get(second.encode(), b""))
            now = time.monotonic()
            fetchers.kill("b")
            watch.asked_by_others(theirs, "b", now)
            watch.asked_by_others({host}, "a", now)  # the holds are over, and the hosts are asked again
            assert fetchers.stop("c") == 0
        hits = town.log()
        assert audit(hits, RULES) == []
        assert {hit.asker[-2] for hit in hits} == {"a", "b", "c"}
        changes = changes_of_asker(hits)
        assert max(changes.values()) <= 4 and set(SPARE) <= {hit.host for hit in hits}, changes
        assert {json.loads(value)["delay_s"] for key, value in log.table(HOSTS).items() if key.decode() in DELAYED} == {2.0}
    finally:
        log.close()
        cluster.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_fetcher_that_is_killed_and_started_again_goes_on_as_politely(tmp_path):
    """Embedded: no group, no brokers; the restart is quick, so that what is forgotten would show."""
    plain, delayed, busy = PLAIN[0], DELAYED[0], PLAIN[1]
    rules = Rules(rate=0.5, burst=4, per_host=2, delays={delayed: 7.0})
    town = Town([plain, delayed, busy], delays=rules.delays)
    fetchers = Fetchers(tmp_path, None, settings(host_rate=rules.rate, host_burst=rules.burst, max_wait_s=10.0), PARTITIONS)
    watch = Watch(town, fetchers)
    log = SqliteLog(tmp_path / "log.sqlite")
    for topic in (CANDIDATES, HOSTS):
        log.ensure_topic(topic, PARTITIONS)
    with town.open(), fetchers.ending():
        feed_to = [town.url(host, f"/{i}.jpg") for i in range(40) for host in (plain, delayed, busy)]
        told = [Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z") for url in feed_to]
        log.append([NewRecord(CANDIDATES, politeness_key(c.url), c.to_json()) for c in told])
        fetchers.start("a")
        watch.busy(busy, 8)
        fetchers.wait(lambda: sum(hit.host == plain for hit in town.log()) >= 3 and watch.hosts("a") >= {delayed})
        fetchers.wait(lambda: b"hold_until" in log.table(HOSTS).get(busy.encode(), b""))
        fetchers.kill("a")
        fetchers.start("b")
        fetchers.wait(lambda: watch.hosts("b") >= {plain, delayed} and sum("(b)" in hit.asker for hit in town.log()) >= 4)
        assert fetchers.stop("b") == 0
        fetchers.start("c")
        fetchers.wait(lambda: watch.hosts("c") == {plain, delayed, busy})
        assert fetchers.stop("c") == 0
    assert audit(town.log(), rules) == []
