"""The catalog on S3 when the network lies.  The suite of all catalogs is tests/contract's."""

import pytest

from streamlearn.contract import upkeep
from streamlearn.contract.errors import Corrupt, Retryable
from tests.adapters.faultproxy import Fault
from tests.contract.test_catalog import advance, on_s3, row

ALWAYS = 999
ENTRY = r"_delta_log/\d+\.json"


@pytest.fixture
def proxy(bucket):
    with bucket.behind_faults() as proxy:
        yield proxy


@pytest.fixture
def where(bucket, proxy):
    return on_s3(bucket.config(endpoint_url=proxy.url))


@pytest.fixture
def catalog(where):
    catalog = where.catalog(attempts=2)
    catalog.commit([row(0, 5)], [advance(0, 5)])
    return catalog


@pytest.mark.parametrize("act", ["answer", "reset_before", "reset_after"])
@pytest.mark.parametrize("tries", [1, 2])
def test_one_fault_at_the_commit_point_and_it_is_committed_exactly_once(bucket, proxy, catalog, act, tries):
    """With one try nothing repeats the PUT but we; with two delta-rs does, and may hear 412 from its own success."""
    catalog = on_s3(bucket.config(endpoint_url=proxy.url, attempts=tries)).catalog()
    proxy.faults = [Fault(act, "PUT", ENTRY)]
    version = catalog.commit([row(5, 9)], [advance(5, 9)])
    assert proxy.requests("PUT").count(act) == 1 and version == catalog.version() == 2
    assert [r.key for r in catalog.rows()] == ["shards/0/0-5", "shards/0/5-9"] and catalog.position("candidates", 0) == 9


@pytest.mark.parametrize("act", ["answer", "reset_before", "reset_after"])
def test_one_fault_at_the_making_of_the_table_is_survived(proxy, where, act):
    proxy.faults = [Fault(act, "PUT", ENTRY)]
    catalog = where.catalog()
    catalog.commit([row(0, 5)], [advance(0, 5)])
    assert proxy.requests("PUT").count(act) == 1 and len(catalog.rows()) == 1


CALLS = {
    "version": lambda c: c.version(),
    "position": lambda c: c.position("candidates", 0),
    "rows": lambda c: c.rows(),
    "commit": lambda c: c.commit([row(5, 9)], [advance(5, 9)]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("known", [True, False], ids=["open", "new"])
@pytest.mark.parametrize("act", ["answer", "reset_before", "reset_after"])
def test_a_store_out_of_reach_is_a_fault_that_passes_and_never_a_damaged_table(proxy, where, catalog, call, known, act):
    proxy.faults = [Fault(act, method, times=ALWAYS) for method in ("GET", "PUT", "HEAD")]
    with pytest.raises(Retryable, match=f"{where.uri}.*cannot be reached.*{proxy.url}"):
        CALLS[call](catalog if known else where.catalog())
    proxy.faults = []
    assert catalog.position("candidates", 0) == 5 and len(catalog.rows()) == 1


@pytest.mark.parametrize("call", ["position", "commit"])
@pytest.mark.parametrize("known", [True, False], ids=["open", "new"])
@pytest.mark.parametrize("act", ["answer", "reset_before"])
def test_a_store_that_goes_out_of_reach_between_the_log_and_its_positions_is_a_fault_that_passes(
    proxy, where, catalog, monkeypatch, call, known, act
):
    """delta-rs reads the log once more to tell a position."""
    read_by = catalog if known else where.catalog(attempts=2)
    opened = read_by._open

    def then_out_of_reach():
        table = opened()
        proxy.faults = [Fault(act, method, times=ALWAYS) for method in ("GET", "PUT", "HEAD")]
        return table

    monkeypatch.setattr(read_by, "_open", then_out_of_reach)
    with pytest.raises(Retryable, match="cannot be reached"):
        CALLS[call](read_by)


@pytest.mark.parametrize("act", ["answer", "truncate"])
def test_rows_out_of_reach_are_a_fault_that_passes(proxy, catalog, act):
    proxy.faults = [Fault(act, "GET", "parquet", keep=10, times=ALWAYS)]
    with pytest.raises(Retryable, match="cannot be reached"):
        catalog.rows()


def test_rows_that_are_gone_are_damage(proxy, catalog):
    proxy.faults = [Fault("answer", "GET", "parquet", status=404, code="NoSuchKey", times=ALWAYS)]
    with pytest.raises(Corrupt, match="names a file that cannot be read"):
        catalog.rows()


def test_a_table_that_cannot_be_made_is_a_fault_that_passes(proxy, where):
    proxy.faults = [Fault("answer", "PUT", times=ALWAYS)]
    with pytest.raises(Retryable, match="cannot be reached"):
        where.catalog(attempts=1).commit([row(0, 5)], [advance(0, 5)])


@pytest.mark.parametrize(("method", "what"), [("PUT", "checkpoint"), ("GET", "part-"), ("PUT", "part-")])
def test_a_commit_stands_though_the_upkeep_after_it_fails(proxy, catalog, monkeypatch, caplog, method, what):
    monkeypatch.setattr(upkeep, "TIDY_EVERY", 2)
    tidy = upkeep.tidy

    def out_of_reach(table, since):
        proxy.faults = [Fault("answer", method, what, times=ALWAYS)]
        tidy(table, since)
        proxy.faults = []

    monkeypatch.setattr(upkeep, "tidy", out_of_reach)
    assert catalog.commit([row(5, 9)], [advance(5, 9)]) == 2
    assert "not tidied at version 2" in caplog.text and len(catalog.rows()) == 2


def test_what_is_new_is_read_from_new_files_alone(proxy, catalog):
    for i in range(5, 15):
        catalog.commit([row(i, i + 1)], [advance(i, i + 1)])
    proxy.seen.clear()
    assert [r.first_offset for r in catalog.follow(catalog.version() - 2)[1]] == [13, 14]
    assert len({path for method, path, _ in proxy.seen if method == "GET" and "/part-" in path}) == 2
    proxy.seen.clear()
    assert [r.first_offset for r in catalog.covering("candidates", 0, 9, 12)] == [9, 10, 11]
    assert len({path for method, path, _ in proxy.seen if method == "GET" and "/part-" in path}) == 3
