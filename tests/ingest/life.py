"""What the tests of the dataset's life share: a home that the real fetch role has filled from a real web server, and what must hold in it."""

import hashlib
import io
import shutil
import tarfile
import uuid

import pytest
from aiohttp import web

from ingest.takedown import takedown
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.event_log import CANDIDATES, TAKEDOWNS, NewRecord
from streamlearn.contract.shards import STORED, index_shard, read_sidecar, sidecar_key
from tests.adapters.s3 import isolate, new_bucket
from tests.crash.sealing import PARTITIONS, fetch_until
from tests.ingest.server import STORE, Place, Site, picture


class Ageing(Site):
    """Pictures that stay, change, vanish and opt out; and a way round to each."""

    def __init__(self):
        super().__init__()
        self.asked = []
        self.be_well()

    def be_well(self):
        self.gone, self.changed, self.opted_out, self.forgetful = set(), {}, set(), set()

    def application(self):
        app = super().application()
        app.router.add_get(r"/moved/{n:\d+}.jpg", self.moved)
        return app

    async def moved(self, request):
        raise web.HTTPFound(f"/{request.match_info['n']}.jpg")

    async def picture(self, request):
        n = int(request.match_info["n"])
        self.asked.append((n, request.headers.get("If-None-Match")))
        if n in self.gone:
            raise web.HTTPGone
        if n in self.opted_out:
            return web.Response(body=picture(n), headers={"X-Robots-Tag": "noai"})
        if n not in self.changed and n not in self.forgetful and request.headers.get("If-None-Match") == f'"{n}"':
            return web.Response(status=304)
        return web.Response(body=picture(self.changed.get(n, n)), headers={"ETag": f'"{self.changed.get(n, n)}"'})


def tell(log, *urls, **more):
    """Append candidates, in turn to each partition."""
    log.ensure_topic(CANDIDATES, PARTITIONS)
    for i, url in enumerate(urls):
        c = Candidate(url=url, source="t", source_ref=str(i), discovered_at="2026-11-21T00:00:00Z", **more)
        log.append([NewRecord(CANDIDATES, politeness_key(url), c.to_json(), i % PARTITIONS)])


def covered(place):
    """Whether the catalog covers every candidate."""
    return all(place.catalog.position(CANDIDATES, p) == place.log.bounds(CANDIDATES, p)[1] for p in range(PARTITIONS))


def sized(place, max_samples, max_age_s=60.0):
    """Shards of so many offsets whatever the machine's pace, unless they get old."""
    shard = place.config.shard.model_copy(update={"max_samples": max_samples, "max_age_s": max_age_s})
    place.config = place.config.model_copy(update={"shard": shard})
    return place


@pytest.fixture(scope="module", params=["folder", "s3"])
def storage(request):
    """Where homes keep their objects: in a folder of their own (None), or in a bucket."""
    if request.param == "folder":
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch)
        yield new_bucket(request.getfixturevalue("s3_server"))


folder_only = pytest.mark.parametrize("storage", ["folder"], indirect=True)  # where S3 would show nothing that another test does not


def killed_at(steps, *on_s3):
    """At each of so many steps, before and after it, on a folder; where the store is S3 at those steps alone, for each takes seconds."""
    cases = [("folder", nth, when) for nth in range(1, steps + 1) for when in ("before", "after")]
    return pytest.mark.parametrize(("storage", "nth", "when"), cases + [("s3", *case) for case in on_s3], indirect=["storage"])


def at_home(home, storage, **more):
    """A home whose objects are there."""
    home.mkdir(exist_ok=True)
    if storage:
        (home / STORE).write_text(storage.config(prefix=f"home-{uuid.uuid4().hex[:8]}", **more).model_dump_json())
    return home


def fetched(home, *urls, storage=None, max_samples=7, max_age_s=0.2, **store):
    """A home that holds them; `store`: more of its settings."""
    at_home(home, storage, **store)
    place = sized(Place(home), max_samples, max_age_s)
    tell(place.log, *urls)
    fetch_until(place, covered)
    return place


def copied(home, target, storage=None):
    """Log and objects anew: what is done to the copy is not done to the original."""
    shutil.copytree(home, target)
    at_home(target, storage)
    place = Place(target)
    if storage:
        original = Place(home).store
        for key in original.list(""):
            here, there = (store.uri(key).removeprefix(f"s3://{storage.name}/") for store in (original, place.store))
            storage.client().copy_object(Bucket=storage.name, Key=there, CopySource={"Bucket": storage.name, "Key": here})
    return place


def stored(place):
    """(url, its bytes) of all that live shards hold, in their order; tar, sidecar and catalog must agree."""
    found = []
    for row in place.catalog.rows():
        data = place.store.get(row.key)
        (place.home / "seen.tar").write_bytes(data)
        samples = index_shard(place.home / "seen.tar")
        outcomes = read_sidecar(place.store.get(sidecar_key(row.key))).to_pylist()
        assert hashlib.sha256(data).hexdigest() == row.sha256 and len(data) == row.bytes
        assert [o["offset"] for o in outcomes] == list(range(row.first_offset, row.end_offset))
        kept = [o for o in outcomes if o["outcome"] == STORED]
        assert [(o["offset"], o["member_offset"], o["member_size"], o["ext"]) for o in kept] == [
            (s.offset, s.start, s.size, s.ext) for s in samples
        ]
        assert len(kept) == row.num_samples
        for o, s in zip(kept, samples, strict=True):
            body = data[s.start : s.start + s.size]
            assert hashlib.sha256(body).hexdigest() == o["sha256"]
            found.append((o["url"], body))
    return found


def outcomes(place):
    """(url, outcome, reason) of every offset that live shards cover."""
    rows = [o for row in place.catalog.rows() for o in read_sidecar(place.store.get(sidecar_key(row.key))).to_pylist()]
    return [(o["url"], o["outcome"], o["reason"]) for o in rows]


def traces(place, url, body):
    """Objects of the store that hold the image, its description, or a word of it."""
    found, digest = [], hashlib.sha256(body).hexdigest()
    for key in place.store.list(""):
        data = place.store.get(key)
        if key.endswith(".parquet") and key.startswith("shards/"):
            rows = read_sidecar(data).to_pylist()
            if any(url in (r["url"], r["final_url"]) or r["sha256"] == digest for r in rows):
                found.append(key)
        elif key.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as tar:
                if any(body == tar.extractfile(m).read() or url.encode() in tar.extractfile(m).read() for m in tar):
                    found.append(key)
    return found


def take_down(place, **more):
    return takedown(place.log, place.store, place.catalog, folder=place.home / "rewriting", **{"reason": "asked", "by": "test"} | more)


def coverage(place):
    """Ranges of live rows, of each partition."""
    return sorted((r.partition, r.first_offset, r.end_offset) for r in place.catalog.rows())


__all__ = [
    "TAKEDOWNS",
    "Ageing",
    "copied",
    "coverage",
    "covered",
    "fetched",
    "outcomes",
    "sized",
    "storage",
    "stored",
    "take_down",
    "tell",
    "traces",
]
