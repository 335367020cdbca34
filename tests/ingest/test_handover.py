"""What leads to a host of another owner goes to that owner, and nothing is asked of it before."""

import asyncio
import dataclasses
import json
import math
import time

import pytest
from aiohttp import web

from ingest.fetch.client import Client, Fetched, Unanswered
from ingest.fetch.screen import Reason, Refused
from ingest.pack import Packer, Taken, Unit
from streamlearn.contract.candidate import MAX_BYTES, ROOM, VIA_CHARS, Candidate, politeness_key
from streamlearn.contract.event_log import CANDIDATES
from tests.ingest.server import Place
from tests.ingest.test_politeness import Watched, candidate, config, to, with_servers

OURS, THEIRS = "127.0.0.1", "127.0.0.2"


class Only:
    """One host is ours."""

    def __init__(self, *hosts):
        self.hosts = set(hosts)

    def since(self, host):
        return 0.0 if host in self.hosts else math.inf

    def sure(self):
        return True


def fetch(site, one, rights=None, settings=None):
    async def main():
        async with Client(settings or config(), rights=rights or Only(OURS)) as client:
            return await client.fetch(one() if callable(one) else one)

    return with_servers(site, main=main)


def elsewhere(site, path):
    return site.base.replace(OURS, THEIRS) + path


def to_theirs(site, path):
    """A redirect; where the site is, is known once it has started."""
    return lambda: web.Response(status=302, headers={"Location": elsewhere(site, path)})


class BothHosts(Watched):
    async def start(self):
        await super().start()
        await web.TCPSite(self.runner, THEIRS, self.runner.addresses[0][1]).start()


def test_a_redirect_to_anothers_host_is_handed_over_at_the_address_it_has_come_to():
    site = Watched()
    site.pages |= {"/1.jpg": to("/2.jpg"), "/2.jpg": to_theirs(site, "/3.jpg?a=1")}
    got = fetch(site, lambda: candidate(site.base + "/1.jpg"))
    assert isinstance(got, Unanswered) and (got.via, got.hops, got.asked) == (elsewhere(site, "/3.jpg?a=1"), 2, False)
    assert site.paths == ["/robots.txt", "/1.jpg", "/2.jpg"]


def test_its_owner_goes_on_from_there():
    site = Watched()
    given = lambda: dataclasses.replace(candidate("http://a.example/1.jpg"), via=site.base + "/3.jpg", hops=2)  # noqa: E731
    got = fetch(site, given)
    assert isinstance(got, Fetched) and got.final_url == site.base + "/3.jpg" and site.paths == ["/robots.txt", "/3.jpg"]


def test_redirects_are_counted_over_all_owners():
    site = Watched()
    site.pages["/3.jpg"] = to("/4.jpg")
    given = lambda: dataclasses.replace(candidate("http://a.example/1.jpg"), via=site.base + "/3.jpg", hops=5)  # noqa: E731
    got = fetch(site, given)
    assert isinstance(got, Refused) and got.reason == Reason.REDIRECTS and site.paths == ["/robots.txt", "/3.jpg"]


def test_a_candidate_in_the_wrong_partition_is_handed_over_before_anything_is_asked():
    site = Watched()
    got = fetch(site, lambda: candidate(site.base + "/1.jpg"), rights=Only(THEIRS))
    assert isinstance(got, Unanswered) and (got.via, got.hops) == (site.base + "/1.jpg", 0) and site.paths == []


def test_an_address_that_no_record_can_hold_is_refused():
    site = Watched()
    site.pages["/1.jpg"] = to_theirs(site, "/" + "x" * VIA_CHARS)
    got = fetch(site, lambda: candidate(site.base + "/1.jpg"))
    assert isinstance(got, Refused) and got.reason == Reason.BAD_URL and site.paths == ["/robots.txt", "/1.jpg"]


