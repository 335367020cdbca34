"""The fetch role on Kafka (librdkafka's mock cluster): killed, shared out among several, cut off from the brokers."""

import threading
import time
import uuid

import pytest
from prometheus_client import CollectorRegistry

from ingest.fetch.run import run_fetch
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import OffsetGap
from streamlearn.contract.event_log import CANDIDATES, NewRecord, retry_topic
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.status import Heartbeat
from tests.adapters.kafka import MockCluster, MockedLog, mock_config
from tests.crash.sealing import PARTITIONS, Dying, Killed, check, feed, fetch_until, rows_of, settled, wait
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
        place.log = kind(mock_config(self.cluster, topic_prefix=self.prefix, **more))
        place.log.cluster = self.cluster
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
