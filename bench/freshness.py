"""Freshness: from a candidate in the log to its sample in the catalog, where the learner sees it.

    python -m bench.freshness [--rate 50] [--seconds 60] [--age 5]

Real fetch role, real HTTP (nginx over real photographs), one partition owner, units of at most `age` seconds.  A reader looks at the catalog
every 0.1 s, as a learner would; the time of a sample is when the reader first sees a shard that holds its offset, less when its candidate was appended.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from bench.real import DATA
from bench.serve import load
from bench.web import nginx
from ingest.fetch.run import run_fetch
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config, FetchConfig, ShardConfig
from streamlearn.contract.event_log import CANDIDATES, NewRecord, SqliteLog
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat, now

POLL_S = 0.1


def measure(base: str, home: Path, rate: float, seconds: float, age_s: float) -> np.ndarray:
    """Seconds, one a sample."""
    fetch = FetchConfig(allow_networks=("127.0.0.0/8",), host_rate=0, per_host=32)
    config = Config(fetch=fetch, shard=ShardConfig(max_age_s=age_s))
    log, table = SqliteLog(home / "log.sqlite"), str(home / "store/catalog/shards")
    log.ensure_topic(CANDIDATES, config.log.partitions)
    appended: dict[tuple[int, int], float] = {}
    stop = threading.Event()

    def role() -> None:
        own = SqliteLog(home / "log.sqlite")
        args = (config, own, FolderStore(home / "store"), DeltaCatalog(table, log_id=own.log_id), FetchMetrics(CollectorRegistry()))
        run_fetch(*args, Heartbeat(home, "fetch"), stop=stop, home=home)

    def feed() -> None:
        began, count = time.monotonic(), int(rate * seconds)
        for i in range(count):
            time.sleep(max(0.0, began + i / rate - time.monotonic()))
            candidate = Candidate(url=f"{base}{i % 1000}.jpg?{i // 1000}", source="bench", source_ref=str(i), discovered_at=now())
            at = time.monotonic()
            ((partition, offset),) = log.append([NewRecord(CANDIDATES, b"", candidate.to_json(), i % config.log.partitions)])
            appended[partition, offset] = at

    threads = [threading.Thread(target=work, daemon=True) for work in (role, feed)]
    for thread in threads:
        thread.start()
    found = _watch(DeltaCatalog(table, log_id=log.log_id), appended, int(rate * seconds))
    stop.set()
    threads[0].join(60)
    return np.array(found)


def _watch(catalog: DeltaCatalog, appended: dict[tuple[int, int], float], wanted: int) -> list[float]:
    found: list[float] = []
    version = -1
    while len(found) < wanted:
        version, rows = catalog.follow(version)
        seen = time.monotonic()
        found += [
            seen - appended[row.partition, o] for row in rows if row.topic == CANDIDATES for o in range(row.first_offset, row.end_offset)
        ]
        time.sleep(POLL_S)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=50.0, help="candidates a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--age", type=float, default=5.0, help="shard.max_age_s")
    given = parser.parse_args()
    images = load(DATA / "imagenet-sample-1000.tar", 1000)
    with tempfile.TemporaryDirectory() as server, tempfile.TemporaryDirectory() as place, nginx(images, Path(server)) as (http, _, _trust):
        took = measure(http, Path(place), given.rate, given.seconds, given.age)
    p50, p95, p99 = np.percentile(took, [50, 95, 99])
    print(
        f"{len(took)} samples at {given.rate:g} a second, units of {given.age:g} s: p50 {p50:.1f} s, p95 {p95:.1f} s, p99 {p99:.1f} s, at most {took.max():.1f} s"
    )
