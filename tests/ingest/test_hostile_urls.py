"""Sixty and more ways to point a fetcher at its own house.  A trap listens on the loopback interface: nothing may ever reach it."""

import asyncio
from contextlib import suppress
from urllib.parse import quote, unquote_to_bytes

import pycurl
import pytest

from ingest.fetch.client import Client, Fetched
from ingest.fetch.screen import Reason, Refused
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import FetchConfig

HOSTS = [
    # literals
    "127.0.0.1", "127.0.0.2", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1",
    # decimal, hexadecimal, octal, short
    "2130706433", "0x7f000001", "0x7f.0x0.0x0.0x1", "0x7f.1", "0177.0.0.1", "017700000001", "0177.1", "127.1", "127.0.1", "0", "0x0", "00000177.0.0.1",
    # with a final dot, in capitals, by name
    "127.0.0.1.", "localhost", "LOCALHOST", "localhost.", "ip6-localhost",
    # IPv6: itself, mapped, compatible, NAT64, 6to4, Teredo, local, multicast, zones
    "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]", "[::ffff:0:7f00:1]", "[::ffff:0x7f.1]", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[fd00::1]", "[ff02::1]", "[fec0::1]",
    # metadata services, link-local, carriers' NAT, test and reserved networks
    "169.254.169.254", "[fd00:ec2::254]", "100.100.100.200", "169.254.170.2", "168.63.129.16", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376",
    "169.254.43518", "169.16689662", "[fd20:ce::254]", "metadata.google.internal", "100.64.0.1", "192.0.0.192", "198.18.0.1", "240.0.0.1", "255.255.255.255",
    # digits and dots that are none, and what a parser may make of them
    "①②⑦.⓪.⓪.①", "127。0。0。1", "127.0.0.1%00.example.org", "127%2e0%2e0%2e1", "%6c%6f%63%61%6c%68%6f%73%74",
]  # fmt: skip
SHAPES = [
    "http://example.invalid@{host}/", "http://user:secret@{host}/", "http://{host}#@example.invalid/", "http://{host}\\@example.invalid/",
    "http://{host}?@example.invalid/", "http:\\\\{host}/", "http:/{host}/", "http:{host}/", "http:///{host}/", " http://{host}/", "http://{host}\t/",
    "http://{host}\r\nHost: x/", "ftp://{host}/", "gopher://{host}/_GET / HTTP/1.0", "dict://{host}/", "file://{host}/etc/passwd", "file:///etc/passwd",
    "jar:http://{host}!/", "data:image/png;base64,AA==", "ws://{host}/", "HTTPS://{host}/", "//{host}/", "{host}/",
]  # fmt: skip


REDIRECTS = (301, 302, 303, 307, 308)


