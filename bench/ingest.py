"""Ingest: ours against a plain downloader, the same real images from the same server, in one run.

    python -m bench.ingest --count 1000

Ours: from candidates in the log to shards in the catalog, with every check on (addresses, caps, header, digests, sidecar, fsync).  The peer
is what people write first, and what img2dataset does without re-encoding: threads, urllib, bytes unchecked, one tar.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prometheus_client import CollectorRegistry

from bench.real import DATA
from ingest.fetch.run import run_fetch
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config, FetchConfig, ShardConfig
from streamlearn.contract.event_log import CANDIDATES, NewRecord, SqliteLog
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat, now

CONCURRENCY = 32


def ours(urls: Sequence[str], home: Path) -> None:
    config = Config(
        fetch=FetchConfig(allow_networks=("127.0.0.0/8",), concurrency=CONCURRENCY, per_host=CONCURRENCY, host_rate=0),
        shard=ShardConfig(max_age_s=0.5),
    )
    log, store = SqliteLog(home / "log.sqlite"), FolderStore(home / "store")
    catalog = DeltaCatalog(str(home / "catalog"), log_id=log.log_id)
    log.ensure_topic(CANDIDATES, config.log.partitions)
    found = [Candidate(url=u, source="bench", source_ref="", discovered_at=now()) for u in urls]
    log.append([NewRecord(CANDIDATES, politeness_key(c.url), c.to_json(), i % config.log.partitions) for i, c in enumerate(found)])
    stop = threading.Event()

    def watch() -> None:
        reader = DeltaCatalog(str(home / "catalog"), log_id=log.log_id)
        while sum(reader.position(CANDIDATES, p) for p in range(config.log.partitions)) < len(urls):
            time.sleep(0.02)
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    run_fetch(config, log, store, catalog, FetchMetrics(CollectorRegistry()), Heartbeat(home, "fetch"), stop=stop, home=home)
    stored = sum(row.num_samples for row in catalog.rows())
    if stored != len(urls):
        raise SystemExit(f"stored {stored} of {len(urls)}")


def plain(urls: Sequence[str], home: Path) -> None:
    def get(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=15) as answer:
            return bytes(answer.read())

    with ThreadPoolExecutor(CONCURRENCY) as pool, tarfile.open(home / "all.tar", "w") as tar:
        for i, body in enumerate(pool.map(get, urls)):
            info = tarfile.TarInfo(f"{i:09d}.jpg")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


KINDS = {"ours": ours, "plain": plain}


def measure(kind: str, base: str, count: int) -> None:
    """In a process of its own: prints images/s, CPU milliseconds an image, peak MiB."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        KINDS[kind]([f"{base}{i}.jpg" for i in range(count)], Path(folder))
        wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = 1000 * (used.ru_utime + used.ru_stime) / count
    print(
        f"{kind:6s} {count / wall:8.1f} images/s   {cpu:6.2f} ms CPU/image (start-up included)   {used.ru_maxrss / 1024:6.0f} MiB peak",
        flush=True,
    )
    os._exit(0)


def compare(source: Path, count: int, rounds: int) -> None:
    command = [sys.executable, "-m", "bench.serve", str(source), "--count", str(count)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        base = server.stdout.readline().split()[-1]
        print(f"{count} images of {source.name}, {CONCURRENCY} requests at once, server on the same cores")
        for _ in range(rounds):
            for kind in KINDS:
                subprocess.run([sys.executable, "-m", "bench.ingest", "--only", kind, "--base", base, "--count", str(count)], check=True)
    finally:
        server.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=DATA / "imagenet-sample-1000.tar")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--base", default="")
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments.only, arguments.base, arguments.count)
    else:
        compare(arguments.source, arguments.count, arguments.rounds)
