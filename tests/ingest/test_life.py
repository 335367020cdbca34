"""Compaction, expiry, purging, generations and refresh over shards that the real fetch role sealed."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from ingest.compact import compact, mergers
from ingest.expire import expire, purge
from ingest.pack import GROUP, Packer
from ingest.refresh import cut, generation, refresh
from streamlearn.contract.catalog import EXPIRED, LIVE, REPLACED
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.event_log import CANDIDATES, SOURCE_STATE, TAKEDOWNS
from tests.contract.test_catalog import row
from tests.crash.sealing import Dying, Killed, fetch_until, place_with
from tests.ingest.life import Ageing, copied, covered, fetched, folder_only, killed_at, outcomes, stored, take_down
from tests.ingest.server import Place, picture, serving
from tests.ingest.test_takedown import Knife, under

NOW = datetime.now(UTC)
WEEK, ZERO = timedelta(days=7), timedelta(0)


@pytest.fixture(scope="module")
def site():
    return Ageing()


@pytest.fixture(scope="module")
def base(site):
    with serving(site) as address:
        yield address


@pytest.fixture(scope="module")
def filled(base, storage, tmp_path_factory):
    home = tmp_path_factory.mktemp("filled")
    fetched(home, *(f"{base}/{n}.jpg" for n in range(12)), storage=storage, max_samples=2, max_age_s=60)  # three shards in each partition
    return home


@pytest.fixture
def place(filled, storage, tmp_path):
    return copied(filled, tmp_path / "home", storage)


def merge(place, **more):
    return compact(place.store, place.catalog, folder=place.home / "rewriting", **{"max_bytes": 2**20} | more)


def objects(place):
    return set(place.store.list("shards/"))


# -- compaction


def test_small_neighbours_become_one_with_the_same_samples_in_the_same_order(place):
    before, old = stored(place), objects(place)
    done = merge(place)
    assert (done.shards, done.merged, done.lost) == (2, 6, 0)
    assert sorted(stored(place)) == sorted(before) and len(place.catalog.rows()) == 2
    by_partition = sorted([b for u, b in stored(place)[i : i + 6]] for i in (0, 6))  # which of the two comes first is the fetcher's affair
    assert by_partition == sorted([picture(n) for n in range(p, 12, 2)] for p in (0, 1))
    assert objects(place) > old  # learners may be reading them
    assert merge(place).merged == 0


def test_only_small_neighbours_of_one_day_are_merged_up_to_the_limit():
    def runs(*rows, max_bytes=100):
        return [[r.key for r in run] for run in mergers(rows, max_bytes=max_bytes)]

    a, b, c, d = (row(i, i + 1, key="abcd"[i], bytes=25) for i in range(4))
    assert runs(a, b, c, d) == [["a", "b", "c", "d"]] and runs(d, c, a) == [["c", "d"]]
    assert runs(a, b, row(2, 3, key="big", bytes=26), d, row(4, 5, key="e", bytes=5)) == [["a", "b"], ["d", "e"]]
    assert runs(a, b, c, d, row(4, 5, key="e", bytes=5)) == [["a", "b", "c", "d"]]  # e would go over
    assert runs(row(0, 1, 0, key="p", bytes=1), row(1, 2, 1, key="q", bytes=1)) == []
    assert runs(a, replace(b, day="2026-11-22"), replace(c, day="2026-11-22")) == [["b", "c"]]


@killed_at(6, (2, "after"), (3, "after"))
def test_a_compaction_killed_at_any_step_is_ended_by_the_next(place, nth, when):
    knife = Knife(nth, when)
    before = sorted(stored(place))
    with pytest.raises(Killed):
        merge(under(knife, Place(place.home)))
    assert knife.calls == ["put", "put", "swap", "put", "put", "swap"][:nth] and sorted(stored(place)) == before
    merge(place)
    assert sorted(stored(place)) == before and len(place.catalog.rows()) == 2
    assert len([r for r in place.catalog.history() if r.status == REPLACED]) == 6
    named = {k for r in place.catalog.history() for k in (r.key, r.key.replace(".tar", ".parquet"))}
    assert objects(place) == named  # the second attempt made what the first had put


def test_a_merger_that_a_takedown_overtakes_is_left_out(place, base, monkeypatch):
    really, calls = place.catalog.replace, []

    def late(*args, **more):
        if not calls:
            calls.append(1)
            take_down(Place(place.home), url=f"{base}/4.jpg")
        return really(*args, **more)

    monkeypatch.setattr(place.catalog, "replace", late)
    assert merge(place).lost == 1
    assert f"{base}/4.jpg" not in dict(stored(place)) and len(stored(place)) == 11
    take_down(place, again=True)  # the merger's objects, which no row names, are the sweep's
    assert merge(place).merged == 3 and len(stored(place)) == 11


@folder_only
def test_a_fetcher_that_comes_back_owes_nothing_twice_after_a_compaction(place):
    merge(place)
    place.log.commit(GROUP, {(CANDIDATES, 0): 3})  # in the middle of the merged shard
    packer = Packer(place.log, place.store, place.catalog, retry_delays_s=(0.05, 0.05))
    assert packer.recover(CANDIDATES, 0) == 6 and place.log.bounds("retry.0", 0)[1] + place.log.bounds("retry.0", 1)[1] == 0


# -- expiry and purging


def test_what_is_older_than_the_window_ends_and_is_deleted_after_the_grace_time(place, monkeypatch):
    monkeypatch.setattr("ingest.expire.BATCH", 4)
    later, version = NOW + timedelta(days=91), place.catalog.version()
    assert expire(place.catalog, window=timedelta(days=90), at=NOW).shards == 0
    assert expire(place.catalog, window=timedelta(days=90), at=later, dry_run=True).samples == 12 and place.catalog.version() == version
    done = expire(place.catalog, window=timedelta(days=90), at=later)
    assert (done.shards, done.samples) == (6, 12) and place.catalog.version() == version + 2  # one commit a batch
    assert {r.status for r in place.catalog.history()} == {EXPIRED} and len(objects(place)) == 12
    assert purge(place.store, place.catalog, grace=WEEK, at=NOW + timedelta(days=6)).shards == 0
    assert purge(place.store, place.catalog, grace=WEEK, at=NOW + timedelta(days=8), dry_run=True).shards == 6 and len(objects(place)) == 12
    assert purge(place.store, place.catalog, grace=WEEK, at=NOW + timedelta(days=8)).shards == 6 and objects(place) == set()
    assert purge(place.store, place.catalog, grace=WEEK, at=NOW + timedelta(days=8)).shards == 0


def test_purging_leaves_what_is_live(place):
    merge(place)
    before = sorted(stored(place))
    assert purge(place.store, place.catalog, grace=ZERO, at=NOW + timedelta(days=1)).shards == 6
    assert sorted(stored(place)) == before and len(objects(place)) == 4
    assert [r.status for r in place.catalog.history()].count(LIVE) == 2


@pytest.mark.parametrize(("storage", "nth"), [("folder", 1), ("folder", 2), ("folder", 5), ("s3", 1)], indirect=["storage"])
def test_a_purge_killed_between_tar_and_sidecar_is_ended_by_the_next(place, nth):
    merge(place)
    knife = Knife(nth, "after")
    with pytest.raises(Killed):
        purge(under(knife, Place(place.home)).store, place.catalog, grace=ZERO, at=NOW + timedelta(days=1))
    purge(place.store, place.catalog, grace=ZERO, at=NOW + timedelta(days=1))
    assert len(objects(place)) == 4


# -- generations and refresh


def test_a_generation_is_cut_once(place):
    made = cut(place.store, place.catalog, name="2026Q4")
    assert (made.shards, made.samples, made.version) == (6, 12, place.catalog.version()) and made.window[0] <= made.window[1]
    assert generation(place.store, "2026Q4") == made
    with pytest.raises(ConfigError, match="2026Q4.*choose another"):
        cut(place.store, place.catalog, name="2026Q4")
    with pytest.raises(ConfigError, match="dataset cut --name 2027Q1"):
        generation(place.store, "2027Q1")
    (place.home / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to cut"):
        cut(place.store, Place(place.home / "empty").catalog, name="x")


def test_a_refresh_asks_again_with_validators_and_every_answer_ends_as_it_should(site, base, storage, tmp_path):
    site.be_well()
    place = fetched(tmp_path / "home", *(f"{base}/{n}.jpg" for n in range(20, 32)), storage=storage, max_samples=2, max_age_s=60)
    cut(place.store, place.catalog, name="q")
    site.gone, site.opted_out, site.changed, site.forgetful = {21}, {22}, {23: 99}, {24}
    site.asked.clear()
    assert refresh(place.log, place.store, place.catalog, name="q", rate=0).candidates == 12
    place = Place(place.home)
    fetch_until(place, covered)
    assert sorted(site.asked) == [(n, f'"{n}"') for n in range(20, 32)]
    again = {u.removeprefix(f"{base}/"): (o, r) for u, o, r in outcomes(place)[12:]}
    want = {f"{n}.jpg": ("unchanged", "") for n in [20, *range(25, 32)]}
    assert again == want | {
        "21.jpg": ("rejected", "gone"), "22.jpg": ("rejected", "opt_out"), "23.jpg": ("stored", ""), "24.jpg": ("duplicate", "same_bytes"),
    }  # fmt: skip
    assert {json.loads(v)["why"] for v in place.log.table(TAKEDOWNS).values()} == {"gone", "opt-out"}
    assert take_down(place).samples == 2  # what the refresh found is applied by the next run
    left = stored(place)
    assert len(left) == 11 and (f"{base}/23.jpg", picture(99)) in left and not {f"{base}/21.jpg", f"{base}/22.jpg"} & dict(left).keys()
    assert refresh(place.log, place.store, place.catalog, name="q", rate=0).candidates == 0


def test_an_ordinary_candidate_that_is_gone_takes_nothing_down(site, base, tmp_path):
    site.gone = {41}
    place = fetched(tmp_path / "home", f"{base}/40.jpg", f"{base}/41.jpg")
    assert place.log.table(TAKEDOWNS) == {}


def test_a_takedown_that_a_refresh_owes_survives_a_crash_after_the_commit(site, base, tmp_path):
    """Killed between the catalog's commit and the append: the next owner reads the sidecar, and appends it."""
    place = fetched(tmp_path / "home", f"{base}/50.jpg", f"{base}/51.jpg", max_samples=1, max_age_s=60)
    cut(place.store, place.catalog, name="q")
    site.gone = {50}
    refresh(place.log, place.store, place.catalog, name="q", rate=0)
    dying = place_with(place.home, Dying("retries"))
    with pytest.raises(Killed):
        fetch_until(dying, lambda p: False)
    assert Place(place.home).log.table(TAKEDOWNS) == {}
    place = Place(place.home)
    fetch_until(place, lambda p: covered(p) and p.log.table(TAKEDOWNS))
    assert [json.loads(v)["why"] for v in place.log.table(TAKEDOWNS).values()] == ["gone"]


