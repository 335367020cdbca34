"""Ingest: ours against img2dataset and a plain downloader, the same real images from the same nginx on the same cores, in one run.

    python -m bench.ingest [--images 9000] [--processes 2] [--https] [--img2dataset .venv-peer/bin/img2dataset] [--rounds 2]

Ours: from candidates in the log to committed shards, with everything on: robots.txt, opt-out headers, host budgets (without a limit on the
one host there is), address guard, caps, magic bytes and header check, SHA-256 of every image, sidecar, catalog.  img2dataset (webdataset
output, no resize): `raw` stores bytes without looking at them; `keep` decodes each.  plain: threads, urllib, one tar, nothing checked.

Window: from the first request to the last shard, as img2dataset's own statistics have it.  CPU: of all processes of the contestant, start-up
included for the peers (they cannot be told apart) and excluded for ours; the last column includes it for all.
"""

import argparse
import io
import json
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
from dataclasses import dataclass
from pathlib import Path

from bench.real import DATA
from bench.serve import load
from bench.web import hosts_of, nginx

CONCURRENCY = 32
PARTITIONS = 4


@dataclass(frozen=True)
class Result:
    images: int
    window_s: float  # without start-up
    wall_s: float  # with it
    cpu_s: float  # without it, where that can be told
    cpu_all_s: float
    peak_mib: float  # the largest process

    def row(self, name: str) -> str:
        return (
            f"{name:18s} {self.images / self.window_s:9.0f} {self.images / self.wall_s:9.0f} {1000 * self.cpu_s / self.images:9.2f} "
            f"{1000 * self.cpu_all_s / self.images:9.2f} {self.peak_mib:9.0f}"
        )


HEADER = f"{'':18s} {'images/s':>9s} {'+start-up':>9s} {'ms CPU':>9s} {'+start-up':>9s} {'peak MiB':>9s}"


def ours(urls: Sequence[str], home: Path, processes: int) -> Result:
    """Each process owns a share of the partitions, as a consumer group would give it."""
    from streamlearn.contract.candidate import Candidate, politeness_key
    from streamlearn.contract.event_log import CANDIDATES, NewRecord, SqliteLog
    from streamlearn.contract.status import now

    log = SqliteLog(home / "log.sqlite")
    log.ensure_topic(CANDIDATES, PARTITIONS)
    hosts = hosts_of(PARTITIONS)
    spread = [u.replace("127.0.0.1", hosts[i % PARTITIONS]) for i, u in enumerate(urls)]
    found = [Candidate(url=u, source="bench", source_ref=str(i), discovered_at=now()) for i, u in enumerate(spread)]
    for i in range(0, len(found), 10_000):
        log.append([NewRecord(CANDIDATES, politeness_key(c.url), c.to_json()) for c in found[i : i + 10_000]])
    began = time.perf_counter()
    command = [sys.executable, "-m", "bench.ingest", "--worker", str(home)]
    workers = [subprocess.Popen([*command, f"{i}/{processes}"], stdout=subprocess.PIPE, text=True) for i in range(processes)]
    told = [json.loads(w.communicate()[0].splitlines()[-1]) for w in workers]
    wall = time.perf_counter() - began
    stored = sum(t["stored"] for t in told)
    if stored != len(urls):
        raise SystemExit(f"stored {stored} of {len(urls)}")
    window = max(t["end"] for t in told) - min(t["begin"] for t in told)
    return Result(stored, window, wall, sum(t["cpu"] for t in told), sum(t["cpu_all"] for t in told), max(t["peak"] for t in told))


