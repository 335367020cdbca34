"""A real Prometheus reads a real loop: what the dashboards ask has answers, and the answers are what `streamlearn status` says."""

import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
import urllib.request

import pytest
import yaml

from streamlearn.view import overview
from tests.conftest import REPO, missing
from tests.ops import queries
from tests.ops.prometheus import Prometheus, free_port, running
from tests.ops.queries import OPS

LIMIT_S = 900  # for each thing that is waited for; the machine may be busy
FIRST, MOST, PULSE = 300, 3000, 20  # images: announced by the demo, in all at most, and added at each look
SMALL = {  # a world that stands still once nobody adds to it, and so does what is measured
    "demo.max_images": FIRST,
    "demo.size": 32,
    "serve.enabled": "true",
    "serve.port": 0,
    "shard.max_samples": 100,
    "stream.round_samples": 200,
    "stream.max_replay_per_fresh": 1.0,
    "train.batch": 32,
    "train.snapshot_steps": 15,
    "train.checkpoint_steps": 15,
    "probe.drift_window": 256,
    "probe.drift_period_s": 1,
    "probe.view_images": 20,
    "supervise.report_s": 0,
}
# what an embedded loop of some minutes cannot show, and why
WITHOUT = {
    "learner_gpu_utilisation_ratio": "no GPU here",
    "learner_gpu_memory_bytes": "likewise",
    "learner_gpu_memory_size_bytes": "likewise",
    "evaluator_transfer_ratio": "a second generation begins with a quarter",
}
JSON = {"Content-Type": "application/json"}
FIGURES = (  # of `status --json`, and what a dashboard asks for the same
    ("learner_step_number", lambda s: s["train"]["step"]),
    ("sum(learner_images_total)", lambda s: s["train"]["images"]),
    ('sum(learner_images_total{kind="fresh"})', lambda s: s["train"]["fresh"]),
    ("learner_loss_nats", lambda s: s["train"]["loss"]),
    ("learner_learning_rate", lambda s: s["train"]["lr"]),
    ("learner_learning_rate_halvings", lambda s: s["train"]["halvings"]),
    ('sum(fetch_outcomes_total{outcome="stored"})', lambda s: s["ingest"]["stored"]),
    ("sum(fetch_shards_sealed_total)", lambda s: s["ingest"]["shards"]),
    ("sum(fetch_lag_records)", lambda s: s["ingest"]["lag"]),
    ("sum(connect_candidates_total)", lambda s: s["candidates"]),
    ("max(evaluator_pending_snapshots)", lambda s: s["evaluate"]["pending"]),
    ('max by (bank) (evaluator_accuracy_ratio{probe="knn"})', lambda s: s["curve"][-1]["knn"]),
)


def wait(loop, log, look, what):
    """What `look` returns once it is true, while the loop lives."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := look()):
        assert loop.poll() is None, log.read_text()
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.5)
    return found


def scraping(folder, home, port):
    """ops/prometheus/embedded.yml as it is, with this loop's ports, more often, and the roles that `up` runs only if asked."""
    config = yaml.safe_load((OPS / "prometheus/embedded.yml").read_text())
    ports = {path.stem: json.loads(path.read_text())["metrics_port"] for path in (home / "status").glob("*.json")} | {"prometheus": port}
    template = config["scrape_configs"][0]
    config["scrape_configs"] = [
        template | {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{number}"]}]} for job, number in ports.items()
    ]
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(OPS / "prometheus/rules/*.yml")]
    del config["alerting"]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    return file


