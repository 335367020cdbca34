"""The sealing protocol: killed at every step, with zombies, with a full store; every offset ends once, every image is stored once."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry

from ingest.fetch.run import run_fetch
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import ShardConfig
from streamlearn.contract.errors import StoreFull
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, NewRecord, retry_topic
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat, read_status
from tests.contract.test_durable import tiny_disk  # noqa: F401
from tests.crash.sealing import PARTITIONS, Dying, Killed, check, feed, fetch_until, place_with, rows_of, settled, wait
from tests.ingest.server import Place, Site, serving

PATHS = [f"{i}.jpg" for i in range(20)] + ["trouble/nowhere", "trouble/page", "trouble/empty"]
STEPS = ["put tar", "put sidecar", "catalog", "retries", "group offset", "hint"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_of_sealing_every_image_is_stored_exactly_once(tmp_path, step, when):
    site = Site()
    site.fail_first = {3: 3, 8: 6}  # one is deferred once, one twice
    with serving(site) as base:
        place = place_with(tmp_path, Dying(step, when, nth=2))
        feed(place.log, base, PATHS)
        with pytest.raises(Killed):
            fetch_until(place, lambda _: False, limit_s=150)
        fresh = Place(tmp_path)
        fetch_until(fresh, settled(len(PATHS)))
    check(fresh, [f"{i}.jpg" for i in range(20)], len(PATHS))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_deferred_candidate_is_stored_once_though_its_owner_died_around_the_append_of_its_retry(tmp_path, when):
    """The server is well again by then: a retry must neither be missing nor join one that is there."""
    site = Site()
    site.down = True
    with serving(site) as base:
        place = place_with(tmp_path, Dying("retries", when))
        feed(place.log, base, ["1.jpg", "2.jpg"])
        with pytest.raises(Killed):
            fetch_until(place, lambda _: False, limit_s=150)
        site.down = False
        fresh = Place(tmp_path)
        fetch_until(fresh, settled(2))
    check(fresh, ["1.jpg", "2.jpg"], 2)


def test_two_owners_at_once_store_everything_once(tmp_path):
    """Zombies: both fetch, the catalog lets one of them have each unit."""
    site = Site()
    site.fail_first = dict.fromkeys((2, 5, 9), 4)
    with serving(site) as base:
        feed(Place(tmp_path).log, base, [f"{i}.jpg" for i in range(30)])
        places = [Place(tmp_path) for _ in range(2)]
        for number, place in enumerate(places):
            place.home = tmp_path / f"owner{number}"  # spools of their own, as on two machines
            place.home.mkdir()
        done, errors = settled(30), []

        def work(place):
            try:
                stop = threading.Event()
                threading.Thread(target=lambda: (wait(Place(tmp_path), done), stop.set()), daemon=True).start()
                heart = Heartbeat(place.home, "fetch")
                args = (place.config, place.log, place.store, place.catalog, FetchMetrics(CollectorRegistry()), heart)
                run_fetch(*args, stop=stop, home=place.home)
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in places]
        [t.start() for t in threads]
        [t.join(200) for t in threads]
    assert errors == []
    check(Place(tmp_path), [f"{i}.jpg" for i in range(30)], 30)


def test_an_image_that_never_comes_is_dead_after_its_last_retry(tmp_path):
    site = Site()
    site.fail_first = {1: 10**6}
    with serving(site) as base:
        place = Place(tmp_path)
        feed(place.log, base, ["1.jpg", "2.jpg"])
        fetch_until(place, settled(2))
    ends = Counter((t, o["outcome"]) for t, _, o in rows_of(place) if o["url"].endswith("/1.jpg"))
    assert ends == {(CANDIDATES, "deferred"): 1, (retry_topic(0), "deferred"): 1, (retry_topic(1), "dead"): 1}
    letters = [r for p in range(PARTITIONS) for r in place.log.read(DEAD_LETTERS, p, 0, 100)]
    assert len(letters) == 1 and b"no_answer" in letters[0].value


def test_a_record_that_is_no_candidate_loses_no_other(tmp_path):
    with serving(Site()) as base:
        place = Place(tmp_path)
        feed(place.log, base, ["1.jpg"])
        place.log.append([NewRecord(CANDIDATES, b"", b"\xff not json", 0)])
        feed(place.log, base, ["2.jpg"])
        fetch_until(place, settled(3))
    assert Counter(o["outcome"] for _, _, o in rows_of(place)) == {"stored": 2, "rejected": 1}


class FullStore(FolderStore):
    full_until = 0.0
    refused = 0

    def put_file(self, key, path):
        if time.monotonic() < self.full_until:
            self.refused += 1
            raise StoreFull("no space left", after_s=0.05)
        super().put_file(key, path)


def test_a_full_store_is_waited_out_and_nothing_is_lost(tmp_path):
    with serving(Site()) as base:
        place = Place(tmp_path)
        place.store = FullStore(tmp_path / "store")
        place.store.full_until = time.monotonic() + 1.0
        feed(place.log, base, [f"{i}.jpg" for i in range(12)])
        fetch_until(place, settled(12))
    assert place.store.refused > 2
    check(place, [f"{i}.jpg" for i in range(12)], 12)


def test_a_full_spool_is_waited_out_and_nothing_is_lost(tmp_path, tiny_disk):  # noqa: F811
    """A real disk without room: what has come waits in memory, nothing more is asked for, and it goes on once there is some."""
    ballast = tiny_disk / "ballast"
    with serving(Site()) as base:
        place = Place(tmp_path)
        feed(place.log, base, [f"{i}.jpg" for i in range(40)])
        with pytest.raises(OSError, match="space"):
            ballast.write_bytes(bytes(2**20))  # the disk is full to the last byte
        heart, metrics, stop = Heartbeat(tmp_path, "fetch"), FetchMetrics(CollectorRegistry()), threading.Event()
        args = (place.config, place.log, place.store, place.catalog, metrics, heart)
        role = threading.Thread(target=run_fetch, args=args, kwargs={"stop": stop, "home": tiny_disk}, daemon=True)
        role.start()
        try:
            wait(tmp_path, lambda home: "no space left" in read_status(home).get("fetch", {}).get("waiting", ""))
            assert read_status(tmp_path)["fetch"]["state"] == "waiting" and Place(tmp_path).catalog.rows() == []
            ballast.unlink()
            wait(Place(tmp_path), settled(40))
        finally:
            stop.set()
            role.join(60)
    check(Place(tmp_path), [f"{i}.jpg" for i in range(40)], 40)
    assert metrics.waits.labels("spool")._value.get() >= 1


def test_a_spool_over_its_bound_is_sealed_before_its_time(tmp_path):
    """Neither age nor size of one unit says so: it is all of them together."""
    place = Place(tmp_path)
    big = {"spool_bytes": 2**20, "buffer_bytes": 2**20, "max_bytes": 2**21}
    place.config = place.config.model_copy(
        update={"shard": ShardConfig(max_samples=10**6, max_age_s=10**6), "fetch": place.config.fetch.model_copy(update=big)}
    )
    site = Site()
    site.size = (400, 300)
    with serving(site) as base:
        feed(place.log, base, [f"{i}.jpg" for i in range(60)])
        fetch_until(place, lambda p: sum(row.num_samples for row in p.catalog.rows()) >= 20)
    sizes = [row.bytes for row in Place(tmp_path).catalog.rows()]
    assert sizes and max(sizes) <= 2**20 + 2**18 and len({(o["url"]) for _, _, o in rows_of(place)}) == len(rows_of(place))


def test_killed_with_a_real_kill_the_next_start_loses_and_doubles_nothing(tmp_path):
    """Whole processes and SIGKILL at random moments, on the real seams."""
    code = (
        "import sys, threading; from pathlib import Path; from prometheus_client import CollectorRegistry\n"
        "from tests.ingest.server import Place; from ingest.fetch.run import run_fetch\n"
        "from streamlearn.contract.metrics import FetchMetrics; from streamlearn.contract.status import Heartbeat\n"
        "p = Place(Path(sys.argv[1]))\n"
        "run_fetch(p.config, p.log, p.store, p.catalog, FetchMetrics(CollectorRegistry()), Heartbeat(p.home, 'fetch'),"
        " stop=threading.Event(), home=p.home)"
    )
    site = Site()
    site.fail_first = dict.fromkeys(range(0, 120, 17), 3)
    with serving(site) as base:
        feed(Place(tmp_path).log, base, [f"{i}.jpg" for i in range(120)])
        for pause in (1.1, 1.3, 1.2, 1.5, 1.4, 1.25):
            child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
            time.sleep(pause)
            child.kill()
            child.wait()
        place = Place(tmp_path)
        fetch_until(place, settled(120))
    check(place, [f"{i}.jpg" for i in range(120)], 120)


class RivalCatalog(DeltaCatalog):
    """Another owner, who then goes away for good, commits the first unit just before we do."""

    rivalled = 0

    def commit(self, rows, advances):
        if advances[0].topic == CANDIDATES and not self.rivalled:
            self.rivalled += 1
            DeltaCatalog(self.uri, log_id=self.log_id).commit(rows, advances)
        return super().commit(rows, advances)


def test_who_was_fenced_goes_on_from_where_the_other_left(tmp_path):
    """Alone: nobody else would cover what it does not."""
    with serving(Site()) as base:
        place = Place(tmp_path)
        place.catalog = RivalCatalog(place.catalog.uri, log_id=place.log.log_id)
        feed(place.log, base, [f"{i}.jpg" for i in range(30)])
        fetch_until(place, settled(30), limit_s=30)
    assert place.catalog.rivalled == 1
    check(Place(tmp_path), [f"{i}.jpg" for i in range(30)], 30)
