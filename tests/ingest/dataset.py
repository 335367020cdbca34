"""A real small dataset: the real fetch role over real HTTP made it.  Made once; every test damages a copy of its own."""

import shutil

import pytest

from ingest import audit
from streamlearn.contract.catalog import Advance, ShardRow
from streamlearn.contract.config import Config
from streamlearn.contract.event_log import CANDIDATES
from streamlearn.contract.shards import shard_key, sidecar_key
from tests.crash.sealing import feed, fetch_until, settled
from tests.ingest.server import Place, Site, serving

PATHS = [f"{n}.jpg" for n in range(24)] + ["trouble/empty", "trouble/page", "trouble/svg", "trouble/none"]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """24 images and 4 refusals; two images need a second try."""
    home = tmp_path_factory.mktemp("dataset")
    site, place = Site(), Place(home)
    site.fail_first = {3: 4, 4: 4}
    with serving(site) as base:
        feed(place.log, base, PATHS)
        fetch_until(place, settled(len(PATHS)))
    (home / "config.json").write_text(Config().model_dump_json())
    place.log.close()
    return home


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "home")
    return Place(tmp_path / "home")


def largest(place, partition=0):
    """The live shard of candidates/`partition` with most images."""
    return max((r for r in place.catalog.rows() if (r.topic, r.partition) == (CANDIDATES, partition)), key=lambda r: r.num_samples)


def verify(place, deep=True, sample=0, **more):
    return audit.verify(place.log, place.store, place.catalog, deep=deep, sample=sample, **more)


def found(place, **more):
    """Every finding in short."""
    return [(f.kind, f.where) for f in verify(place, **more).findings]


def path_of(place, key):
    return place.store.root / key


def crafted(first, end, topic=CANDIDATES, partition=0, **more) -> ShardRow:
    """A row of no real shard, named as a real one."""
    sha256 = more.pop("sha256", "c" * 64)
    key = shard_key("2026-11-21", topic, partition, first, end, sha256)
    stamp = "2026-11-21T00:00:00.000Z"
    fields = dict(key=key, sha256=sha256, bytes=10240, num_samples=0, topic=topic, partition=partition, first_offset=first, end_offset=end)
    return ShardRow(**fields | dict(first_fetched_at=stamp, last_fetched_at=stamp, day="2026-11-21") | more)


def put(place, row, objects_of=None):
    """Commit a row; with the objects of another, renamed, if given."""
    start = place.catalog.position(row.topic, row.partition)
    if objects_of:
        for name in (lambda key: key, sidecar_key):
            place.store.put(name(row.key), place.store.get(name(objects_of.key)))
    place.catalog.commit([row], [Advance(row.topic, row.partition, start, max(start, row.end_offset))])
