"""Takedown over shards that the real fetch role sealed: nothing of it stays, everything else stays as it was, wherever it is killed."""

import hashlib
import json

import pytest

from ingest.compact import compact
from ingest.denied import Denied, Selector
from ingest.fetch import run
from ingest.takedown import APPLIED, DENIED, denial
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import Conflict
from streamlearn.contract.event_log import TAKEDOWNS, SqliteLog
from tests.crash.sealing import Killed, fetch_until
from tests.ingest.life import Ageing, copied, coverage, covered, fetched, folder_only, killed_at, outcomes, stored, take_down, tell, traces
from tests.ingest.server import Place, picture, serving

N = 22  # and two more: four shards of six offsets, each match in one of its own


@pytest.fixture(scope="module")
def base():
    with serving(Ageing()) as address:
        yield address


@pytest.fixture(scope="module")
def filled(base, storage, tmp_path_factory):
    home = tmp_path_factory.mktemp("filled")
    urls = [*(f"{base}/{n}.jpg" for n in range(N)), f"{base}/moved/3.jpg", f"{base}/trouble/page"]
    fetched(home, *urls, storage=storage, max_samples=6, max_age_s=60)
    return home


@pytest.fixture
def place(filled, storage, tmp_path):
    return copied(filled, tmp_path / "home", storage)


def test_selectors_match_what_they_name_and_nothing_else():
    denied = Denied(
        s.key for s in (Selector.of("host", "Bad.Example."), Selector.of("url", "http://a.example/x.jpg"), Selector.of("sha256", "AB" * 32))
    )
    for url in ("http://bad.example/1", "https://cdn.bad.example:8443/1", "http://a.b.BAD.example/", "http://a.example/x.jpg"):
        assert denied.url(url), url
    for url in (
        "http://notbad.example/1",
        "http://bad.example.org/1",
        "http://a.example/x.jpg?1",
        "http://example/",
        "",
        "http://[",
        "file:///x",
    ):
        assert not denied.url(url), url
    assert denied.image("ab" * 32) and not denied.image("ac" * 32) and not Denied().url("http://bad.example/")
    for kind, value in (("host", "http://a.example"), ("host", ""), ("url", " "), ("sha256", "abc"), ("colour", "red")):
        with pytest.raises(ValueError, match="must be"):
            Selector.of(kind, value)


@pytest.mark.parametrize(("storage", "kind"), [("folder", "url"), ("folder", "sha256"), ("s3", "url")], indirect=["storage"])
def test_nothing_of_it_stays_and_all_else_stays_as_it_was(place, base, kind):
    before, ranges, url, body = stored(place), coverage(place), f"{base}/3.jpg", picture(3)
    done = take_down(place, **{kind: url if kind == "url" else hashlib.sha256(body).hexdigest()})
    assert (done.shards, done.samples, done.purged) == (2, 2, 2)  # itself, and the way round to it
    assert stored(place) == [(u, b) for u, b in before if b != body] and coverage(place) == ranges
    assert traces(place, url, body) == []
    assert outcomes(place).count(("", "rejected", "taken_down")) == 2
    (value,) = (json.loads(v) for v in place.log.table(TAKEDOWNS).values())
    assert value["state"] == APPLIED and value["samples"] == 2 and (value["by"], value["why"]) == ("test", "asked")
    assert base not in json.dumps(value) and "3.jpg" not in json.dumps(value)


@folder_only
def test_a_host_takes_all_of_it_and_a_second_run_has_nothing_to_do(place):
    assert take_down(place, host="127.0.0.1").samples == N + 1 and stored(place) == []
    again = take_down(place, host="127.0.0.1")
    assert (again.shards, again.samples, again.emptied, again.purged) == (0, 0, 0, 0)
    assert {reason for _, _, reason in outcomes(place)} == {"taken_down"}


def test_what_only_tells_of_it_is_emptied_in_place(place, base):
    keys = [r.key for r in place.catalog.rows()]
    done = take_down(place, url=f"{base}/trouble/page")
    assert (done.shards, done.emptied) == (0, 1) and [r.key for r in place.catalog.rows()] == keys
    assert f"{base}/trouble/page" not in [u for u, *_ in outcomes(place)] and len(stored(place)) == N + 1


@folder_only
def test_a_dry_run_counts_and_changes_nothing(place, base):
    version, keys = place.catalog.version(), place.store.list("shards/")
    done = take_down(place, url=f"{base}/3.jpg", dry_run=True)
    assert (done.shards, done.samples) == (2, 2)
    assert (place.catalog.version(), place.store.list("shards/"), place.log.table(TAKEDOWNS)) == (version, keys, {})


def test_objects_that_a_compaction_left_for_the_grace_time_are_purged_too(place, base):
    assert compact(place.store, place.catalog, folder=place.home / "r", max_bytes=2**20).merged == 4
    assert len(traces(place, f"{base}/3.jpg", picture(3))) == 8  # two tars and sidecars, old and new
    take_down(place, url=f"{base}/3.jpg")
    assert traces(place, f"{base}/3.jpg", picture(3)) == []


def test_a_compaction_that_comes_between_makes_it_begin_anew(place, base, monkeypatch):
    replace, calls = place.catalog.replace, []

    def late(*args, **more):
        if not calls:
            calls.append(1)
            compact(
                place.store,
                DeltaCatalog(place.catalog.uri, log_id="x", storage_options=place.catalog.storage_options),
                folder=place.home / "c",
                max_bytes=2**20,
            )
        return replace(*args, **more)

    monkeypatch.setattr(place.catalog, "replace", late)
    before = stored(place)
    take_down(place, url=f"{base}/3.jpg")
    assert traces(place, f"{base}/3.jpg", picture(3)) == [] and len(stored(place)) == len(before) - 2


