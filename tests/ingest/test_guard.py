"""No spelling of a private address is connected to; real sockets, real client."""

import asyncio

import pytest

from ingest.fetch.client import Client, Fetched
from ingest.fetch.guard import Guard, complaint
from ingest.fetch.screen import Reason, Refused
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import FetchConfig
from tests.ingest.server import FETCH, Site, serving


def fetch(url, config):
    async def go():
        async with Client(config) as client:
            return await client.fetch(Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z"))

    return asyncio.run(go())


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::", "2001::1", "ff02::1", "::7f00:1", "fec0::1", "100::1", "2001:db8::1",
    "168.63.129.16", "::ffff:168.63.129.16", "::ffff:0:7f00:1", "fd20:ce::254",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_private_address_is_refused_unless_its_network_is_exempt(address):
    assert not Guard().allows(address)
    plain = address.partition("%")[0]
    assert Guard((f"{plain}/{128 if ':' in plain else 32}",)).allows(address)


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808", "::ffff:0:808:808", "168.63.129.17"]
)
def test_a_public_address_is_allowed(address):
    assert Guard().allows(address)


SPELLINGS = [
    "127.0.0.1",
    "localhost",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "127.1",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "127.0.0.1.",
    "0",
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_the_machine_itself_reaches_its_server(host):
    site = Site()
    with serving(site) as base:
        port = base.rsplit(":", 1)[1]
        result = fetch(f"http://{host}:{port}/1.jpg", FetchConfig(total_timeout_s=1.0, attempts=1))
    assert not isinstance(result, Fetched) and site.hits == {}
    if host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]"):
        assert isinstance(result, Refused) and result.reason in (Reason.ADDRESS, Reason.BAD_URL)


@pytest.mark.parametrize(("name", "reason"), [("to-private", Reason.ADDRESS), ("to-file", Reason.BAD_URL)])
def test_a_redirect_leads_to_no_guarded_place(name, reason):
    with serving(Site()) as base:
        result = fetch(f"{base}/trouble/{name}", FETCH)
    assert isinstance(result, Refused) and result.reason == reason


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://x/a.jpg", "scheme"),
        ("gopher://x/", "scheme"),
        ("//x/a.jpg", "scheme"),
        ("http:///a.jpg", "no host"),
        ("http://user:secret@x/a.jpg", "credentials"),
        ("http://x:99999/", "not a URL"),
        ("http://[::1/", "not a URL"),
        ("http://x:0/", "port 0"),
    ],
)
def test_what_is_no_plain_web_address_is_not_asked_for(url, why):
    assert why in complaint(url)


def test_an_exempt_network_is_reached():
    with serving(Site()) as base:
        assert isinstance(fetch(f"{base}/1.jpg", FETCH), Fetched)
