"""The sealing protocol: killed at every step, with zombies, with a full store; every offset ends once, every image is stored once."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
import webdataset as wds
from prometheus_client import CollectorRegistry

from ingest.fetch.client import Fetched, Unanswered
from ingest.fetch.run import run_fetch
from ingest.fetch.screen import screen
from ingest.pack import GROUP, Packer, Taken, Unit
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import Fenced, NotFound, StoreFull
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, NewRecord, SqliteLog, retry_topic
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import STORED, index_shard, read_sidecar, sidecar_key
from streamlearn.contract.status import Heartbeat, read_status
from tests.contract.test_durable import tiny_disk  # noqa: F401
from tests.ingest.server import Place, Site, picture, serving

PARTITIONS = 2


class Killed(BaseException):
    """Not an Exception: nothing of ours may survive it."""


class Dying:
    """Counts calls at the seams; dies at the n-th of a kind, before or after it happens."""

    def __init__(self, step=None, when="before", nth=1):
        self.step, self.when, self.left = step, when, nth

    def around(self, step, call):
        if step != self.step:
            return call()
        self.left -= 1
        if self.left == 0 and self.when == "before":
            raise Killed
        result = call()
        if self.left == 0 and self.when == "after":
            raise Killed
        return result


class DyingLog(SqliteLog):
    dying = Dying()

    def append(self, records):
        kinds = {r.topic for r in records}
        step = "hint" if kinds == {"shards"} else "retries" if kinds - {CANDIDATES} else "feed"
        return self.dying.around(step, lambda: SqliteLog.append(self, records))

    def commit(self, group, offsets):
        return self.dying.around("group offset", lambda: SqliteLog.commit(self, group, offsets))


class DyingStore(FolderStore):
    dying = Dying()

    def put_file(self, key, path):
        step = "put sidecar" if key.endswith(".parquet") else "put tar"
        return self.dying.around(step, lambda: FolderStore.put_file(self, key, path))


class DyingCatalog(DeltaCatalog):
    dying = Dying()

    def commit(self, rows, advances):
        return self.dying.around("catalog", lambda: DeltaCatalog.commit(self, rows, advances))


def place_with(home, dying):
    place = Place(home)
    place.log = DyingLog(home / "log.sqlite")
    place.store = DyingStore(home / "store")
    place.catalog = DyingCatalog(str(home / "store" / "catalog" / "shards"), log_id=place.log.log_id)
    for seam in (place.log, place.store, place.catalog):
        seam.dying = dying
    return place


def feed(log, base, paths):
    log.ensure_topic(CANDIDATES, PARTITIONS)
    for i, path in enumerate(paths):
        c = Candidate(url=f"{base}/{path}", source="t", source_ref=str(i), discovered_at="2026-11-21T00:00:00Z")
        log.append([NewRecord(CANDIDATES, politeness_key(c.url), c.to_json(), i % PARTITIONS)])


def fetch_until(place, done, limit_s=150.0):
    """Run the role until `done(place)`; whatever kills it is raised."""
    stop, failed = threading.Event(), []

    def work():
        try:
            heart = Heartbeat(place.home, "fetch")
            metrics = FetchMetrics(CollectorRegistry())
            run_fetch(place.config, place.log, place.store, place.catalog, metrics, heartbeat=heart, stop=stop, home=place.home)
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + limit_s
    watcher = Place(place.home)  # connections of its own: the role's are not shared between threads
    while thread.is_alive() and not done(watcher) and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    thread.join(60)
    if failed:
        raise failed[0]
    assert done(watcher), "the role did not finish in time"


def rows_of(place):
    """Every sidecar row, with its partition."""
    found = []
    for row in place.catalog.rows():
        for outcome in pq.read_table(place.store.root / sidecar_key(row.key)).to_pylist():
            found.append((row.topic, row.partition, outcome))
    return found


def settled(images):
    """All candidates covered, no retry left over or owed."""

    def done(place):
        topics = [CANDIDATES, *(retry_topic(i) for i in range(2))]
        try:
            ends = {(t, p): place.log.bounds(t, p)[1] for t in topics for p in range(PARTITIONS)}
        except NotFound:
            return False
        if any(place.catalog.position(t, p) != end for (t, p), end in ends.items()):
            return False
        ended = {o["origin"] or f"{t}/{p}/{o['offset']}" for t, p, o in rows_of(place) if o["outcome"] not in ("deferred", "duplicate")}
        return len(ended) == images

    return done


def check(place, stored, total):
    """One outcome an offset, each image once, bytes as served, shards as digested."""
    rows = rows_of(place)
    offsets = Counter((t, p, o["offset"]) for t, p, o in rows)
    assert set(offsets.values()) == {1}
    for topic in {t for t, _, _ in offsets}:
        for p in range(PARTITIONS):
            at = sorted(o for t, q, o in offsets if (t, q) == (topic, p))
            assert at == list(range(place.log.bounds(topic, p)[1]))
    urls = Counter(o["url"].rsplit("/", 1)[1] for _, _, o in rows if o["outcome"] == STORED)
    assert urls == Counter(stored), urls
    assert sum(1 for t, _, _ in rows if t == CANDIDATES) == total
    for row in place.catalog.rows():
        path = place.store.root / row.key
        assert len(index_shard(path)) == row.num_samples
        if row.num_samples:
            for sample in wds.WebDataset(str(path), shardshuffle=False):
                number = int(sample["__key__"])
                table = {o["offset"]: o for o in read_sidecar(place.store.root / sidecar_key(row.key)).to_pylist()}
                name = table[number]["url"].rsplit("/", 1)[1]
                assert sample["jpg"] == picture(int(name.removesuffix(".jpg")))


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


def test_only_the_owner_that_commits_decides(tmp_path):
    """One owner saw no answer, the other an image: the loser's retry would store it a second time."""
    place = Place(tmp_path)
    place.log.ensure_topic(CANDIDATES, 1)
    place.log.ensure_topic(DEAD_LETTERS, 1)
    place.log.ensure_topic("shards", 1)
    place.log.ensure_topic(retry_topic(0), 1)
    candidate = Candidate(url="http://a.example/1.jpg", source="t", source_ref="0", discovered_at="2026-11-21T00:00:00Z")
    place.log.append([NewRecord(CANDIDATES, b"", candidate.to_json())])
    body = picture(1)
    seen = screen(body, max_pixels=10**6, min_side=8)
    got = Fetched(body, seen, candidate.url, "2026-11-21T00:00:00Z", 200)
    units = []
    packer = Packer(place.log, place.store, place.catalog, retry_delays_s=(0.1,))
    for number, result in enumerate((Unanswered("timed out"), got)):
        unit = Unit(CANDIDATES, 0, 0, tmp_path / f"{number}.tar", 0.0)
        packer.add(unit, Taken(0, candidate, result))
        units.append(unit)
    packer.seal(units[1])
    with pytest.raises(Fenced):
        packer.seal(units[0])
    assert place.log.bounds(retry_topic(0), 0) == (0, 0)
    assert packer.recover(CANDIDATES, 0) == 1 and place.log.bounds(retry_topic(0), 0) == (0, 0)


