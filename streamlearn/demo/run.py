"""The role `demo`: a local web server over the image world, and a list of URLs that grows.

URLs of images already announced stand in the event log, so the port is kept over restarts.  About two in a hundred are broken as the web is
broken: missing, cut short, a page where an image should be.  Labelled banks for the probes are drawn from images that are never served.
"""

import asyncio
import contextlib
import errno
import io
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp import web

from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import DemoMetrics
from streamlearn.contract.status import Heartbeat, read_status
from streamlearn.demo.world import World

BROKEN = {13: "missing", 47: "truncated", 71: "page"}  # index modulo 150
MODULO = 150
BANK_QUARTERS, BANK_TRAIN, BANK_TEST = 3, 3000, 1500
AHEAD_S = 60.0  # seconds' worth of URLs that may wait for the fetcher


def world_of(config: Config) -> World:
    return World(config.demo.seed, config.demo.size, config.demo.quarter_images)


def run_demo(config: Config, home: Path, metrics: DemoMetrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    """Serve and announce until `stop`."""
    write_banks(home, world_of(config))
    asyncio.run(_serve(config, home, metrics, heartbeat, stop))


def write_banks(home: Path, world: World) -> None:
    """The labelled images, once.  Called before the roles start, so that the configuration can be checked against them."""
    for name, count, salt in (("bank-train", BANK_TRAIN, 1), ("bank-test", BANK_TEST, 2)):
        path = home / "demo" / f"{name}.parquet"
        if not path.exists():
            images, labels = zip(*world.labelled(count, BANK_QUARTERS, salt), strict=True)
            buffer = io.BytesIO()
            pq.write_table(pa.table({"jpeg": list(images), "label": list(labels)}), buffer)
            durable.write(path, buffer.getvalue())


def application(world: World, metrics: DemoMetrics) -> web.Application:
    async def image(request: web.Request) -> web.Response:
        index = int(request.match_info["index"])
        metrics.requests.inc()
        kind = BROKEN.get(index % MODULO, "")
        if kind == "missing":
            raise web.HTTPNotFound
        if kind == "page":
            return web.Response(text="<html><body>This image has moved.</body></html>", content_type="image/jpeg")
        body = world.jpeg(index)
        return web.Response(body=body[: len(body) // 2] if kind == "truncated" else body, content_type="image/jpeg")

    async def robots(_: web.Request) -> web.Response:
        return web.Response(text="User-agent: *\nAllow: /\n")

    app = web.Application()
    app.router.add_get(r"/img/{index:\d{1,12}}.jpg", image)
    app.router.add_get("/robots.txt", robots)
    return app


async def _serve(config: Config, home: Path, metrics: DemoMetrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    world, runner = world_of(config), None
    kept = home / "demo" / "port"
    port = int(kept.read_text()) if kept.exists() else config.demo.port
    runner = web.AppRunner(application(world, metrics), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, config.demo.address, port, reuse_address=True).start()
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{kept}: port {port}, which the URLs in the log name, is taken by another process; free it, or use a new home"
            ) from e
        raise
    port = int(runner.addresses[0][1])
    durable.write(kept, str(port).encode())
    try:
        await _announce(
            config, world, home, config.demo.url or f"http://{config.demo.address}:{port}", metrics=metrics, heartbeat=heartbeat, stop=stop
        )
    finally:
        await runner.cleanup()


async def _announce(
    config: Config, world: World, home: Path, base: str, *, metrics: DemoMetrics, heartbeat: Heartbeat, stop: threading.Event
) -> None:
    """Let the list of URLs grow at its rate, not much further ahead than the fetcher keeps up."""
    urls = home / "demo" / "urls.txt"
    done, began = announced(urls), time.monotonic()
    start, told = done, world.quarter(max(0, done - 1)) if done else -1
    while not stop.is_set():
        wanted = min(config.demo.max_images, start + int((time.monotonic() - began) * config.demo.rate))
        lag = read_status(home).get("fetch", {}).get("lag", 0)
        if wanted > done and lag < config.demo.rate * AHEAD_S:
            lines = "".join(f"{base}/img/{i}.jpg\n" for i in range(done, wanted))
            await asyncio.to_thread(_append, urls, lines)
            metrics.announced.inc(wanted - done)
            done = wanted
        elif lag >= config.demo.rate * AHEAD_S:
            start, began = done, time.monotonic()  # what was not announced in time is not owed
        quarter = world.quarter(max(0, done - 1))
        if done and quarter != told:
            told = quarter
            heartbeat.history(event="quarter", quarter=quarter, images=done, concepts=len(world.concepts(quarter)))
        metrics.heartbeat.set_to_current_time()
        heartbeat.beat(state="serving", announced=done, quarter=quarter, concepts=len(world.concepts(quarter)), url=base)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(stop.wait, 0.5), 1.0)


def announced(urls: Path) -> int:
    """Whole lines written so far; a line torn by a crash is cut off, to be written again."""
    if not urls.exists():
        return 0
    data = urls.read_bytes()
    if data and not data.endswith(b"\n"):
        durable.write(urls, data[: data.rfind(b"\n") + 1])
    return data.count(b"\n")


def _append(path: Path, lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(lines)
