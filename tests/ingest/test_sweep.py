"""What no row names: listed with its age, and swept once it is old, whatever happens meanwhile."""

import os
import time

import pytest

from ingest import audit
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.event_log import CANDIDATES, NewRecord
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import sidecar_key
from tests.crash.sealing import feed, fetch_until, settled
from tests.ingest.dataset import crafted, path_of, put, verify
from tests.ingest.server import Place, Site, serving

DAY = 86400.0


def old(path, age_s=2 * DAY):
    at = time.time() - age_s
    os.utime(path, (at, at))
    return path


def test_orphans_are_listed_with_their_age_and_wrong_once_they_are_old(place):
    place.store.put("shards/dt=2026-11-21/candidates/0/lost.tar", b"x")
    report = verify(place)
    assert report.good and [o.key.rpartition("/")[2] for o in report.orphans] == ["lost.tar"] and 0 <= report.orphans[0].age_s < 60
    old(path_of(place, report.orphans[0].key))
    (finding,) = verify(place).findings
    assert (finding.kind, finding.where) == ("orphan", report.orphans[0].key) and "48.0 h" in finding.what and "sweep" in finding.remedy


def orphans(place, count=4):
    keys = [f"shards/dt=2026-11-19/candidates/0/{n}.tar" for n in range(count)]
    for key in keys:
        place.store.put(key, b"x")
        old(path_of(place, key))
    return keys


def sweep(place, store=None, **more):
    return audit.sweep(store or place.store, place.catalog, **dict(dry_run=False) | more)


def test_sweep_deletes_what_is_old_and_unnamed_and_nothing_else(place):
    before = place.store.list("shards/")
    for key in before:
        old(path_of(place, key))
    keys = orphans(place)
    young, outside = "shards/dt=2026-11-21/candidates/0/young.tar", "rounds/00000000.json"
    place.store.put(young, b"x")
    place.store.put(outside, b"x")
    old(path_of(place, outside))
    assert [o.key for o in sweep(place, dry_run=True).deleted] == keys and place.store.list("shards/dt=2026-11-19") == keys
    swept = sweep(place)
    assert [o.key for o in swept.deleted] == keys and [o.key for o in swept.young] == [young]
    assert place.store.list("shards/") == sorted([*before, young]) and place.store.get(outside) == b"x"
    assert sweep(place).deleted == () and verify(place).good


def test_sweep_never_deletes_what_a_row_names_live_or_not(place):
    end = place.catalog.position(CANDIDATES, 0)
    row, before = crafted(end, end + 1, status="replaced", replaces="shards/a.tar,shards/b.tar"), place.store.list("shards/")
    put(place, row)
    for key in (row.key, sidecar_key(row.key), "shards/a.tar", "shards/b.parquet", "shards/c.tar"):
        place.store.put(key, b"x")
        old(path_of(place, key))
    assert [o.key for o in sweep(place).deleted] == ["shards/c.tar"] and set(before) < set(place.store.list("shards/"))


def test_the_age_is_that_of_the_last_put_to_the_second(place):
    (key,) = orphans(place, 1)
    put_at = place.store.modified(key)
    assert sweep(place, older_than_s=100, clock=lambda: put_at + 99.9).deleted == ()
    place.store.put(key, b"x")  # an attempt that is repeated makes it young
    assert sweep(place).deleted == ()
    old(path_of(place, key), 101)
    assert len(sweep(place, older_than_s=100).deleted) == 1


@pytest.mark.parametrize("nth", [1, 3])
def test_a_sweep_killed_in_the_middle_is_finished_by_the_next(place, nth):
    keys, calls = orphans(place), []

    class Killed(BaseException): ...

    class Dying(FolderStore):
        def delete(self, key):
            calls.append(key)
            if len(calls) == nth:
                raise Killed
            super().delete(key)

    with pytest.raises(Killed):
        sweep(place, Dying(place.store.root))
    assert [k for k in place.store.list("shards/") if k in keys] == keys[nth - 1 :]
    assert [o.key for o in sweep(place).deleted] == keys[nth - 1 :] and verify(place).good


def test_what_is_committed_between_the_listing_and_the_reading_of_the_rows_is_safe(place):
    """Its objects are old: a unit that waited long for the catalog.  Only the order of the two reads saves it."""
    end = place.catalog.position(CANDIDATES, 0)
    place.log.append([NewRecord(CANDIDATES, b"", b"{}", 0)])
    row = crafted(end, end + 1)
    for key in (row.key, sidecar_key(row.key)):
        place.store.put(key, b"x")
        old(path_of(place, key))

    class Racing(FolderStore):
        def list(self, prefix):
            listed = super().list(prefix)
            put(place, row)
            return listed

    assert sweep(place, Racing(place.store.root)).deleted == ()
    assert place.store.get(row.key) == b"x"


def test_what_is_swept_by_someone_else_meanwhile_is_no_fault(place):
    keys = orphans(place)

    class Racing(FolderStore):
        def list(self, prefix):
            listed = super().list(prefix)
            self.delete(keys[0])
            return listed

    assert [o.key for o in sweep(place, Racing(place.store.root)).deleted] == keys[1:]


def test_a_lost_catalog_takes_nothing_with_it(place, tmp_path):
    orphans(place)
    before = place.store.list("")
    with pytest.raises(Corrupt, match="nothing is swept"):
        audit.sweep(place.store, DeltaCatalog(str(tmp_path / "empty"), log_id="log"), dry_run=False)
    assert place.store.list("") == before
    with pytest.raises(ValueError):
        sweep(place, older_than_s=-1)


def test_while_the_fetcher_is_at_work_nothing_is_wrong_and_nothing_is_swept(tmp_path):
    looks, finished = [], settled(60)

    def look(watcher):
        report = verify(watcher)
        looks.append((report.shards, [(f.kind, f.where, f.what) for f in report.findings], sweep(watcher).deleted))
        return finished(watcher)

    with serving(Site()) as base:
        feeding = Place(tmp_path)
        feed(feeding.log, base, [f"{n}.jpg" for n in range(60)])
        fetch_until(feeding, look)
    assert all(findings == [] and deleted == () for _, findings, deleted in looks)
    assert len({shards for shards, *_ in looks}) > 1 and verify(Place(tmp_path)).good