class House:
    """A trap on 127.0.0.1 and ::1.  On the same port, at the only addresses that are exempt, servers that redirect to wherever they are told."""

    def __init__(self):
        self.reached, self.seen, self.targets = [], [], {}  # targets: the host that is asked -> where its robots.txt is said to be

    async def __aenter__(self):
        self.trap = await asyncio.start_server(self.spring, "127.0.0.1", 0)
        self.port = self.trap.sockets[0].getsockname()[1]
        self.servers = [self.trap]
        with suppress(OSError):  # a machine without IPv6
            self.servers.append(await asyncio.start_server(self.spring, "::1", self.port))
        exempt = ["127.0.0.9", "127.0.0.8", *(f"127.0.9.{n}" for n in range(1, 120))]
        self.servers.append(await asyncio.start_server(self.answer, exempt, self.port))
        self.base, self.other = f"http://127.0.0.9:{self.port}", f"http://127.0.0.8:{self.port}"
        return self

    async def __aexit__(self, *_):
        for server in self.servers:
            server.close()

    async def spring(self, reader, writer):
        self.reached.append(writer.get_extra_info("sockname"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhit")
        writer.close()

    async def answer(self, reader, writer):
        """Byte by byte what the test says: a web framework would mend it.  /<status>?<Location>, percent-encoded."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path, _, target = head.split(" ")[1].partition("?")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:-2])}
        self.seen.append((path, headers))
        if path == "/robots.txt":
            target = quote(self.targets.get(headers["host"].partition(":")[0], ""))
        status = int(path[1:]) if path[1:].isdigit() else 302 if target else 404
        lines = [f"HTTP/1.1 {status} X", "Content-Length: 3", "Connection: close", "Set-Cookie: secret=1; Domain=127.0.0.8"]
        lines += [f'Alt-Svc: http/1.1="127.0.0.1:{self.port}"', f"Refresh: 0; url=http://127.0.0.1:{self.port}/", "WWW-Authenticate: Basic"]
        writer.write("\r\n".join(lines).encode() + b"\r\nLocation: " + unquote_to_bytes(target) + b"\r\n\r\nno!")
        writer.close()


CONFIG = FetchConfig(
    allow_networks=("127.0.0.9/32", "127.0.0.8/32", "127.0.9.0/24"),
    total_timeout_s=2.0,
    connect_timeout_s=0.5,
    attempts=1,
    host_rate=0,
    robots=False,
    breaker_failures=0,
)


def candidate(url):
    return Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z")


def targets(house):
    return [f"http://{host}:{house.port}/" for host in HOSTS] + [shape.format(host=f"127.0.0.1:{house.port}") for shape in SHAPES]


def all_of(make_urls, **more):
    """What becomes of every URL, and who was reached."""

    async def go():
        async with House() as house, Client(CONFIG.model_copy(update=more)) as client:
            urls = make_urls(house)
            found = await asyncio.gather(*(client.fetch(candidate(url)) for url in urls))
            return house, dict(zip(urls, found, strict=True))

    return asyncio.run(go())


def test_no_spelling_of_a_guarded_address_is_reached():
    house, found = all_of(lambda house: [f"http://{host}:{house.port}/" for host in HOSTS])
    assert len(found) >= 50 and house.reached == []
    assert not any(isinstance(result, Fetched) for result in found.values())
    loopback = [f"http://{host}:{house.port}/" for host in ("127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "127.1")]
    assert all(isinstance(found[url], Refused) for url in loopback), {url: found[url] for url in loopback}


def test_no_shape_of_a_url_is_a_way_round():
    house, found = all_of(lambda house: [shape.format(host=f"127.0.0.1:{house.port}") for shape in SHAPES])
    assert house.reached == [] and all(
        isinstance(r, Refused) and r.reason in (Reason.BAD_URL, Reason.ADDRESS, Reason.OUTSIDE) for r in found.values()
    ), {url: r for url, r in found.items() if not isinstance(r, Refused)}


@pytest.mark.parametrize("status", REDIRECTS)
def test_no_redirect_is_a_way_round(status):
    house, found = all_of(lambda house: [f"{house.base}/{status}?{quote(target, safe='')}" for target in targets(house)])
    assert len(found) > 85 and house.reached == [] and not any(isinstance(result, Fetched) for result in found.values())
    assert len([path for path, _ in house.seen if path == f"/{status}"]) == len(found)  # each of them was truly redirected


def test_no_robots_txt_is_a_way_round():
    """It is asked for before anything else, and may be redirected five times."""

    def urls(house):
        house.targets = {f"127.0.9.{n}": target for n, target in enumerate(targets(house), 1)}
        return [f"http://{host}:{house.port}/404" for host in house.targets]

    house, found = all_of(urls, robots=True)
    assert len(found) > 85 and house.reached == []
    assert len([path for path, _ in house.seen if path == "/robots.txt"]) >= len(found)


@pytest.mark.parametrize("second", ["127.0.0.1", "[::1]", "127.0.0.7,127.0.0.1", "[::1],127.0.0.1"])
def test_a_name_that_changes_its_answer_is_judged_by_what_is_connected_to(second):
    """DNS rebinding, and names of several addresses: libcurl resolves as it is told, all else is real."""

    async def go():
        async with House() as house, Client(CONFIG) as client:
            found = []
            for addresses in ("127.0.0.9", second):
                answer = [f"-rebind.example:{house.port}", f"rebind.example:{house.port}:{addresses}"]
                client._transport._settings[pycurl.RESOLVE] = answer
                for handle in client._transport._idle:
                    handle.setopt(pycurl.RESOLVE, answer)
                found.append(await client.fetch(candidate(f"http://rebind.example:{house.port}/404")))
            return house, found

    house, (first, then) = asyncio.run(go())
    assert first.reason == Reason.GONE and len(house.seen) == 1  # it was asked, and had nothing
    assert then.reason == Reason.ADDRESS and house.reached == []


def test_nothing_of_one_host_is_told_to_another_and_no_header_leads_elsewhere(tmp_path, monkeypatch):
    """No cookie, no referer, no password of this machine's user, no other service that is offered in a header."""
    (tmp_path / ".netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))

    async def go():
        async with House() as house, Client(CONFIG) as client:
            with_password = house.other.replace("://", "://me:secret@")
            for path in ("401", "404", f"302?{house.other}/401", "401", f"302?{with_password}/401"):
                await client.fetch(candidate(f"{house.base}/{path}"))
            return house

    house = asyncio.run(go())
    assert [path for path, _ in house.seen] == ["/401", "/404", "/302", "/401", "/401", "/302"] and house.reached == []
    for _, headers in house.seen:
        assert set(headers) == {"host", "user-agent", "accept"}


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"])
def test_no_proxy_of_the_environment_is_used(monkeypatch, variable):
    """It would be connected to in the place of what the guard has looked at."""

    async def go():
        async with House() as house:
            monkeypatch.setenv(variable, f"http://127.0.0.1:{house.port}")
            async with Client(CONFIG) as client:
                await client.fetch(candidate(f"{house.base}/404"))
            return house

    house = asyncio.run(go())
    assert house.reached == [] and len(house.seen) == 1