def test_a_robots_txt_that_lies_with_anothers_host_is_read_all_the_same():
    site = BothHosts()
    site.robots = to_theirs(site, "/rules.txt")
    site.pages["/rules.txt"] = lambda: web.Response(text="User-agent: *\nDisallow: /1")
    got = fetch(site, lambda: candidate(site.base + "/1.jpg"))
    assert isinstance(got, Refused) and got.reason == Reason.ROBOTS and site.paths == ["/robots.txt", "/rules.txt"]


@pytest.mark.parametrize("asked_for", ["/1.jpg", "/robots.txt"])
def test_requests_to_a_host_that_is_taken_away_have_ended_when_it_is_left(asked_for):
    site, rights = Watched(), Only(OURS)
    site.takes = 60.0

    async def main():
        async with Client(config(total_timeout_s=50.0, robots=asked_for == "/robots.txt", attempts=1), rights=rights) as client:
            task = asyncio.create_task(client.fetch(candidate(site.base + "/1.jpg")))
            while asked_for not in site.paths:
                await asyncio.sleep(0.01)
            rights.hosts.clear()
            await client.leave()
            assert not client._under_way
            return await task

    began = time.monotonic()
    got = with_servers(site, main=main)
    assert isinstance(got, Unanswered) and time.monotonic() - began < 40 and site.paths == [asked_for]


def retry_of(tmp_path, given, why):
    """The record that the packer makes of a candidate that got no answer."""
    place = Place(tmp_path)
    packer = Packer(place.log, place.store, place.catalog, retry_delays_s=(60.0, 600.0), clock=lambda: 1000.0)
    unit = Unit(CANDIDATES, 0, 0, tmp_path / "spool.tar", 0.0)
    packer.add(unit, Taken(0, given, why))
    unit.drop()
    (record,) = unit.after
    return record, json.loads(record.value)


GIVEN = candidate("http://a.example/1.jpg")
FAR = "http://b.example/2.jpg"


def test_what_is_handed_over_is_due_at_once_with_the_owner_of_its_address(tmp_path):
    record, found = retry_of(tmp_path, GIVEN, Unanswered("", asked=False, via=FAR, hops=1))
    assert (record.topic, record.key) == ("retry.0", politeness_key(FAR))
    assert found.get("attempt", 0) == 0 and (found["waits"], found["via"], found["hops"], found["not_before"]) == (1, FAR, 1, 1000.0)


def test_there_it_waits_its_turn_at_its_address(tmp_path):
    record, found = retry_of(tmp_path, dataclasses.replace(GIVEN, via=FAR, hops=1), Unanswered("", 30.0, asked=False))
    assert record.key == politeness_key(FAR) and (found["via"], found["hops"], found["not_before"]) == (FAR, 1, 1060.0)


def test_a_new_attempt_begins_at_the_url_again(tmp_path):
    """Where a redirect led an hour ago may be nowhere now."""
    record, found = retry_of(tmp_path, dataclasses.replace(GIVEN, via=FAR, hops=1), Unanswered("HTTP 503"))
    assert record.key == politeness_key(GIVEN.url) and "via" not in found and (found["hops"], found["attempt"]) == (0, 1)


def test_the_longest_candidate_and_the_longest_address_fit_into_a_record():
    longest = Candidate(url="http://a.example/", source="s", source_ref="", discovered_at="2026-11-21T00:00:00Z")
    longest = dataclasses.replace(longest, alt="x" * (MAX_BYTES - len(longest.to_json()) - len(',"alt":""')))
    assert len(longest.to_json()) == MAX_BYTES
    told = dataclasses.replace(
        longest,
        via="x" * VIA_CHARS,
        hops=2**31 - 1,
        waits=1000,
        attempt=100,
        not_before=1.8e9 + 1 / 3,
        origin="candidates@1000/1000/" + "9" * 19,
    )
    assert Candidate.from_json(told.to_json(MAX_BYTES + ROOM)) == told
