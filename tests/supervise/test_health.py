"""/healthz and /readyz are the role's own word."""

import json
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from streamlearn.cli.health import answer, serve
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import FetchMetrics
from streamlearn.contract.status import Heartbeat


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as found:
            return found.status, found.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


@pytest.mark.parametrize(
    ("said", "healthy", "ready"),
    [
        ({"state": "fetching", "waiting": ""}, 200, 200),
        ({"state": "starting"}, 200, 503),
        ({"state": "waiting", "waiting": "/spool: no space left", "waiting_since": "2026-11-21T12:00:00.000Z"}, 200, 503),
        ({"state": "learning", "unwritten": "/home/history/train.jsonl: no space left"}, 200, 503),
        ({"state": "finished"}, 200, 200),
    ],
)
def test_a_role_that_waits_is_healthy_and_not_ready_and_says_why(tmp_path, said, healthy, ready):
    heart = Heartbeat(tmp_path, "fetch")
    heart.beat(**said)
    port = serve(0, CollectorRegistry(), heart)
    assert get(port, "/healthz")[0] == healthy
    status, body = get(port, "/readyz")
    assert status == ready and json.loads(body) | said == json.loads(body)


def test_a_loop_that_hangs_is_not_healthy(tmp_path, monkeypatch):
    heart = Heartbeat(tmp_path, "train")
    heart.beat(state="learning")
    assert answer(heart, "/healthz")[0] == 200
    then = time.monotonic()
    monkeypatch.setattr("streamlearn.contract.status.time.monotonic", lambda: then + 121)
    assert answer(heart, "/healthz")[0] == 503 and answer(heart, "/readyz")[0] == 503


def test_metrics_are_there_and_a_taken_port_is_named(tmp_path):
    registry = CollectorRegistry()
    FetchMetrics(registry)
    port = serve(0, registry, Heartbeat(tmp_path, "fetch"))
    assert b"fetch_heartbeat_timestamp_seconds" in get(port, "/metrics")[1]
    with pytest.raises(ConfigError, match=f"port {port} for fetch is taken"):
        serve(port, registry, Heartbeat(tmp_path, "fetch"))
