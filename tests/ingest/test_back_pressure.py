"""Back-pressure: a store that is gone, a consumer slower than its source, a disk that fills.  Nothing lost, memory bounded, the state clear.

The fetch role is a process of its own, the store is S3 behind a proxy that goes wrong, the log is SQLite or Kafka's mock cluster, the web is real.
"""

from contextlib import ExitStack

import pytest

from streamlearn.contract.event_log import (
    CANDIDATES,
    CONNECTOR_CONFIGS,
    DEAD_LETTERS,
    HOSTS,
    SHARDS,
    SOURCE_STATE,
    TAKEDOWNS,
    SqliteLog,
    retry_topic,
)
from tests.adapters.faultproxy import Fault, FaultProxy
from tests.adapters.kafka import MockCluster, open_mocked
from tests.conftest import small_disk
from tests.ingest.pressing import Dataset, Gallery, Role, tell
from tests.ingest.server import serving

ALWAYS = 10**9
METHODS = ("GET", "PUT", "HEAD", "POST", "DELETE")
SLOTS = 4  # fetch.concurrency
TOPICS = (CANDIDATES, DEAD_LETTERS, HOSTS, SHARDS, SOURCE_STATE, CONNECTOR_CONFIGS, TAKEDOWNS, *(retry_topic(i) for i in range(3)))
MOST_MB = 64  # that a role may grow by over what it had when all was well, whatever waits for it


def store_table(name, url, attempts=2):
    """`attempts`: the SDK's own, with its pauses: the fewer, the sooner the role hears of it."""
    return f'kind = "s3"\nbucket = "{name}"\nprefix = "main"\nendpoint_url = "{url}"\npath_style = true\nattempts = {attempts}\n'


class Line:
    """The way to S3, which can be cut and mended."""

    def __init__(self, server, how):
        self.server, self.how, self.proxy = server, how, FaultProxy(server)
        self.proxy.__enter__()
        self.url, self.open = self.proxy.url, True

    def cut(self):
        if self.how == "refused":
            self.proxy.__exit__()
            self.open = False
        else:
            self.proxy.faults = [Fault("answer", method, times=ALWAYS) for method in METHODS]

    def mend(self):
        self.proxy.faults = []
        if not self.open:
            self.proxy = FaultProxy(self.server, port=self.proxy.port)
            self.proxy.__enter__()
            self.open = True

    def close(self):
        if self.open:
            self.proxy.__exit__()


@pytest.fixture
def line(request, bucket):
    line = Line(bucket.server, getattr(request, "param", "503"))
    yield line
    line.close()


@pytest.fixture
def log(request, tmp_path):
    """(what the role's configuration says of it, the log itself)"""
    if getattr(request, "param", "sqlite") == "sqlite":
        (tmp_path / "home").mkdir()
        yield "", SqliteLog(tmp_path / "home" / "log.sqlite")
        return
    cluster = MockCluster()
    for topic in TOPICS:  # the mock cannot be asked to make them
        cluster.make_topic(topic, 2)
    servers = ", ".join(f'"{server}"' for server in cluster.servers)
    log = open_mocked(cluster)
    yield (
        f'kind = "kafka"\n[log.kafka]\nservers = [{servers}]\napi_version = [2, 3]\nsession_timeout_s = 6.0\nrequest_timeout_s = 3.0\ndelivery_timeout_s = 6.0\n',
        log,
    )
    log.close()
    cluster.close()


OUTAGES = [
    pytest.param("503", "sqlite", 200, 30_000, 2**20, 2.0),
    pytest.param("refused", "kafka", 200, 30_000, 2**20, 2.0),
    pytest.param("refused", "sqlite", 1500, 100_000, 2**23, 60.0, marks=pytest.mark.slow),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("line", "log", "images", "size", "spool", "seconds"), OUTAGES, indirect=["line", "log"])
def test_an_s3_that_is_down_for_a_while_is_waited_for_with_a_bounded_spool_and_memory(
    tmp_path,
    bucket,
    line,
    log,
    images,
    size,
    spool,
    seconds,
):
    site = Gallery(size)
    table, log = log
    dataset = Dataset(log, bucket.config())
    settings = {
        "log": table,
        "store": store_table(bucket.name, line.url),
        "fetch": f"concurrency = {SLOTS}\nspool_bytes = {spool}\nbuffer_bytes = {2**20}",
        "shard": "max_age_s = 3.0",
    }
    with serving(site) as base, Role("fetch", tmp_path / "home", **settings) as role:
        tell(log, base, range(20))
        role.wait(lambda: role.stored(20))
        assert role.health("/readyz")[0] == 200
        before_mb = role.rss_mb()
        line.cut()
        tell(log, base, range(20, images))
        role.wait(lambda: role.health()[1]["state"] == "waiting")
        asked = role.at_rest(lambda: len(site.hits))
        assert asked <= 20 + spool // size + 4 * SLOTS  # two partitions with candidates, each a window ahead
        said = _says_what_it_waits_for(role, line.url, "seal", "store")
        role.wait(lambda: role.metrics()["fetch_lag_records"] == images - 20)
        role.wait(lambda: role.waited()["store"] > seconds)
        assert len(site.hits) == asked and role.health()[1]["waiting_since"] == said["waiting_since"]
        assert role.metrics()["fetch_spool_bytes"] <= spool + 4 * SLOTS * (size + 10_000)
        line.mend()
        role.wait(lambda: role.stored(images), limit_s=400)
        role.wait(lambda: role.health("/readyz")[0] == 200)
        assert role.health()[1]["state"] == "fetching" and role.waited() == {}
        grown_mb = role.peak_kb / 1024 - before_mb
        assert role.stop() == 0
    print(f"{images} images of {size} bytes, down for {seconds} s: {asked} asked for meanwhile, {before_mb:.0f} MB + {grown_mb:.0f} MB")
    assert grown_mb < MOST_MB
    assert set(site.hits.values()) == {1}  # nothing was thrown away, to be asked for again
    dataset.check(base, range(images), site.body)


