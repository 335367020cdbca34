"""The fetch role on Kafka (librdkafka's mock cluster): killed, shared out among several, cut off from the brokers."""

import threading
import uuid

import pytest
from prometheus_client import CollectorRegistry

from ingest.fetch.run import run_fetch
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import OffsetGap
from streamlearn.contract.event_log import CANDIDATES
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.shards import STORED
from streamlearn.contract.status import Heartbeat, read_status
from tests.adapters.kafka import MockCluster, MockedLog, open_mocked
from tests.crash.sealing import Dying, Killed, check, feed, fetch_until, rows_of, settled, wait
from tests.ingest.server import Place, Site, serving


@pytest.fixture(scope="module")
def cluster():
    cluster = MockCluster()
    yield cluster
    cluster.close()


class DyingMockedLog(MockedLog):
    """Dies before, half way through or after the append of retries, or around the group offset."""

    dying = Dying()

    def append(self, records):
        kinds = {r.topic for r in records}
        step = "hint" if kinds == {"shards"} else "retries" if kinds - {CANDIDATES} else "feed"
        if step == self.dying.step and self.dying.when == "half way":
            super().append(records[: len(records) // 2])
            raise Killed
        return self.dying.around(step, lambda: MockedLog.append(self, records))

    def commit(self, group, offsets):
        return self.dying.around("group offset", lambda: MockedLog.commit(self, group, offsets))


class KafkaPlaces:
    """Places on one set of topics."""

    def __init__(self, home, cluster):
        self.home, self.cluster, self.prefix, self.open = home, cluster, f"c{uuid.uuid4().hex[:8]}.", []

    def place(self, kind=MockedLog, home=None, **more):
        place = Place(self.home)
        place.home = home or self.home
        place.log.close()
        place.log = open_mocked(self.cluster, kind, topic_prefix=self.prefix, **more)
        place.catalog = DeltaCatalog(str(self.home / "store" / "catalog" / "shards"), log_id=place.log.log_id)
        self.open.append(place.log)
        return place

    def close(self):
        for log in self.open:
            log.close()


@pytest.fixture
def places(tmp_path, cluster):
    places = KafkaPlaces(tmp_path, cluster)
    yield places
    places.close()


def test_everything_that_is_told_on_kafka_is_stored_once(places):
    site = Site()
    site.fail_first = {3: 3, 8: 6}
    with serving(site) as base:
        place = places.place()
        feed(place.log, base, [f"{i}.jpg" for i in range(40)])
        fetch_until(place, settled(40), watcher=places.place())
    check(place, [f"{i}.jpg" for i in range(40)], 40)


@pytest.mark.parametrize(
    ("step", "when"), [("retries", "before"), ("retries", "half way"), ("retries", "after"), ("group offset", "before")]
)
def test_killed_after_the_commit_point_the_next_owner_tells_what_is_owed(places, step, when):
    site = Site()
    site.down = True
    with serving(site) as base:
        place = places.place(DyingMockedLog)
        place.log.dying = Dying(step, when)
        feed(place.log, base, [f"{i}.jpg" for i in range(8)])
        with pytest.raises(Killed):
            fetch_until(place, lambda _: False, watcher=places.place())
        site.down = False
        fetch_until(places.place(), settled(8), watcher=places.place())
    check(places.place(), [f"{i}.jpg" for i in range(8)], 8)


def run_in_thread(place, stop, errors):
    def work():
        try:
            args = (place.config, place.log, place.store, place.catalog, FetchMetrics(CollectorRegistry()), Heartbeat(place.home, "fetch"))
            run_fetch(*args, stop=stop, home=place.home)
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_two_fetchers_share_the_partitions_and_one_takes_over_when_the_other_goes(places, tmp_path):
    homes = [tmp_path / f"fetcher{i}" for i in range(2)]
    stops, errors, threads = [threading.Event() for _ in homes], [], []
    with serving(Site()) as base:
        feed(places.place().log, base, [f"{i}.jpg" for i in range(12)])
        for home, stop in zip(homes, stops, strict=True):
            home.mkdir()
            threads.append(run_in_thread(places.place(home=home), stop, errors))

        def shares():
            return [read_status(home).get("fetch", {}).get("partitions", 0) for home in homes]

        try:
            wait(None, lambda _: sum(shares()) == 6 and all(shares()))  # candidates and two retry topics, two partitions each
            assert sum(shares()) == 6 and all(shares()), shares()
            stops[0].set()
            wait(None, lambda _: shares()[1] == 6)
            feed(places.place().log, base, [f"{i}.jpg" for i in range(12, 24)])
            wait(places.place(), settled(24))
        finally:
            [stop.set() for stop in stops]
            [thread.join(60) for thread in threads]
    assert errors == []
    check(places.place(), [f"{i}.jpg" for i in range(24)], 24)


def test_brokers_that_are_gone_for_a_while_are_waited_for(places, cluster):
    stop, errors = threading.Event(), []
    with serving(Site()) as base:
        place = places.place()
        feed(place.log, base, [f"{i}.jpg" for i in range(12)])
        thread = run_in_thread(place, stop, errors)
        try:
            wait(places.place(), settled(12))
            cluster.down()
            wait(None, lambda _: "Kafka" in read_status(place.home)["fetch"]["waiting"])
            cluster.up()
            feed(places.place().log, base, [f"{i}.jpg" for i in range(12, 24)])
            wait(places.place(), settled(24))
        finally:
            cluster.up()
            stop.set()
            thread.join(60)
    assert errors == []
    check(places.place(), [f"{i}.jpg" for i in range(24)], 24)


def test_topics_that_were_made_anew_are_an_incident_until_the_epoch_is_raised(places, tmp_path):
    """The catalog is ahead of the log: without a word from the user, nothing is skipped and nothing is taken for something else."""
    with serving(Site()) as base:
        place = places.place()
        feed(place.log, base, [f"{i}.jpg" for i in range(6)])
        fetch_until(place, settled(6), watcher=places.place())
        log_id = place.log.log_id
        again = KafkaPlaces(tmp_path, places.cluster)  # other topics, which begin at 0 again, of the same cluster
        try:
            feed(again.place().log, base, ["6.jpg"])
            assert again.place().log.log_id == log_id
            with pytest.raises(OffsetGap, match=r"ends at \d, asked for 3: the topic was cut off or made anew.*raise log.kafka.epoch"):
                fetch_until(again.place(), lambda _: False, watcher=again.place())
            fetch_until(again.place(epoch=1), lambda p: len(p.catalog.rows()) > 2, watcher=again.place(epoch=1))
            stored = [o["url"].rsplit("/", 1)[1] for _, _, o in rows_of(again.place(epoch=1)) if o["outcome"] == STORED]
            assert sorted(stored) == [f"{i}.jpg" for i in range(7)]
            assert {r.topic for r in again.place(epoch=1).catalog.rows()} == {CANDIDATES, f"{CANDIDATES}@1"}
        finally:
            again.close()