@killed_at(4, (2, "after"))
def test_a_refresh_killed_anywhere_goes_on_and_misses_nothing(place, base, nth, when):
    cut(place.store, place.catalog, name="q")
    ends = [place.log.bounds(CANDIDATES, p)[1] for p in range(2)]
    with pytest.raises(Killed):
        refresh(under(Knife(nth, when), Place(place.home)).log, place.store, place.catalog, name="q", rate=0)
    merge(place)  # the cursor counts offsets: it holds whatever becomes of the shards
    refresh(place.log, place.store, place.catalog, name="q", rate=0)
    told = [json.loads(r.value) for p, end in enumerate(ends) for r in place.log.read(CANDIDATES, p, end, 1000)]
    assert {c["url"] for c in told} == {f"{base}/{n}.jpg" for n in range(12)} and all(c["purpose"] == "refresh" for c in told)
    assert len(told) <= 12 + 2  # at most the shard that was under the knife is asked for twice
    assert place.log.latest(SOURCE_STATE, b"refresh/q") is not None


@folder_only
def test_a_refresh_keeps_to_its_rate_and_a_dry_run_appends_nothing(place):
    cut(place.store, place.catalog, name="q")
    version, ends, slept = place.catalog.version(), [place.log.bounds(CANDIDATES, p) for p in range(2)], []
    place.log.ensure_topic(SOURCE_STATE, 2)
    assert refresh(place.log, place.store, place.catalog, name="q", rate=4, dry_run=True).candidates == 12
    assert [place.log.bounds(CANDIDATES, p) for p in range(2)] == ends and place.catalog.version() == version
    refresh(place.log, place.store, place.catalog, name="q", rate=4, sleep=slept.append)
    assert sum(slept) == 12 / 4