def _says_what_it_waits_for(role, what, step, on):
    """Alive, not ready, and why; the same in the metrics."""
    role.wait(lambda: any(f"({step})" in who for who in role.health()[1].get("waiting_at", ())))
    (alive, said), (ready, _) = role.health(), role.health("/readyz")
    print(f"/healthz {alive}, /readyz {ready}", said, sep="\n")
    print("\n".join(f"{name} {value:g}" for name, value in role.metrics().items() if name.startswith("fetch_") and "duration" not in name))
    assert (alive, ready, said["healthy"], said["ready"], said["state"]) == (200, 503, True, False, "waiting")
    assert what in said["waiting"] and said["waiting_since"] and said["waiting_s"] >= 0
    assert role.metrics()[f'fetch_waits_total{{step="{step}"}}'] > 0
    assert said["waiting_on"] == on and set(role.waited()) == {on}
    return said


def test_a_role_that_starts_while_s3_is_down_waits_and_ends_when_it_is_told_to(tmp_path, bucket, line, log):
    table, log = log
    dataset = Dataset(log, bucket.config())
    settings = {"log": table, "store": store_table(bucket.name, line.url), "shard": "max_age_s = 1.0"}
    site = Gallery()
    with serving(site) as base:
        tell(log, base, range(10))
        line.cut()
        with Role("fetch", tmp_path / "home", **settings) as role:
            _says_what_it_waits_for(role, line.url, "recover", "store")
            assert role.stop() == 0 and site.hits == {}
        with Role("fetch", tmp_path / "home", **settings) as role:
            role.wait(lambda: role.health()[1]["state"] == "waiting")
            line.mend()
            role.wait(lambda: role.stored(10))
            role.wait(lambda: role.health("/readyz")[0] == 200)
    dataset.check(base, range(10), site.body)


@pytest.mark.parametrize("log", ["kafka"], indirect=True)
def test_brokers_that_are_gone_cost_no_image_that_has_come(tmp_path, bucket, log):
    """The open unit stays open meanwhile; nothing of it is asked for again."""
    table, log = log
    dataset = Dataset(log, bucket.config())
    settings = {"log": table, "store": store_table(bucket.name, bucket.url), "shard": "max_age_s = 8.0"}
    site = Gallery()
    with serving(site) as base, Role("fetch", tmp_path / "home", **settings) as role:
        tell(log, base, range(10))
        role.wait(lambda: len(site.hits) == 10 and role.health()[1]["spool_bytes"])
        log.cluster.down()
        _says_what_it_waits_for(role, "Kafka", "read", "broker")
        log.cluster.up()
        tell(log, base, range(10, 20))
        role.wait(lambda: role.stored(20))
        role.wait(lambda: role.health("/readyz")[0] == 200)
        assert role.stop() == 0
    assert set(site.hits.values()) == {1}
    dataset.check(base, range(20), site.body)