def work(home: Path, share: str) -> None:
    """One fetcher, in a process of its own."""
    from prometheus_client import CollectorRegistry

    from ingest.fetch.run import run_fetch
    from streamlearn.contract.catalog import DeltaCatalog
    from streamlearn.contract.config import Config, FetchConfig, LogConfig, ShardConfig
    from streamlearn.contract.event_log import CANDIDATES, AllOfThem, SqliteLog, Subscription
    from streamlearn.contract.metrics import FetchMetrics
    from streamlearn.contract.object_store import FolderStore
    from streamlearn.contract.status import Heartbeat

    number, of = map(int, share.split("/"))
    mine = [p for p in range(PARTITIONS) if p % of == number]

    class Share(SqliteLog):
        def subscribe(self, group: str, topics: Sequence[str]) -> Subscription:
            return AllOfThem(frozenset((topic, p) for topic in topics for p in mine))

    fetch = FetchConfig(allow_networks=("127.0.0.0/8",), concurrency=CONCURRENCY, per_host=CONCURRENCY, host_rate=0)
    log, store = Share(home / "log.sqlite"), FolderStore(home / "store")
    count = log.bounds(CANDIDATES, mine[0])[1]  # three shards a partition: nothing is left to be sealed by its age
    config = Config(
        fetch=fetch, shard=ShardConfig(max_samples=min(1000, -(-count // 3)), max_age_s=5.0), log=LogConfig(partitions=PARTITIONS)
    )
    catalog = DeltaCatalog(str(home / "store/catalog/shards"), log_id=log.log_id)
    ends = {p: log.bounds(CANDIDATES, p)[1] for p in mine}
    stop, ended = threading.Event(), [0.0]

    def watch() -> None:
        reader = DeltaCatalog(str(home / "store/catalog/shards"), log_id=log.log_id)
        while any(reader.position(CANDIDATES, p) < end for p, end in ends.items()):
            time.sleep(0.1)
        ended[0] = time.time()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    spool = home / share.replace("/", "-")
    spool.mkdir()
    before, begin = _cpu(), time.time()
    run_fetch(
        config,
        log,
        store,
        catalog,
        FetchMetrics(CollectorRegistry()),
        Heartbeat(spool, "fetch"),
        stop=stop,
        home=spool,
    )
    stored = sum(row.num_samples for row in catalog.rows() if row.partition in mine)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps({"stored": stored, "begin": begin, "end": ended[0], "cpu": _cpu() - before, "cpu_all": _cpu(), "peak": peak}), flush=True
    )
    os._exit(0)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def img2dataset(program: str, mode: str, urls: Sequence[str], home: Path, processes: int) -> Result:
    """Peak memory is of the largest of its processes."""
    (home / "urls.txt").write_text("\n".join(urls))
    options = [
        "--url_list",
        str(home / "urls.txt"),
        "--input_format",
        "txt",
        "--output_folder",
        str(home / "out"),
        "--output_format",
        "webdataset",
    ]
    options += [
        "--processes_count",
        str(processes),
        "--thread_count",
        str(CONCURRENCY),
        "--number_sample_per_shard",
        "1000",
        "--timeout",
        "10",
    ]
    options += ["--retries", "0", "--enable_wandb", "False", "--resize_mode", "no", "--skip_reencode", "True"]
    options += ["--disable_all_reencoding", "True"] if mode == "raw" else []
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [program, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"},
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    stats = [json.loads(f.read_text()) for f in (home / "out").glob("*_stats.json")]
    stored = sum(s["successes"] for s in stats)
    if not stored:
        raise SystemExit(f"img2dataset {mode} stored nothing: {done.stderr[-1000:]}")
    window = max(s["end_time"] for s in stats) - min(s["start_time"] for s in stats)
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return Result(stored, window, wall, cpu, cpu, after.ru_maxrss / 1024)


def plain(urls: Sequence[str], home: Path) -> Result:
    def get(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=15) as answer:
            return bytes(answer.read())

    before, began = _cpu(), time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool, tarfile.open(home / "all.tar", "w") as tar:
        for i, body in enumerate(pool.map(get, urls)):
            info = tarfile.TarInfo(f"{i:09d}.jpg")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    wall, cpu = time.perf_counter() - began, _cpu() - before
    return Result(len(urls), wall, wall, cpu, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def compare(arguments: argparse.Namespace) -> None:
    images = load(arguments.source, 1000)
    with tempfile.TemporaryDirectory() as folder, nginx(images, Path(folder)) as (http, https, certificate):
        base = https if arguments.https else http
        if arguments.https:
            os.environ["SSL_CERT_FILE"] = str(certificate)
        urls = [f"{base}{i % len(images)}.jpg?{i // len(images)}" for i in range(arguments.images)]
        size = sum(map(len, images)) / len(images) / 1000
        scheme = "https" if arguments.https else "http"
        print(
            f"{len(urls)} images of {arguments.source.name} (mean {size:.0f} kB) over {scheme}, {arguments.processes} processes x {CONCURRENCY}"
        )
        print(HEADER, flush=True)
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as home:
                print(ours(urls, Path(home), arguments.processes).row("ours"), flush=True)
            if arguments.img2dataset:
                share = urls[: arguments.peer_images or None]
                for mode in ("raw", "keep"):
                    with tempfile.TemporaryDirectory() as home:
                        print(
                            img2dataset(arguments.img2dataset, mode, share, Path(home), arguments.processes).row(f"img2dataset {mode}"),
                            flush=True,
                        )
            with tempfile.TemporaryDirectory() as home:
                print(plain(urls[: arguments.peer_images or 1000], Path(home)).row("plain (1 process)"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=DATA / "imagenet-sample-1000.tar")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--https", action="store_true")
    parser.add_argument("--img2dataset", default="", help="the program, in an environment of its own: pip install img2dataset==1.47.0")
    parser.add_argument("--peer-images", type=int, default=0, help="fewer for the peers, where they are slow")
    parser.add_argument("--worker", nargs=2, metavar=("HOME", "SHARE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(Path(given.worker[0]), given.worker[1])
    else:
        compare(given)
