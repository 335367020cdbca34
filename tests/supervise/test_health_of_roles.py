"""Every role answers /healthz and /readyz: alive is who makes a round, ready is who can do its work."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from bench.chaos import Everything
from streamlearn.cli.roles import ROLES
from streamlearn.contract.config import Config, ConnectorConfig, KafkaConfig
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, DEAD_LETTERS, HOSTS, SHARDS, SOURCE_STATE, TAKEDOWNS
from streamlearn.contract.status import read_status
from tests.adapters.kafka import MockCluster, mock_config
from tests.conftest import REPO
from tests.ingest.server import picture


def ask(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def until(done, process):
    deadline = time.monotonic() + 200
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        if found := done():
            return found
        time.sleep(0.2)


READY = {"demo": "serving", "connect": "watching", "fetch": "fetching", "evaluate": "watching", "serve": "serving", "refresh": "keeping"}


@pytest.mark.parametrize("role", ["demo", "connect", "fetch", "train", "evaluate", "serve", "refresh"])
def test_a_role_is_alive_before_it_is_ready_and_ends_by_sigterm(tmp_path, role):
    """The learner has nothing to learn here: alive, not ready, and it says so."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(picture(1))
    source = ConnectorConfig.of("images", "folder", path=str(tmp_path / "images"))
    config = Config(
        home=str(tmp_path / "home"), connectors=(source,), log_format="json", serve={"enabled": True, "port": 0}, demo={"size": 16}
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "streamlearn", "role", role, "--home", str(tmp_path / "home")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=REPO, stderr=log, env=os.environ | {"PYTHONPATH": str(REPO)})
    try:
        port = until(lambda: read_status(tmp_path / "home").get(role, {}).get("metrics_port"), process)
        status, body = ask(port, "/healthz")
        assert status == 200 and body["role"] == role and body["healthy"]
        wanted = (200, READY[role]) if role in READY else (503, "waiting")
        until(lambda: (ask(port, "/readyz")[0], ask(port, "/readyz")[1].get("state")) == wanted, process)
        assert ask(port, "/healthz")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
        assert all(json.loads(line)["role"] == role for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{"))
    finally:
        process.kill()


def waited(port, role):
    """Of the role's metrics: what for, and how long."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as found:
        lines = found.read().decode().splitlines()
    told = {line.split('"')[1]: float(line.split()[1]) for line in lines if line.startswith(f"{role}_waiting_seconds{{")}
    return {on: seconds for on, seconds in told.items() if seconds}


@pytest.mark.parametrize("role", ["connect", "fetch"])
def test_a_role_waits_for_brokers_that_are_out_when_it_is_started_and_later_and_says_so(tmp_path, role):
    """It does not end: a supervisor takes an end with exit code 2 for a configuration that only a person can mend."""
    cluster, home = MockCluster(), tmp_path / "home"
    for topic in (CANDIDATES, DEAD_LETTERS, SHARDS, CONNECTOR_CONFIGS, SOURCE_STATE, TAKEDOWNS, HOSTS):
        cluster.make_topic(topic, 2)
    kafka = mock_config(cluster, start_timeout_s=1.0)
    config = Config(home=str(home), log={"kind": "kafka", "partitions": 2, "kafka": kafka}, fetch={"retry_delays_s": ()})
    home.mkdir()
    (home / "config.json").write_text(config.model_dump_json())
    cluster.down()
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "streamlearn", "role", role, "--home", str(home)]
        process = subprocess.Popen(command, cwd=REPO, stderr=log, env=os.environ | {"PYTHONPATH": str(REPO)})
    try:
        port = until(lambda: read_status(home).get(role, {}).get("metrics_port"), process)
        for words in ("no broker answers", "Kafka"):  # at its start, then while it runs
            until(lambda: ask(port, "/readyz")[1].get("waiting_s", 0) > 2, process)
            status, body = ask(port, "/readyz")
            assert status == 503 and body["state"] == "waiting" and words in body["waiting"] and body["healthy"]
            assert body["waiting_on"] == "broker" and waited(port, role)["broker"] > 2
            cluster.up()
            until(lambda: ask(port, "/readyz")[1].get("state") == READY[role] and not waited(port, role), process)
            until(lambda: role != "fetch" or ask(port, "/readyz")[1].get("partitions"), process)  # the group has formed: it reads
            cluster.down()
        cluster.up()
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        process.kill()
        cluster.close()


def test_a_learner_waits_for_a_store_that_is_out_when_it_is_started_and_says_so(tmp_path, bucket):
    with bucket.behind_faults(Everything("answer")) as proxy:
        config = Config(home=str(tmp_path), store=bucket.config(endpoint_url=proxy.url, attempts=1))
        (tmp_path / "config.json").write_text(config.model_dump_json())
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, "-m", "streamlearn", "role", "train", "--home", str(tmp_path)]
            process = subprocess.Popen(command, cwd=REPO, stderr=log, env=os.environ | {"PYTHONPATH": str(REPO)})
        try:
            port = until(lambda: read_status(tmp_path).get("train", {}).get("metrics_port"), process)
            until(lambda: waited(port, "learner").get("store", 0) > 2, process)
            assert ask(port, "/healthz")[0] == 200 and "503" in ask(port, "/readyz")[1]["waiting"]
            proxy.faults = []
            until(lambda: not waited(port, "learner") and "503" not in ask(port, "/readyz")[1].get("waiting", ""), process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(("rank", "listens"), [("0", True), ("1", False)])
def test_of_a_learner_on_many_ranks_only_the_first_listens_and_speaks(tmp_path, rank, listens):
    """Its port is taken: one that would listen cannot start, one that would not goes on, here as far as to its brokers, who are out."""
    home = tmp_path / "home"
    home.mkdir()
    with socket.socket() as held, (tmp_path / "log").open("wb") as log:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        kafka = KafkaConfig(servers=("127.0.0.1:9",), start_timeout_s=1.0)
        config = Config(home=str(home), log={"kind": "kafka", "kafka": kafka}, metrics_port=port - ROLES.index("train"))
        (home / "config.json").write_text(config.model_dump_json())
        environment = os.environ | {"PYTHONPATH": str(REPO), "RANK": rank, "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "streamlearn", "role", "train", "--home", str(home)]
        process = subprocess.Popen(command, cwd=REPO, stderr=log, env=environment)
        try:
            if listens:
                assert process.wait(200) == 2 and f"port {port} for train is taken" in (tmp_path / "log").read_text()
                return
            until(lambda: "no broker answers" in (tmp_path / "log").read_text(), process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0 and read_status(home) == {}
        finally:
            process.kill()
