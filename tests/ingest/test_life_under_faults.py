"""The dataset's changing half on an S3 that goes wrong at every turn: tried again until it is done, it leaves what one clean run leaves."""

import random
from datetime import UTC, datetime, timedelta

import pytest

from ingest import audit
from ingest.compact import compact
from ingest.expire import purge
from ingest.refresh import cut, refresh
from streamlearn.contract.errors import Retryable
from streamlearn.contract.event_log import CANDIDATES
from tests.adapters.faultproxy import Fault
from tests.ingest.life import Ageing, coverage, fetched, stored, take_down, traces
from tests.ingest.server import picture, serving

ACTS = ("answer", "reset_before", "reset_after")
N = 12


@pytest.fixture
def proxy(bucket):
    with bucket.behind_faults() as proxy:
        yield proxy


def storm(seed):
    """Every third request or so goes wrong, in one of three ways; GETs are cut short, too."""
    rng = random.Random(seed)
    acts = {"PUT": ACTS, "DELETE": ACTS, "HEAD": ACTS, "GET": (*ACTS, "truncate")}
    made = []
    for method, ways in acts.items():
        for _ in range(30):
            made += [Fault("", method)] * rng.randrange(1, 5)  # these pass
            made.append(Fault(rng.choice(ways), method, keep=rng.randrange(200)))
    return made


def until_done(call, tries=60):
    """What a person or a timer does: the same again."""
    for _ in range(tries):
        try:
            return call()
        except Retryable:
            continue
    raise AssertionError("it never got through")


@pytest.mark.parametrize("seed", [1, 2])
def test_compaction_takedown_purge_and_refresh_get_through_a_storm_of_faults(tmp_path, bucket, proxy, seed):
    with serving(Ageing()) as base:
        place = fetched(
            tmp_path / "home", *(f"{base}/{n}.jpg" for n in range(N)), storage=bucket, max_samples=2, max_age_s=60, endpoint_url=proxy.url
        )
        before, ranges = stored(place), coverage(place)
        proxy.faults = storm(seed)
        until_done(lambda: compact(place.store, place.catalog, folder=place.home / "r", max_bytes=2**20))
        until_done(lambda: take_down(place, url=f"{base}/3.jpg"))
        until_done(lambda: purge(place.store, place.catalog, grace=timedelta(0), at=datetime.now(UTC) + timedelta(days=1)))
        until_done(lambda: cut(place.store, place.catalog, name="q"))
        until_done(lambda: refresh(place.log, place.store, place.catalog, name="q", rate=0))
        assert sum(act != "" for _, _, act in proxy.seen) > 30
        proxy.faults = []
        assert sorted(stored(place)) == sorted((u, b) for u, b in before if b != picture(3))
        assert traces(place, f"{base}/3.jpg", picture(3)) == []
        assert [(p, s, e) for p, s, e in coverage(place)] == [(p, 0, max(e for q, _, e in ranges if q == p)) for p in (0, 1)]
        report = audit.verify(place.log, place.store, place.catalog, deep=True, sample=0)
        assert report.good, report.findings
        told = sum(place.log.bounds(CANDIDATES, p)[1] for p in (0, 1)) - N
        assert N - 1 <= told <= 2 * (N - 1)  # a try that failed may have told the candidates of its last shard already
