"""Headless Chromium over its DevTools protocol: what a page asks for, complains of, how wide it is, and how it looks."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, field

import aiohttp

from tests.conftest import missing

DEADLINE_S = 90.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-sync", "--disable-component-update", "--remote-debugging-port=0", "--remote-allow-origins=*"),
)


@dataclass
class Seen:
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    wide: int = 0  # px of the page's content
    image: bytes = b""


def look(url, folder, *, width, height):
    """What a browser of this size sees of a page."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("chromium is not installed")
    profile = folder / f"profile-{width}"
    process = subprocess.Popen(
        [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return asyncio.run(asyncio.wait_for(_look(url, profile, process, width, height), DEADLINE_S))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)


async def _look(url, profile, process, width, height):
    told = profile / "DevToolsActivePort"
    while not told.exists() or not told.read_text().strip():
        assert process.poll() is None
        await asyncio.sleep(0.05)
    port = told.read_text().splitlines()[0]
    async with aiohttp.ClientSession() as session:
        async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
            at = (await answer.json())["webSocketDebuggerUrl"]
        async with session.ws_connect(at, max_msg_size=0) as socket:
            return await _watch(socket, url, width, height)


async def _watch(socket, url, width, height):
    seen, loaded, number = Seen(), asyncio.Event(), 0
    answers = {}

    async def listen():
        async for message in socket:
            event = json.loads(message.data)
            if "id" in event:
                answers.pop(event["id"]).set_result(event.get("result", event))
                continue
            match event["method"]:
                case "Network.requestWillBeSent":
                    seen.requests.append(event["params"]["request"]["url"])
                case "Runtime.consoleAPICalled" | "Log.entryAdded" | "Runtime.exceptionThrown":
                    seen.complaints.append(json.dumps(event["params"])[:500])
                case "Page.loadEventFired":
                    loaded.set()

    async def call(method, **params):
        nonlocal number
        number += 1
        answers[number] = asyncio.get_running_loop().create_future()
        done = answers[number]
        await socket.send_json({"id": number, "method": method, "params": params})
        return await done

    task = asyncio.create_task(listen())
    for domain in ("Page", "Network", "Runtime", "Log"):
        await call(f"{domain}.enable")
    await call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    await call("Page.navigate", url=url)
    await loaded.wait()
    found = await call("Runtime.evaluate", expression="document.documentElement.scrollWidth")
    seen.wide = found["result"]["value"]
    shot = await call("Page.captureScreenshot", captureBeyondViewport=True)
    seen.image = base64.b64decode(shot["data"])
    task.cancel()
    return seen
