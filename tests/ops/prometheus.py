"""A real Prometheus beside what is tested: started, asked, ended."""

import contextlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def running(argv: Sequence[str], log: Path, **more: Any) -> "Iterator[subprocess.Popen[bytes]]":
    """A process in a session of its own, ended with SIGTERM."""
    with log.open("ab") as out:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, **more)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def free_ports(count: int) -> int:
    """The first of so many in a row; below those that connections out are given, which could take one before its server does."""
    while True:
        first = random.randrange(20000, 32000 - count)
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


class Prometheus:
    def __init__(self, port: int):
        self.at = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.at}/{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
            return json.load(answer)

    def ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{self.at}/-/ready", timeout=5).status == 200)
        return False

    def up(self, jobs: set[str]) -> bool:
        targets = self.get("api/v1/targets")["data"]["activeTargets"]
        return {t["labels"]["job"] for t in targets if t["health"] == "up"} >= jobs

    def firing(self) -> set[str]:
        return {a["labels"]["alertname"] for a in self.get("api/v1/alerts")["data"]["alerts"] if a["state"] == "firing"}

    def value(self, expr: str) -> float:
        found = self.get("api/v1/query", query=expr)["data"]["result"]
        return float(found[0]["value"][1]) if found else math.nan

    def drawn(self, expr: str, since: float) -> bool:
        """Whether a panel over the time since then shows a number."""
        expr = expr.replace("$__rate_interval", "30s")
        found = self.get("api/v1/query_range", query=expr, start=since, end=time.time(), step=2)["data"]["result"]
        return any(math.isfinite(float(value)) for series in found for _, value in series["values"])