def test_what_the_log_has_dropped_is_retried_from_the_sidecar(tmp_path):
    place = Place(tmp_path)
    for topic in (CANDIDATES, DEAD_LETTERS, "shards", retry_topic(0)):
        place.log.ensure_topic(topic, 1)
    candidate = Candidate(url="http://a.example/1.jpg", source="t", source_ref="7", discovered_at="2026-11-21T00:00:00Z")
    place.log.append([NewRecord(CANDIDATES, b"", candidate.to_json())])
    dying = Dying("retries", "before")
    place.log.__class__, place.log.dying = DyingLog, dying
    packer = Packer(place.log, place.store, place.catalog, retry_delays_s=(0.1,))
    unit = Unit(CANDIDATES, 0, 0, tmp_path / "0.tar", 0.0)
    packer.add(unit, Taken(0, candidate, Unanswered("timed out")))
    with pytest.raises(Killed):
        packer.seal(unit)
    place.log.trim(CANDIDATES, 0, 1)
    for _ in range(2):
        assert packer.recover(CANDIDATES, 0) == 1
        (record,) = place.log.read(retry_topic(0), 0, 0, 10)
        later = Candidate.from_json(record.value)
        assert (later.url, later.source_ref, later.attempt, later.origin) == (candidate.url, "7", 1, "candidates/0/0")
        place.log.commit(GROUP, {(CANDIDATES, 0): 0})  # a zombie sets it back: nothing is owed all the same


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

        threads = [threading.Thread(target=work, args=(p,)) for p in places]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
    assert errors == []
    check(Place(tmp_path), [f"{i}.jpg" for i in range(30)], 30)


def wait(place, done, limit_s=150):
    deadline = time.monotonic() + limit_s
    while not done(place) and time.monotonic() < deadline:
        time.sleep(0.1)


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
    """A real disk without room: the open unit is dropped, its offsets are fetched again once there is some."""
    ballast = tiny_disk / "ballast"
    with serving(Site()) as base:
        place = Place(tmp_path)
        feed(place.log, base, [f"{i}.jpg" for i in range(40)])
        with pytest.raises(OSError, match="space"):
            ballast.write_bytes(bytes(2**20))  # the disk is full to the last byte
        heart, metrics, stop = Heartbeat(tmp_path, "fetch"), FetchMetrics(CollectorRegistry()), threading.Event()
        args = (place.config, place.log, place.store, place.catalog, metrics, heart)
        role = threading.Thread(target=run_fetch, args=args, kwargs={"stop": stop, "home": tiny_disk})
        role.start()
        try:
            wait(tmp_path, lambda home: "no space left" in read_status(home).get("fetch", {}).get("full", ""))
            assert read_status(tmp_path)["fetch"]["state"] == "full" and Place(tmp_path).catalog.rows() == []
            ballast.unlink()
            wait(Place(tmp_path), settled(40))
        finally:
            stop.set()
            role.join(60)
    check(Place(tmp_path), [f"{i}.jpg" for i in range(40)], 40)
    assert metrics.full._value.get() >= 1


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


def test_the_event_loop_is_left_clean(tmp_path):
    with serving(Site()) as base:
        place = Place(tmp_path)
        feed(place.log, base, ["1.jpg"])
        fetch_until(place, settled(1))
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