def pull(home, push_port):
    """As clients of both protocols do, and of the connectors' API; and a push to a webhook, which is refused: the world stays as it is."""
    said = json.loads((home / "status/serve.json").read_text())
    at, name = f"http://127.0.0.1:{said['port']}", json.loads((home / "config.json").read_text())["train"]["name"]
    rest = json.loads((home / "config.json").read_text())["connect"]["rest_port"]
    config = {"connector.class": "webhook", "port": push_port, "anonymous": True}
    put = urllib.request.Request(f"http://127.0.0.1:{rest}/connectors/push/config", json.dumps(config).encode(), JSON, method="PUT")
    with urllib.request.urlopen(put, timeout=60) as answer:
        answer.read()
    with contextlib.suppress(OSError):  # 400, or it does not listen yet
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{push_port}/v1/candidates", b"{", JSON), timeout=60)
    for path in (f"v2/{name}/tags/list", f"v2/{name}/manifests/candidate", f"api/models/{name}/revision/candidate", ""):
        with urllib.request.urlopen(f"{at}/{path}", timeout=60) as answer:
            answer.read()


def announce(home):
    """More images, as the demo announces its own: rates, and a second window of drift, are of what comes while Prometheus looks."""
    urls = home / "demo" / "urls.txt"
    lines = urls.read_text().splitlines()
    if FIRST <= len(lines) < MOST:
        base = lines[0].rpartition("/")[0]
        with urls.open("a") as out:
            out.write("".join(f"{base}/{i}.jpg\n" for i in range(len(lines), len(lines) + PULSE)))


def differences(prometheus, home):
    """Figures of the dashboards that are not those of the status."""
    status = overview(home)
    with contextlib.suppress(KeyError, IndexError):  # not said yet
        pairs = [(expr, prometheus.value(expr), float(of(status))) for expr, of in FIGURES]
        return {expr: (ours, said) for expr, ours, said in pairs if not math.isclose(ours, said, rel_tol=1e-6, abs_tol=1e-6)}
    return {"status": ("not complete", status["train"])}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_dashboard_is_filled_by_an_embedded_loop_and_agrees_with_its_status(tmp_path):
    if shutil.which("prometheus") is None:
        missing("prometheus is not installed: Debian's prometheus")
    home, port = tmp_path / "home", free_port()
    python, environment = [sys.executable, "-m", "streamlearn"], os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    settings = [part for key, value in (SMALL | {"connect.rest_port": free_port()}).items() for part in ("--set", f"{key}={value}")]
    roles = {"demo", "connect", "fetch", "train", "evaluate", "serve", "refresh"}
    since = time.time()
    with contextlib.ExitStack() as stack:
        up, log = [*python, "up", "--demo", "--home", str(home), *settings], tmp_path / "up.log"
        until = functools.partial(wait, stack.enter_context(running(up, log, env=environment)), log)
        until((home / "config.json").exists, "the loop does not begin")
        until((home / "status/train.json").exists, "the learner does not begin")
        stack.enter_context(running([*python, "role", "refresh", "--home", str(home)], tmp_path / "refresh.log", env=environment))
        until(lambda: {path.stem for path in (home / "status").glob("*.json")} >= roles, "not all roles begin")
        argv = ["prometheus", f"--config.file={scraping(tmp_path, home, port)}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        stack.enter_context(running([*argv, f"--web.listen-address=127.0.0.1:{port}"], tmp_path / "prometheus.log"))
        prometheus = Prometheus(port)
        until(prometheus.ready, "Prometheus does not begin")
        until(lambda: prometheus.up(roles | {"prometheus"}), "not every target is up")
        assert all(rule["health"] in ("ok", "unknown") for g in prometheus.get("api/v1/rules")["data"]["groups"] for rule in g["rules"])
        until(lambda: prometheus.value("max(learner_snapshot_timestamp_seconds)") > 0, "no snapshot")
        push_port = free_port()
        pull(home, push_port)

        def empty():
            asked = [(where, expr) for where, expr in queries.asked() if not queries.names(expr) & set(WITHOUT)]
            return {(where, expr) for where, expr in asked if not prometheus.drawn(expr, since)}

        def filled():
            pull(home, push_port)
            announce(home)
            return not empty()

        until(filled, lambda: f"nothing is drawn by {sorted(empty())}")
        until(lambda: not differences(prometheus, home), lambda: f"dashboards and status differ: {differences(prometheus, home)}")
        broken = [r["name"] for g in prometheus.get("api/v1/rules")["data"]["groups"] for r in g["rules"] if r["health"] == "err"]
        assert broken == []
        for reason in WITHOUT:
            assert not prometheus.drawn(reason, since), f"{reason} is there: take it from the list"
