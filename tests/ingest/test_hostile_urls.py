"""Sixty and more ways to point a fetcher at its own house.  A trap listens on the loopback interface: nothing may ever reach it."""

import asyncio

import pytest
from aiohttp import web

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
    "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]", "[fe80::1]", "[fe80::1%25lo]", "[fc00::1]", "[fd00::1]", "[ff02::1]", "[fec0::1]",
    # metadata services, link-local, carriers' NAT, test and reserved networks
    "169.254.169.254", "[fd00:ec2::254]", "100.100.100.200", "169.254.170.2", "100.64.0.1", "192.0.0.192", "198.18.0.1", "240.0.0.1", "255.255.255.255",
    # digits and dots that are none, and what a parser may make of them
    "①②⑦.⓪.⓪.①", "127。0。0。1", "127.0.0.1%00.example.org", "127%2e0%2e0%2e1", "%6c%6f%63%61%6c%68%6f%73%74",
]  # fmt: skip
SHAPES = [
    "http://example.invalid@{host}/", "http://user:secret@{host}/", "http://{host}#@example.invalid/", "http://{host}\\@example.invalid/",
    "http://{host}?@example.invalid/", "http:\\\\{host}/", "http:/{host}/", "http:{host}/", "http:///{host}/", " http://{host}/", "http://{host}\t/",
    "http://{host}\r\nHost: x/", "ftp://{host}/", "gopher://{host}/_GET / HTTP/1.0", "dict://{host}/", "file://{host}/etc/passwd", "file:///etc/passwd",
    "jar:http://{host}!/", "data:image/png;base64,AA==", "ws://{host}/", "HTTPS://{host}/", "//{host}/", "{host}/",
]  # fmt: skip


class House:
    """A trap on 127.0.0.1 and ::1, and a web server at 127.0.0.9, the only address that is exempt, which redirects to wherever it is told."""

    def __init__(self):
        self.reached, self.seen = [], []

    async def __aenter__(self):
        async def trap(reader, writer):
            self.reached.append(writer.get_extra_info("sockname"))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhit")
            writer.close()

        self.trap = await asyncio.start_server(trap, "127.0.0.1", 0)
        self.port = self.trap.sockets[0].getsockname()[1]
        try:
            self.trap6 = await asyncio.start_server(trap, "::1", self.port)
        except OSError:
            self.trap6 = None  # a machine without IPv6

        async def answer(request):
            self.seen.append(dict(request.headers))
            if "to" in request.query:
                raise web.HTTPFound(request.query["to"], headers={"Set-Cookie": "secret=1; Domain=127.0.0.8"})
            return web.Response(text="here")

        app = web.Application()
        app.router.add_get("/go", answer)
        self.runner = web.AppRunner(app, access_log=None)
        await self.runner.setup()
        for host in ("127.0.0.9", "127.0.0.8"):
            await web.TCPSite(self.runner, host, 0).start()
        self.base, self.other = (f"http://{address[0]}:{address[1]}" for address in self.runner.addresses)
        return self

    async def __aexit__(self, *_):
        self.trap.close()
        if self.trap6:
            self.trap6.close()
        await self.runner.cleanup()


CONFIG = FetchConfig(
    allow_networks=("127.0.0.9/32", "127.0.0.8/32"),
    total_timeout_s=2.0,
    connect_timeout_s=0.5,
    attempts=1,
    host_rate=0,
    robots=False,
    breaker_failures=0,
)


def all_of(make_urls):
    """What becomes of every URL, and who was reached."""

    async def go():
        async with House() as house, Client(CONFIG) as client:
            urls = make_urls(house)
            told = [Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z") for url in urls]
            found = await asyncio.gather(*(client.fetch(candidate) for candidate in told))
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


def test_no_redirect_is_a_way_round():
    from urllib.parse import quote

    def urls(house):
        targets = [f"http://{host}:{house.port}/" for host in HOSTS] + [shape.format(host=f"127.0.0.1:{house.port}") for shape in SHAPES]
        return [f"{house.base}/go?to={quote(target.replace(chr(13), '').replace(chr(10), ''))}" for target in targets]

    house, found = all_of(urls)
    assert len(found) > 70 and house.reached == [] and not any(isinstance(result, Fetched) for result in found.values())


def test_nothing_of_one_host_is_told_to_another():
    house, _ = all_of(lambda house: [f"{house.base}/go?to={house.other}/go"])
    assert len(house.seen) == 2
    assert not {"cookie", "authorization", "referer", "proxy-authorization"} & {name.lower() for name in house.seen[1]}


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"])
def test_no_proxy_of_the_environment_is_used(monkeypatch, variable):
    """It would be connected to in the place of what the guard has looked at."""

    async def go():
        async with House() as house:
            monkeypatch.setenv(variable, f"http://127.0.0.1:{house.port}")
            async with Client(CONFIG) as client:
                await client.fetch(Candidate(url=f"{house.base}/go", source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z"))
            return house

    house = asyncio.run(go())
    assert house.reached == [] and len(house.seen) == 1
