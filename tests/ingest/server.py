"""A real web server, as hostile as the web; and what the tests of ingest share."""

import asyncio
import io
import threading
from contextlib import contextmanager

import numpy as np
from aiohttp import web
from PIL import Image

from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config, FetchConfig, ShardConfig, StoreConfig
from streamlearn.contract.event_log import SqliteLog
from streamlearn.contract.object_store import FolderStore


def picture(seed, size=(24, 20), kind="JPEG", **more):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **more)
    return out.getvalue()


def animated(kind):
    frames = [Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)) for i in range(3)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=100)
    return out.getvalue()


def huge_png():
    """A header that promises 65,000 x 65,000 pixels; the pixels never come."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


BODIES = {
    "empty": b"",
    "page": b"<html><body>moved</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "noise": bytes(range(256)) * 8,
    "truncated-jpg": picture(1)[:-300],
    "truncated-png": picture(1, kind="PNG")[:-300],
    "truncated-webp": picture(1, kind="WEBP")[:-100],
    "header-only": picture(1)[:30],
    "gif": animated("GIF"),
    "webp": animated("WEBP"),
    "apng": animated("PNG"),
    "huge": huge_png(),
    "tiny": picture(1, size=(8, 8)),
}


class Site:
    """Serves pictures at /<n>.jpg and trouble at /trouble/<name>; counts requests."""

    def __init__(self):
        self.hits, self.fail_first, self.down, self.size = {}, {}, False, None

    def application(self):
        app = web.Application()
        app.router.add_get(r"/{n:\d+}.jpg", self.picture)
        # no /robots.txt: a 404 costs nothing, and allows everything
        app.router.add_get("/trouble/{name}", self.trouble)
        return app

    async def picture(self, request):
        n = int(request.match_info["n"])
        self.hits[n] = self.hits.get(n, 0) + 1
        if self.down or self.hits[n] <= self.fail_first.get(n, 0):
            raise web.HTTPServiceUnavailable
        body = picture(n, size=self.size) if self.size else picture(n)
        return web.Response(body=body, content_type="text/plain", headers={"ETag": f'"{n}"'})  # a lying type

    async def trouble(self, request):
        name = request.match_info["name"]
        self.hits[name] = self.hits.get(name, 0) + 1
        if name in BODIES:
            return web.Response(body=BODIES[name], content_type="image/jpeg")
        if name == "loop":
            raise web.HTTPFound("/trouble/loop")
        if name == "to-private":
            raise web.HTTPFound("http://169.254.169.254/latest/meta-data/")
        if name == "to-file":
            raise web.HTTPFound("file:///etc/passwd")
        if name == "busy":
            raise web.HTTPTooManyRequests(headers={"Retry-After": "77"})
        if name == "bytes":
            return await self._raw(request, b'ETag: "\xff\xfe"\r\nLast-Modified: \xe9t\xe9\r\n')
        if name == "stalled":
            await asyncio.sleep(30)
        if name in ("endless", "drip", "lying"):
            return await self._pour(request, name)
        raise web.HTTPNotFound

    async def _raw(self, request, headers):
        """An answer whose headers are not text."""
        body = picture(4)
        request.transport.write(b"HTTP/1.1 200 OK\r\n" + headers + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        request.transport.close()
        return web.Response()

    async def _pour(self, request, name):
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
        if name == "lying":
            response.content_length = 10 * 2**30
        await response.prepare(request)
        head = picture(3)[:100]
        try:
            await response.write(head)
            for _ in range(10**6):  # 10 GB, or a byte now and then
                await response.write(b"\0" * (10**4 if name != "drip" else 1))
                await asyncio.sleep(0.05 if name == "drip" else 0)
        except (ConnectionResetError, ConnectionError):
            self.hits[f"{name} cut"] = 1
        return response


@contextmanager
def serving(site, hosts=("127.0.0.1",)):
    """Its first address, while it runs in a thread."""
    loop, ready, base = asyncio.new_event_loop(), threading.Event(), []

    async def start():
        runner = web.AppRunner(site.application(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        for host in hosts:
            await web.TCPSite(runner, host, runner.addresses[0][1] if runner.addresses else 0).start()
        base.append(f"http://{hosts[0]}:{runner.addresses[0][1]}")
        ready.set()
        return runner

    def work():
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield base[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


FETCH = FetchConfig(
    allow_networks=("127.0.0.0/8",),
    total_timeout_s=1.0,
    connect_timeout_s=0.5,
    max_bytes=200_000,
    backoff_s=0.01,
    retry_delays_s=(0.05, 0.05),
    host_rate=0,  # one host, hundreds of requests a second
    breaker_failures=0,  # it goes down and comes back within a test
    robots_retry_s=0.05,
)


STORE = "store.json"  # in a home whose objects are on S3: where


class Place:
    """Log, store, catalog and configuration of one home."""

    def __init__(self, home, **more):
        self.home = home
        self.config = Config(fetch=FETCH, shard=ShardConfig(max_samples=7, max_age_s=0.2), **more)
        self.log = SqliteLog(home / "log.sqlite")
        if (home / STORE).exists():
            from streamlearn.adapters.s3_store import S3Store, delta_options  # most tests do without the SDK

            config = StoreConfig.model_validate_json((home / STORE).read_text())
            self.store = S3Store(config)
            options = {"storage_options": delta_options(config)}
            self.catalog = DeltaCatalog(self.store.uri("catalog/shards"), log_id=self.log.log_id, **options)
        else:
            self.store = FolderStore(home / "store")
            self.catalog = DeltaCatalog(str(home / "store" / "catalog" / "shards"), log_id=self.log.log_id)
