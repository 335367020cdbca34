"""What Prometheus sees of a role that is killed and started again: the series that the alert RoleRestarting watches."""

import os
import signal
import sys
import urllib.request

from streamlearn.cli.roles import ROLES
from streamlearn.contract.config import Config, SuperviseConfig
from streamlearn.contract.status import read_status
from streamlearn.supervise import RoleSpec
from tests.conftest import REPO
from tests.ops import queries
from tests.ops.prometheus import free_port
from tests.supervise.test_supervise import Run


def started(port):
    """process_start_time_seconds of whoever answers there; None: nobody does."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return None
    return next(float(line.split()[1]) for line in lines if line.startswith("process_start_time_seconds "))


def test_a_role_that_is_killed_answers_on_the_same_port_with_another_start(tmp_path, monkeypatch):
    """So each kill is one change of one series."""
    assert "changes(process_start_time_seconds{" in queries.alerts()["RoleRestarting"]["expr"]
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    (home / "config.json").write_text(Config(home=str(home), metrics_port=port - ROLES.index("connect")).model_dump_json())
    spec = RoleSpec("connect", [sys.executable, "-m", "streamlearn", "role", "connect", "--home", str(home)])
    run, seen, pids = Run([spec], tmp_path / "logs", SuperviseConfig(backoff_s=0.05)), [], []

    def speaks_anew():
        return read_status(home).get("connect", {}).get("pid") not in (None, *pids) and started(port) not in (None, *seen)

    try:
        for kills in range(4):
            run.wait(speaks_anew)
            seen.append(started(port))
            pids.append(read_status(home)["connect"]["pid"])
            if kills < 3:
                os.kill(pids[-1], signal.SIGKILL)
        assert started(port) == seen[-1] and seen == sorted(seen) and len(set(seen)) == 4
        run.wait(lambda: run.ticks[-1] == {"connect": 3})
    finally:
        run.end()
