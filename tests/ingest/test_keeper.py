"""The role `refresh` does what the calendar asks, once, and whenever it is asked again."""

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from ingest.denied import Selector
from ingest.keeper import Keeper, Stopped, last_quarter, run_refresh
from ingest.refresh import generation, generation_key
from ingest.takedown import denial
from streamlearn.contract.errors import NotFound, Retryable
from streamlearn.contract.event_log import CANDIDATES, TAKEDOWNS
from streamlearn.contract.metrics import RefreshMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat
from tests.ingest.life import Ageing, copied, fetched, stored
from tests.ingest.server import serving

NOW = datetime.now(UTC)
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    with serving(Ageing()) as base:
        home = tmp_path_factory.mktemp("filled")
        fetched(home, *(f"{base}/{n}.jpg" for n in range(6)), max_samples=3, max_age_s=60)  # one shard in each partition
        yield home, base


@pytest.fixture
def place(filled, tmp_path):
    return copied(filled[0], tmp_path / "home")


def keeper(place, stop=None, **dataset):
    config = place.config.model_copy(update={"dataset": place.config.dataset.model_copy(update={"refresh_rate": 0.0} | dataset)})
    numbers = CollectorRegistry()
    made = Keeper(config, place.log, place.store, place.catalog, RefreshMetrics(numbers), home=place.home, stop=stop or threading.Event())
    return made, lambda name: numbers.get_sample_value(f"refresh_{name}")


def queued(place):
    return sum(place.log.bounds(CANDIDATES, p)[1] for p in range(place.config.log.partitions))


@pytest.mark.parametrize(("day", "found"), [
    ((2026, 11, 21), ("2026Q3", "2026-10-01")), ((2026, 10, 1), ("2026Q3", "2026-10-01")), ((2026, 9, 30), ("2026Q2", "2026-07-01")),
    ((2027, 1, 1), ("2026Q4", "2027-01-01")), ((2027, 3, 31), ("2026Q4", "2027-01-01")),
])  # fmt: skip
def test_the_quarter_that_ended_last(day, found):
    assert last_quarter(datetime(*day, 12, tzinfo=UTC)) == found


def test_at_a_quarters_end_a_generation_is_cut_and_asked_for_again_once(place):
    after = NOW + timedelta(days=95)  # what is stored now is older than the quarter that ended last
    name, before = last_quarter(after)[0], queued(place)
    made, count = keeper(place, window_days=1000.0)
    made.once(after)
    assert generation(place.store, name).samples == 6 and queued(place) == before + 6 and count("requeued_total") == 6
    made.once(after + timedelta(hours=1))
    assert queued(place) == before + 6
    keeper(place, window_days=1000.0)[0].once(after)  # a process that knows nothing of the first
    assert queued(place) == before + 6


def test_a_dataset_that_began_after_the_quarter_is_left_alone(place):
    before = queued(place)
    keeper(place)[0].once(NOW)
    with pytest.raises(NotFound):
        place.store.get(generation_key(last_quarter(NOW)[0]))
    assert queued(place) == before and len(stored(place)) == 6


def test_what_is_denied_is_taken_down_and_what_is_old_ends_and_is_deleted(place, filled):
    place.log.ensure_topic(TAKEDOWNS, place.config.log.partitions)
    place.log.append([denial(Selector.of("url", f"{filled[1]}/0.jpg"), reason="asked", by="test")])
    made, count = keeper(place, window_days=30.0, grace_days=0.0)
    made.once(NOW)
    assert count("taken_down_total") == 1 and len(stored(place)) == 5
    made.once(NOW + timedelta(days=31))
    assert stored(place) == [] and count("expired_shards_total") > 0
    made.once(NOW + timedelta(days=33))
    assert place.store.list("shards/") == [] and count("purged_bytes_total") > 0


def test_told_to_stop_it_does_not_wait_for_its_rate(place):
    stop = threading.Event()
    made, _ = keeper(place, stop, window_days=1000.0, refresh_rate=0.001)  # 1,000 s for each image
    ended = []

    def work():
        with pytest.raises(Stopped):
            made.once(NOW + timedelta(days=95))
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(lambda: made.doing.startswith("refresh"))
    stop.set()
    thread.join(DEADLINE_S)
    assert ended


class Away(FolderStore):
    """A store that cannot be reached until it can."""

    away = True

    def list(self, prefix):
        if self.away:
            raise Retryable("the store is away")
        return super().list(prefix)


def wait_for(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_role_says_what_it_waits_for_and_goes_on(place, monkeypatch):
    monkeypatch.setattr("ingest.keeper.AGAIN_S", 0.1)
    monkeypatch.setattr("ingest.keeper.PERIOD_S", 0.02)
    store, stop, heart = Away(place.home / "store"), threading.Event(), Heartbeat(place.home, "refresh")
    numbers = CollectorRegistry()
    args = (place.config, place.log, store, place.catalog, RefreshMetrics(numbers), heart)
    thread = threading.Thread(target=lambda: run_refresh(*args, stop=stop, home=place.home))
    thread.start()
    wait_for(lambda: heart.said()[0].get("state") == "waiting")
    assert "away" in heart.said()[0]["waiting"]
    store.away = False
    wait_for(lambda: heart.said()[0].get("state") == "keeping")
    assert numbers.get_sample_value("refresh_rounds_total", {"outcome": "done"}) == 1
    stop.set()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