class Knife:
    """Dies at the n-th call of all seams together, before or after it happens."""

    def __init__(self, nth, when):
        self.left, self.when, self.calls = nth, when, []

    def around(self, name, call):
        self.calls.append(name)
        self.left -= 1
        if self.left == 0 and self.when == "before":
            raise Killed
        result = call()
        if self.left == 0 and self.when == "after":
            raise Killed
        return result


def under(knife, place):
    """The place, with every writing seam under the knife."""

    class Log(SqliteLog):
        def append(self, records):
            return knife.around("append", lambda: SqliteLog.append(self, records))

    class Store(type(place.store)):
        def put_file(self, key, path):
            return knife.around("put", lambda: super(Store, self).put_file(key, path))

        def delete(self, key):
            return knife.around("delete", lambda: super(Store, self).delete(key))

    class Catalog(DeltaCatalog):
        def _swap(self, *args):
            return knife.around("swap", lambda: DeltaCatalog._swap(self, *args))

    place.log, place.store = Log(place.home / "log.sqlite"), Store(getattr(place.store, "config", None) or place.store.root)
    place.catalog = Catalog(place.catalog.uri, log_id=place.log.log_id, storage_options=place.catalog.storage_options)
    return place


STEPS = ["append", "put", "put", "put", "put", "swap", "put", "delete", "delete", "delete", "delete", "append"]


@killed_at(len(STEPS), (6, "before"), (6, "after"), (8, "after"))
def test_killed_at_any_step_and_run_again_nothing_is_left_half_done(place, base, nth, when):
    knife = Knife(nth, when)
    before, url = stored(place), f"{base}/3.jpg"
    place.log.append([denial(Selector.of("url", f"{base}/trouble/page"), reason="", by="")])  # another one, not applied: it goes too
    with pytest.raises(Killed):
        take_down(under(knife, Place(place.home)), url=url)
    assert knife.calls == STEPS[:nth]
    survivors = stored(place)
    assert survivors in (before, [(u, b) for u, b in before if b != picture(3)])  # never half of it
    take_down(place, **({"url": url} if (nth, when) == (1, "before") else {}))  # not even told: it must be told again
    assert stored(place) == [(u, b) for u, b in before if b != picture(3)]
    named = {k for r in place.catalog.rows() for k in (r.key, r.key.replace(".tar", ".parquet"))}
    assert [k for k in traces(place, url, picture(3)) if k in named] == traces(place, url, picture(3)) == []
    assert {json.loads(v)["state"] for v in place.log.table(TAKEDOWNS).values()} == {APPLIED}


@folder_only
def test_a_conflict_that_does_not_end_is_told(place, base, monkeypatch):
    def never(*args, **more):
        raise Conflict("someone else")

    monkeypatch.setattr(place.catalog, "replace", never)
    with pytest.raises(Conflict):
        take_down(place, url=f"{base}/3.jpg")
    (value,) = (json.loads(v) for v in place.log.table(TAKEDOWNS).values())
    assert value["state"] == DENIED


def test_the_fetcher_neither_asks_for_what_was_taken_down_nor_keeps_its_bytes(tmp_path):
    site = Ageing()
    with serving(site) as address:
        place = fetched_denied(tmp_path, address)
        assert {u for u, _ in stored(place)} == {f"{address}/4.jpg"}
        assert [o for o in outcomes(place) if o[2] == "taken_down"] == [("", "rejected", "taken_down")] * 4
        assert {n for n, _ in site.asked} == {2, 4}  # 2 is denied by its bytes alone
        letters = [r.value for p in range(2) for r in place.log.read("dead-letters", p, 0, 100)]
        assert len(letters) == 4 and not any(b"jpg" in letter for letter in letters)


def fetched_denied(home, address):
    """1 by its url, 2 by its bytes, 3 by where a redirect leads; and 4, which nobody minds."""
    home.mkdir(exist_ok=True)
    log = SqliteLog(home / "log.sqlite")
    log.ensure_topic(TAKEDOWNS, 2)
    named = [("url", f"{address}/1.jpg"), ("sha256", hashlib.sha256(picture(2)).hexdigest()), ("url", f"{address}/3.jpg")]
    log.append([denial(Selector.of(*s), reason="", by="") for s in named])
    return fetched(home, *(f"{address}/{path}.jpg" for path in ("1", "2", "moved/3", "3", "4")))


def test_what_is_taken_down_while_its_unit_is_open_is_not_sealed(tmp_path, monkeypatch):
    """It was fetched in good faith: the unit is dropped before it is sealed, and the offsets are fetched again."""
    monkeypatch.setattr(run, "DENIED_S", 0.05)
    site = Ageing()
    with serving(site) as address:
        place = Place(tmp_path)
        place.config = place.config.model_copy(
            update={"shard": place.config.shard.model_copy(update={"max_samples": 1000, "max_age_s": 3.0})}
        )
        tell(place.log, f"{address}/1.jpg", f"{address}/2.jpg")
        told = []

        def done(watcher):
            if not told and {n for n, _ in site.asked} == {1, 2}:
                watcher.log.append([denial(Selector.of("url", f"{address}/1.jpg"), reason="", by="")])
                told.append(1)
            return covered(watcher)

        fetch_until(place, done)
        assert [u for u, _ in stored(place)] == [f"{address}/2.jpg"] and [n for n, _ in site.asked].count(1) == 1
