"""The fetch role under a knife: seams that die at a chosen step, and what must hold afterwards."""

import threading
import time
from collections import Counter

import pyarrow.parquet as pq
import webdataset as wds
from prometheus_client import CollectorRegistry

from ingest.fetch.run import run_fetch
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import NotFound
from streamlearn.contract.event_log import CANDIDATES, NewRecord, SqliteLog, retry_topic
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import STORED, index_shard, read_sidecar, sidecar_key
from streamlearn.contract.status import Heartbeat
from tests.ingest.server import Place, picture

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


def fetch_until(place, done, limit_s=150.0, watcher=None, registry=None):
    """Run the role until `done(place)`; whatever kills it is raised."""
    stop, failed = threading.Event(), []

    def work():
        try:
            heart = Heartbeat(place.home, "fetch")
            metrics = FetchMetrics(registry or CollectorRegistry())
            run_fetch(place.config, place.log, place.store, place.catalog, metrics, heartbeat=heart, stop=stop, home=place.home)
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + limit_s
    watcher = watcher or Place(place.home)  # connections of its own: the role's are not shared between threads
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


def wait(place, done, limit_s=150):
    deadline = time.monotonic() + limit_s
    while not done(place) and time.monotonic() < deadline:
        time.sleep(0.1)
