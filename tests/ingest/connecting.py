"""A package made for a test, the real role in a thread, and a real client of its REST API."""

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

from prometheus_client import CollectorRegistry

from ingest.connectors.run import run_connect
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Config
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, DEAD_LETTERS, SOURCE_STATE, SqliteLog
from streamlearn.contract.metrics import ConnectMetrics
from streamlearn.contract.status import Heartbeat, read_status

DEADLINE_S = float(os.environ.get("STREAMLEARN_TEST_DEADLINE_S", "120"))


def install(site, monkeypatch, name, modules, entries, version="0.1"):
    """What an installer leaves of a package: its modules, and a dist-info that names its entry points."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[streamlearn.connectors]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    for module, code in modules.items():
        (site / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(str(site))


def make_log(folder, kind=SqliteLog):
    log = kind(folder / "log.sqlite")
    for topic in (CANDIDATES, DEAD_LETTERS, SOURCE_STATE, CONNECTOR_CONFIGS):
        log.ensure_topic(topic, 2)
    return log


def records(log, topic=CANDIDATES):
    return [r for p in range(2) for r in log.read(topic, p, 0, 10**6)]


def urls(log, source=None):
    found = [Candidate.from_json(r.value) for r in records(log)]
    return sorted(c.url for c in found if source in (None, c.source))


def until(what, deadline_s=DEADLINE_S):
    """The first true value of `what`."""
    deadline = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"did not come to pass: {what}"
        time.sleep(0.02)
    return found


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Role:
    """The role `connect` in a thread, with its REST API."""

    def __init__(self, folder, *, log=None, token="", connectors=(), **settings):
        self.folder, self.port, self.token = folder, free_port(), token
        self.log = log or make_log(folder)
        self.config = Config.model_validate({"connectors": tuple(connectors), "connect": {"rest_port": self.port} | settings})
        self.stop, self.error, self.registry = threading.Event(), None, CollectorRegistry()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            beat = Heartbeat(self.folder, "connect", period_s=0.0)
            run_connect(self.config, self.log, ConnectMetrics(self.registry), beat, self.stop, token=self.token)
        except BaseException as e:
            self.error = e

    def __enter__(self):
        self.thread.start()
        until(lambda: self.error or self.answers())
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()

    def answers(self):
        try:
            return self.call("GET", "/")[0]
        except OSError:
            return False

    def call(self, method, path, body=None, *, token=None, headers=None, raw=None):
        """(status, JSON)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, method=method)
        request.add_header("Content-Type", "application/json")
        if token or self.token:
            request.add_header("Authorization", f"Bearer {token or self.token}")
        for key, value in (headers or {}).items():
            request.add_header(key, value)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as e:
            status, text = e.code, e.read()
        return status, json.loads(text) if text else None

    def state(self, name):
        return self.call("GET", f"/connectors/{name}/status")[1]["connector"]["state"]

    def reaches(self, name, state):
        until(lambda: self.state(name) == state)

    def beat(self):
        return read_status(self.folder).get("connect", {})

    def metric(self, name, **labels):
        return self.registry.get_sample_value(name, labels)
