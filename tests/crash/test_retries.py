"""Who decides that a candidate is tried again, and that it is tried once: the packer's seams one by one."""

from dataclasses import replace

import pytest

from ingest.fetch.client import Fetched, Unanswered
from ingest.fetch.screen import screen
from ingest.pack import GROUP, Packer, Taken, Unit
from streamlearn.contract.candidate import MAX_BYTES, Candidate
from streamlearn.contract.errors import Fenced, StoreFull
from streamlearn.contract.event_log import CANDIDATES, DEAD_LETTERS, NewRecord, SqliteLog, retry_topic
from streamlearn.contract.shards import DEAD, DEFERRED, DUPLICATE, STORED
from tests.crash.sealing import PARTITIONS, Dying, DyingLog, Killed, feed, fetch_until, rows_of
from tests.ingest.server import Place, Site, picture, serving


def place_of_one(home):
    """A place whose log holds one candidate, in topics of one partition."""
    place = Place(home)
    for topic in (CANDIDATES, DEAD_LETTERS, "shards", retry_topic(0)):
        place.log.ensure_topic(topic, 1)
    candidate = Candidate(url="http://a.example/1.jpg", source="t", source_ref="7", discovered_at="2026-11-21T00:00:00Z")
    place.log.append([NewRecord(CANDIDATES, b"", candidate.to_json())])
    return place, candidate


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
    units[0].drop()
    assert list(tmp_path.glob("*.tar")) + list(tmp_path.glob("*.parquet")) == []  # a fetcher that is fenced often must not fill its disk


def test_what_the_log_has_dropped_is_retried_from_the_sidecar(tmp_path):
    place, candidate = place_of_one(tmp_path)
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


def test_of_one_url_met_twice_and_deferred_twice_each_sidecar_row_says_whose_end_it_is(tmp_path):
    place, candidate = place_of_one(tmp_path)
    body = picture(1)
    got = Fetched(body, screen(body, max_pixels=10**6, min_side=8), candidate.url, "2026-11-21T00:00:00Z", 200)
    packer, unit = Packer(place.log, place.store, place.catalog, retry_delays_s=(0.1,)), Unit(retry_topic(0), 0, 0, tmp_path / "0.tar", 0.0)
    for offset, origin in enumerate(("candidates/0/0", "candidates/0/5")):
        packer.add(unit, Taken(offset, replace(candidate, attempt=1, origin=origin), got))
    told = [(o.outcome, o.origin, o.attempt, o.source_ref, o.http_status) for o in unit.outcomes]
    assert told == [(STORED, "candidates/0/0", 1, "7", 200), (DUPLICATE, "candidates/0/5", 1, "7", 200)]
    assert unit.outcomes[1].sha256 == unit.outcomes[0].sha256


def test_a_retry_that_stands_in_the_log_twice_is_stored_once(tmp_path):
    """What a zombie that woke up between steps 4 and 5 leaves; one of the two may even lie below the position."""
    with serving(Site()) as base:
        place = Place(tmp_path)
        feed(place.log, base, [])
        place.log.ensure_topic(retry_topic(0), PARTITIONS)
        again = Candidate(
            url=f"{base}/1.jpg", source="t", source_ref="1", discovered_at="2026-11-21T00:00:00Z", attempt=1, origin="candidates/0/0"
        )
        for _ in range(2):  # each pair in a run of its own: within one unit, and beyond a restart
            place.log.append([NewRecord(retry_topic(0), b"", again.to_json(), 0)] * 2)
            end = place.log.bounds(retry_topic(0), 0)[1]
            fetch_until(Place(tmp_path), lambda p, end=end: p.catalog.position(retry_topic(0), 0) == end)
    assert [(o["outcome"], o["reason"]) for _, _, o in rows_of(place)] == [(STORED, "")] + [(DUPLICATE, "same_retry")] * 3


class FullAtCommit(SqliteLog):
    def commit(self, group, offsets):
        raise StoreFull("no space left", after_s=0.01)


