"""What the tests of back-pressure share: the fetch role as a process of its own, and what it says of itself over HTTP."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

from aiohttp import web

from ingest import audit
from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.cli.roles import CATALOG
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.event_log import CANDIDATES, NewRecord
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from streamlearn.contract.status import read_status
from tests.conftest import REPO
from tests.ingest.server import Site, picture

TOML = """
[log]
{log}
[store]
{store}
[fetch]
allow_networks = ["127.0.0.0/8"]
host_rate = 0.0
robots = false
total_timeout_s = 120.0
{fetch}
[shard]
{shard}
"""
LIMIT_S = 150.0


class Gallery(Site):
    """Many pictures, of any size, all different; behind a gate that can be shut."""

    def __init__(self, num_bytes=0):
        super().__init__()
        self.bodies, self.num_bytes, self.shut = [picture(i) for i in range(16)], num_bytes, False

    async def picture(self, request):
        n = int(request.match_info["n"])
        self.hits[n] = self.hits.get(n, 0) + 1
        while self.shut:
            await asyncio.sleep(0.05)
        return web.Response(body=self.body(n))

    def body(self, n):
        return self.bodies[n % 16] + n.to_bytes(4, "big") * max(1, self.num_bytes // 4)


class Role:
    """`streamlearn role NAME`, and how to look at it from outside."""

    def __init__(self, name, home, **tables):
        self.name, self.home, self.peak_kb = name, home, 0
        home.mkdir(exist_ok=True)
        self.config = home.with_suffix(".toml")
        self.config.write_text(TOML.format(**{"log": "", "store": "", "fetch": "", "shard": ""} | tables) + tables.get("more", ""))
        self.out = home.with_suffix(".log")

    def __enter__(self):
        argv = [sys.executable, "-m", "streamlearn", "role", self.name, "--home", str(self.home), "--config", str(self.config)]
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(argv, cwd=REPO, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.wait(lambda: read_status(self.home).get(self.name, {}).get("pid") == self.process.pid)
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_S)

    def wait(self, condition, limit_s=LIMIT_S):
        """Until it holds; what the role wrote if it never does."""
        deadline = time.monotonic() + limit_s
        while not (held := condition()):
            self.rss_mb()
            assert self.process.poll() is None and time.monotonic() < deadline, self.out.read_text()[-4000:]
            time.sleep(0.1)
        return held

    def get(self, path):
        """(HTTP status, body)."""
        port = read_status(self.home)[self.name]["metrics_port"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def health(self, path="/healthz"):
        status, body = self.get(path)
        return status, json.loads(body)

    def metrics(self):
        """Name with labels -> value."""
        lines = (line.rpartition(" ") for line in self.get("/metrics")[1].splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def waited(self):
        """What it waits for -> seconds."""
        found = {name.split('"')[1]: s for name, s in self.metrics().items() if name.startswith(f"{self.name}_waiting_seconds{{")}
        return {on: s for on, s in found.items() if s}

    def stored(self, images):
        """Whether it has done with so many: they are in the catalog, and nothing is owed to the log."""
        return self.health()[1].get("stored") == images

    def rss_mb(self):
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        self.peak_kb = max(self.peak_kb, int(found[1]) if found else 0)
        return int(found[1]) / 1024 if found else 0.0

    def at_rest(self, count):
        """Until `count()` does not change any more."""
        seen, since = count(), time.monotonic()

        def same():
            nonlocal seen, since
            if count() != seen:
                seen, since = count(), time.monotonic()
            return time.monotonic() - since > 2.0

        self.wait(same)
        return seen


def tell(log, base, numbers, partitions=2):
    log.ensure_topic(CANDIDATES, partitions)
    urls = [f"{base}/{n}.jpg" for n in numbers]
    made = [Candidate(url=url, source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z") for url in urls]
    log.append([NewRecord(CANDIDATES, politeness_key(c.url), c.to_json(), i % partitions) for i, c in enumerate(made)])


class Dataset:
    """Log, store and catalog as seen from outside the role."""

    def __init__(self, log, store_config):
        self.log, self.store = log, S3Store(store_config)
        self.catalog = DeltaCatalog(self.store.uri(CATALOG), log_id=log.log_id, storage_options=delta_options(store_config))

    def check(self, base, numbers, body):
        """Every picture is there, once, as it was served, and the auditor finds nothing."""
        found = Counter()
        for row in self.catalog.rows():
            data = self.store.get(row.key)
            for o in read_sidecar(self.store.get(sidecar_key(row.key))).to_pylist():
                assert o["outcome"] == STORED, o
                number = int(o["url"].removeprefix(f"{base}/").removesuffix(".jpg"))
                assert data[o["member_offset"] :][: o["member_size"]] == body(number)
                found[number] += 1
        assert found == Counter(numbers)
        report = audit.verify(self.log, self.store, self.catalog, deep=True, sample=0)
        assert report.good and report.partitions and all(p.lag == 0 for p in report.partitions), report
