"""Roles as containers run them: a TOML file, Kafka for the log, S3 for the store; each in a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, DEAD_LETTERS, HOSTS, SHARDS, SOURCE_STATE, TAKEDOWNS, retry_topic
from tests.adapters.kafka import MockCluster, MockedLog, mock_config
from tests.adapters.s3 import bucket, s3_environment, s3_server  # noqa: F401
from tests.conftest import REPO
from tests.ingest.server import Site, picture, serving

PREFIX = "deployed."
TOPICS = (CANDIDATES, DEAD_LETTERS, HOSTS, SHARDS, SOURCE_STATE, CONNECTOR_CONFIGS, TAKEDOWNS, *(retry_topic(i) for i in range(3)))
TOML = """
[[connectors]]
name = "list"
class = "urls"
path = "{list}"

[log]
kind = "kafka"
[log.kafka]
servers = {servers}
topic_prefix = "deployed."
api_version = [2, 3]
session_timeout_s = 6.0

[store]
kind = "s3"
bucket = "{bucket}"
endpoint_url = "{endpoint}"
path_style = true

[fetch]
allow_networks = ["127.0.0.0/8"]
host_rate = 0.0

[shard]
max_age_s = 1.0

[stream]
workers = 0
crops = [{{ count = 2, size = 32, scale = [0.3, 1.0] }}]
round_samples = 16
[model]
backbone = "regnety-tiny"
stem = "cifar"
head = [32, 16]
[objective]
prototypes = 8
[train]
batch = 8
threads = 1
checkpoint_steps = 2
snapshot_steps = 2
bn_images = 8
max_steps = 2
"""


class Roles:
    def __init__(self, folder, config):
        self.folder, self.config, self.running = folder, config, {}

    def start(self, name):
        argv = [sys.executable, "-m", "streamlearn", "role", name, "--home", str(self.folder / name), "--config", str(self.config)]
        with (self.folder / f"{name}.log").open("ab") as out:
            self.running[name] = subprocess.Popen(argv, cwd=REPO, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def log(self, name):
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def stop(self):
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        codes = {name: process.wait(60) for name, process in self.running.items()}
        self.running.clear()
        return codes


def wait_for(condition, roles, limit_s=150):
    deadline = time.monotonic() + limit_s
    while not condition():
        dead = {name: roles.log(name) for name, p in roles.running.items() if p.poll() not in (None, 0)}
        assert not dead and time.monotonic() < deadline, dead or {name: roles.log(name) for name in roles.running}
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_roles_work_together_over_kafka_and_s3(tmp_path, bucket):  # noqa: F811
    cluster = MockCluster()
    for topic in TOPICS:  # the mock cannot be asked to make them
        cluster.make_topic(PREFIX + topic, 2)
    roles = Roles(tmp_path, tmp_path / "run.toml")
    try:
        with serving(Site()) as base:
            urls = tmp_path / "urls.txt"
            urls.write_text("".join(f"{base}/{i}.jpg\n" for i in range(40)))
            text = TOML.format(list=urls, servers=list(cluster.servers), bucket=bucket.name, endpoint=bucket.url)
            roles.config.write_text(text.replace("'", '"'))
            config = bucket.config(prefix="")
            log = MockedLog(mock_config(cluster, topic_prefix=PREFIX))
            store = S3Store(config)
            catalog = DeltaCatalog(store.uri("catalog/shards"), log_id=log.log_id, storage_options=delta_options(config))
            for name in ("connect", "fetch"):
                roles.start(name)
            wait_for(lambda: sum(row.num_samples for row in catalog.rows()) == 40, roles)
            assert roles.stop() == {"connect": 0, "fetch": 0}
            roles.start("fetch")  # goes on: everything is stored, nothing is fetched again
            roles.start("train")
            wait_for(lambda: roles.running["train"].poll() == 0, roles)
            assert roles.stop()["fetch"] == 0
            rows = catalog.rows()
            log.close()
        assert sum(row.num_samples for row in rows) == 40 and any(key.startswith("checkpoints/") for key in store.list("checkpoints/"))
        body = store.get(next(row.key for row in rows if row.num_samples))
        assert any(picture(i) in body for i in range(40))
        assert (tmp_path / "train" / "registry" / "index.json").exists()
    finally:
        roles.stop()
        cluster.close()