def test_a_full_log_after_the_commit_is_tried_again_without_telling_twice(tmp_path):
    place, candidate = place_of_one(tmp_path)
    packer = Packer(place.log, place.store, place.catalog, retry_delays_s=(0.1,))
    unit = Unit(CANDIDATES, 0, 0, tmp_path / "0.tar", 0.0)
    packer.add(unit, Taken(0, candidate, Unanswered("timed out")))
    place.log._db.execute(f"PRAGMA max_page_count={place.log._db.execute('PRAGMA page_count').fetchone()[0]}")
    ballast = 0
    with pytest.raises(StoreFull):  # the log's own file is full to the last page: nothing more can be appended
        while ballast < 10_000:
            ballast += len(place.log.append([NewRecord("shards", b"", bytes(100))]))
    for _ in range(2):
        with pytest.raises(StoreFull):
            packer.seal(unit)
    assert packer.catalog.position(CANDIDATES, 0) == 1
    place.log._db.execute("PRAGMA max_page_count=100000")
    place.log.__class__ = FullAtCommit  # the append fits, the group offset does not
    with pytest.raises(StoreFull):
        packer.seal(unit)
    place.log.__class__ = SqliteLog
    packer.seal(unit)
    assert place.log.bounds(retry_topic(0), 0)[1] == 1 and place.log.bounds("shards", 0)[1] == ballast + 1


def deferred(tmp_path, *answers, delays=(300.0, 3600.0, 86400.0), **fields):
    """The topics and candidates that one candidate goes through."""
    place, found = Place(tmp_path), []
    packer = Packer(place.log, place.store, place.catalog, retry_delays_s=delays, clock=lambda: 1000.0)
    candidate = Candidate(url="http://a.example/1.jpg", source="t", source_ref="7", discovered_at="2026-11-21T00:00:00Z", **fields)
    for number, answer in enumerate(answers):
        unit = Unit(CANDIDATES, 0, number, tmp_path / f"{number}.tar", 0.0)
        outcome = packer.add(unit, Taken(number, candidate, answer))
        found.append((outcome.outcome, outcome.reason))
        candidate = Candidate.from_json(unit.after[0].value) if outcome.outcome == DEFERRED else candidate
    return found, candidate


def test_who_is_asked_in_vain_goes_through_every_delay_and_is_dead_after_the_last(tmp_path):
    found, last = deferred(tmp_path, *[Unanswered("HTTP 500")] * 4)
    assert found == [(DEFERRED, "retry.0"), (DEFERRED, "retry.1"), (DEFERRED, "retry.2"), (DEAD, "no_answer")]
    assert (last.attempt, last.waits, last.not_before) == (3, 0, 1000.0 + 86400)


def test_a_time_that_a_server_names_is_waited_for_in_a_topic_whose_records_all_wait_as_long(tmp_path):
    """Else its retry would stand before others that are due, for a day."""
    found, last = deferred(tmp_path, Unanswered("HTTP 429", 4000.0))
    assert found == [(DEFERRED, "retry.2")] and last.not_before == 1000.0 + 86400


def test_whose_turn_it_is_not_loses_no_attempt(tmp_path):
    busy = Unanswered("the host has no turn", 400.0, asked=False)
    found, last = deferred(tmp_path, *[busy] * 5, Unanswered("HTTP 500"), busy)
    assert found == [(DEFERRED, "retry.1")] * 5 + [(DEFERRED, "retry.0"), (DEFERRED, "retry.1")]
    assert (last.attempt, last.waits) == (1, 6)
    assert deferred(tmp_path, busy, waits=1000)[0] == [(DEAD, "no_answer")]


def test_a_candidate_as_large_as_may_be_can_be_tried_again(tmp_path):
    base = Candidate(url="http://a.example/1.jpg", source="t", source_ref="7", discovered_at="2026-11-21T00:00:00Z", alt="x")
    alt = "x" * (1 + MAX_BYTES - len(base.to_json()))
    found, last = deferred(tmp_path, *[Unanswered("HTTP 500")] * 3, alt=alt)
    assert [f for f, _ in found] == [DEFERRED] * 3 and last.alt == alt
