"""Real fetch roles in processes of their own, to be joined, stopped and killed; over the Kafka mock cluster, or one over SQLite."""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from ingest.fetch.run import run_fetch
from streamlearn.adapters.kafka_log import KafkaLog
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config, FetchConfig, KafkaConfig, LogConfig, ShardConfig
from streamlearn.contract.event_log import SqliteLog
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat, read_status

LIMIT_S = 120.0


@dataclass(frozen=True)
class Orders:
    name: str
    home: Path  # of all; each role has its own folder in it
    kafka: KafkaConfig | None
    fetch: FetchConfig
    partitions: int


def work(orders):
    """Be the role until SIGTERM, or death."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    home = orders.home / orders.name
    home.mkdir(exist_ok=True)
    said = os.open(home / "said.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s", force=True)
    logging.getLogger("kafka").setLevel(logging.ERROR)
    code = 0
    try:
        log = KafkaLog(orders.kafka) if orders.kafka else SqliteLog(orders.home / "log.sqlite")
        config = Config(fetch=orders.fetch, shard=ShardConfig(max_age_s=2.0), log=LogConfig(partitions=orders.partitions))
        catalog = DeltaCatalog(str(orders.home / "store" / "catalog" / "shards"), log_id=log.log_id)
        store, heart = FolderStore(orders.home / "store"), Heartbeat(home, "fetch")
        run_fetch(config, log, store, catalog, FetchMetrics(CollectorRegistry()), heart, stop=stop, home=home)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


class Fetchers:
    def __init__(self, home, kafka, fetch, partitions):
        self.home, self.kafka, self.fetch, self.partitions = home, kafka, fetch, partitions
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.crash.fetchers"])  # a start costs a fork, not seconds of imports
        self.running = {}

    def start(self, name):
        """Its name is in its user agent."""
        fetch = self.fetch.model_copy(update={"user_agent": f"streamlearn/0.1 ({name})"})
        orders = Orders(name, self.home, self.kafka, fetch, self.partitions)
        self.running[name] = self.context.Process(target=work, args=(orders,), daemon=True)
        self.running[name].start()

    def stop(self, name):
        """In good order; its exit code."""
        process = self.running.pop(name)
        process.terminate()
        process.join(60)
        return process.exitcode

    def kill(self, name):
        process = self.running.pop(name)
        process.kill()
        process.join()

    def said(self):
        return {path.parent.name: path.read_text()[-2000:] for path in self.home.glob("*/said.txt")}

    def wait(self, condition):
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            dead = [name for name, process in self.running.items() if process.exitcode is not None]
            assert not dead and time.monotonic() < deadline, (dead, self.said())
            time.sleep(0.05)

    def partitions_of(self, name):
        return read_status(self.home / name).get("fetch", {}).get("partitions", 0)

    @contextlib.contextmanager
    def ending(self):
        try:
            yield self
        finally:
            for name in list(self.running):
                self.kill(name)