MANY = [pytest.param(1000, 2000), pytest.param(20_000, 2000, marks=pytest.mark.slow)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("images", "size"), MANY)
def test_a_source_faster_than_the_fetcher_shows_as_lag_and_costs_no_memory(tmp_path, bucket, log, images, size):
    """The real connector tells a list as fast as it can, while the web lets the fetcher have nothing."""
    site = Gallery(size)
    table, log = log
    dataset = Dataset(log, bucket.config())
    settings = {
        "log": table,
        "store": store_table(bucket.name, bucket.url),
        "fetch": f"concurrency = {SLOTS}",
        "shard": f"max_samples = {images // 4}\nmax_age_s = 5.0",
    }
    with ExitStack() as stack:
        base = stack.enter_context(serving(site))
        (tmp_path / "list.txt").write_text("".join(f"{base}/{n}.jpg\n" for n in range(20, images)))
        source = f'[[connectors]]\nname = "list"\nclass = "urls"\npath = "{tmp_path / "list.txt"}"\n'
        role = stack.enter_context(Role("fetch", tmp_path / "home", **settings))
        tell(log, base, range(20))
        role.wait(lambda: role.stored(20))
        before_mb, site.shut = role.rss_mb(), True
        stack.enter_context(Role("connect", tmp_path / "home", more=source))
        role.wait(lambda: role.metrics()["fetch_lag_records"] == images - 20)
        assert len(site.hits) <= 20 + SLOTS
        site.shut = False
        role.wait(lambda: role.stored(images), limit_s=600)
        role.wait(lambda: role.metrics()["fetch_lag_records"] == 0)
        assert role.stop() == 0
        grown_mb = role.peak_kb / 1024 - before_mb
    print(f"{images} candidates ahead of {SLOTS} slots: {before_mb:.0f} MB + {grown_mb:.0f} MB")
    assert grown_mb < MOST_MB and set(site.hits.values()) == {1}
    dataset.check(base, range(images), site.body)


@pytest.fixture
def small_spool(tmp_path):
    """The spool is a file system of its own, of 1 MiB."""
    with small_disk(tmp_path / "home" / "spool", "1m") as folder:
        yield folder


def fill(path):
    """To the last byte."""
    with pytest.raises(OSError, match="space"), path.open("wb", buffering=0) as f:
        while True:
            f.write(bytes(4096))


SPOOLING = "max_bytes = 100000\nconcurrency = 4"


def test_units_end_before_their_disk_is_full_and_nothing_is_fetched_twice(tmp_path, small_spool, bucket):
    """Nothing but the disk says that a unit has to end."""
    site = Gallery(30_000)
    log = SqliteLog(tmp_path / "home" / "log.sqlite")
    dataset = Dataset(log, bucket.config())
    settings = {"store": store_table(bucket.name, bucket.url), "fetch": SPOOLING}
    with serving(site) as base:
        tell(log, base, range(90))
        with Role("fetch", tmp_path / "home", **settings, shard="max_age_s = 1000.0") as role:
            role.wait(lambda: role.health()[1].get("stored", 0) >= 60)
            assert role.stop() == 0 and set(site.hits.values()) == {1}
        with Role("fetch", tmp_path / "home", **settings, shard="max_age_s = 1.0") as role:
            role.wait(lambda: role.stored(90))
            assert role.stop() == 0
    dataset.check(base, range(90), site.body)


@pytest.mark.slow
def test_a_spool_disk_that_others_fill_is_waited_for_with_what_has_come_in_hand(tmp_path, small_spool, bucket):
    site = Gallery(30_000)
    log = SqliteLog(tmp_path / "home" / "log.sqlite")
    dataset = Dataset(log, bucket.config())
    settings = {"store": store_table(bucket.name, bucket.url), "fetch": SPOOLING, "shard": "max_age_s = 2.0"}
    with serving(site) as base, Role("fetch", tmp_path / "home", **settings) as role:
        tell(log, base, range(20))
        role.wait(lambda: role.stored(20))
        before_mb = role.rss_mb()
        fill(small_spool / "ballast")
        tell(log, base, range(20, 90))
        role.wait(lambda: role.health()[1]["state"] == "waiting")
        asked = role.at_rest(lambda: len(site.hits))
        assert asked <= 20 + 2 * SLOTS  # what is read ahead of the two partitions
        said = _says_what_it_waits_for(role, str(small_spool), "spool", "disk")
        assert "no space left" in said["waiting"] and "goes on by itself" in said["waiting"]
        (small_spool / "ballast").unlink()
        role.wait(lambda: role.stored(90))
        role.wait(lambda: role.health("/readyz")[0] == 200)
        assert role.stop() == 0
    assert set(site.hits.values()) == {1} and role.peak_kb / 1024 - before_mb < MOST_MB
    dataset.check(base, range(90), site.body)


@pytest.mark.slow
def test_a_unit_that_others_leave_no_room_to_be_closed_is_fetched_again(tmp_path, small_spool, bucket):
    site = Gallery(30_000)
    log = SqliteLog(tmp_path / "home" / "log.sqlite")
    dataset = Dataset(log, bucket.config())
    settings = {"store": store_table(bucket.name, bucket.url), "fetch": SPOOLING, "shard": "max_age_s = 6.0"}
    with serving(site) as base, Role("fetch", tmp_path / "home", **settings) as role:
        tell(log, base, range(10))
        role.wait(lambda: len(site.hits) == 10 and role.health()[1]["spool_bytes"])
        fill(small_spool / "ballast")
        _says_what_it_waits_for(role, str(small_spool), "seal", "disk")
        role.wait(lambda: role.health()[1]["spool_bytes"] == 0)  # dropped: it is room, for whoever can use it
        (small_spool / "ballast").unlink()
        role.wait(lambda: role.stored(10))
        role.wait(lambda: role.health("/readyz")[0] == 200)
    dataset.check(base, range(10), site.body)
