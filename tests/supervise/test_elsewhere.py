"""A role whose process cannot be seen from here, in another container or on another host: it is judged by its heartbeat."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from rich.console import Console

from streamlearn import view
from streamlearn.__main__ import cli
from streamlearn.cli.healthcheck import health
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.status import SILENT_S, Heartbeat, elsewhere, read_status
from tests.conftest import REPO, missing

LIMIT_S = 120


def home_with(tmp_path, **sections):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text(Config(home=str(tmp_path / "home"), **sections).model_dump_json())
    return tmp_path / "home"


def spoken(home, role, *, at=None, **more):
    """A heartbeat of now or of another time, with whatever it says of where it comes from."""
    Heartbeat(home, role).beat(force=True, **more)
    file = home / "status" / f"{role}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more | ({"at": at} if at else {})))


def drawn(home):
    console = Console(width=200, file=io.StringIO())
    console.print(view.panel(view.overview(home), 1.0))
    return console.file.getvalue()


AFAR = {"host": "c0ffee", "pids": "another run pid:[1]", "pid": 1}


def test_a_role_in_a_pid_namespace_of_its_own_is_alive_as_long_as_it_speaks(tmp_path):
    """As in containers that share a home.  Killed, it is not said to be dead but when it was seen."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--pid", "--fork", "true"], check=False).returncode:
        missing("no pid namespace can be had: unshare needs root")
    (tmp_path / "images").mkdir()
    home = home_with(tmp_path, connectors=(ConnectorConfig.of("images", "folder", path=str(tmp_path / "images")),))
    argv = [*("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"), sys.executable, "-m", "streamlearn", "role", "connect"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*argv, "--home", str(home)], cwd=REPO, stderr=log, env=os.environ | {"PYTHONPATH": str(REPO)})
    try:
        deadline = time.monotonic() + LIMIT_S
        while read_status(home).get("connect", {}).get("state") != "watching":
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        beat = read_status(home)["connect"]
        found = view.overview(home)["roles"]["connect"]
        assert beat["pid"] < 10 and elsewhere(beat) == found["elsewhere"] == beat["host"]  # not our number for it
        assert found["alive"] and f"watching on {beat['host']}" in drawn(home)
        asked = CliRunner().invoke(cli, ["connectors", "status", "images", "--home", str(home), "--json"])
        assert json.loads(asked.output)["state"] == "RUNNING"
        assert CliRunner().invoke(health, ["--home", str(home)]).exit_code == 0
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    spoken(home, "connect", at="2026-01-01T00:00:00Z", **{key: beat[key] for key in ("host", "pids", "pid", "state")})
    assert not view.overview(home)["roles"]["connect"]["alive"]
    assert f"ago on {beat['host']}" in drawn(home) and "not running" not in drawn(home)


def test_a_role_of_these_process_numbers_is_looked_for(tmp_path):
    """However lately it spoke: it was killed, and that can be seen."""
    home = home_with(tmp_path)
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    spoken(home, "fetch", pid=gone.pid, state="fetching")
    found = view.overview(home)["roles"]["fetch"]
    assert (found["alive"], found["elsewhere"]) == (False, "") and "not running" in drawn(home)


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_one_elsewhere_that_said_that_it_ends_is_not_alive(tmp_path, state):
    home = home_with(tmp_path)
    spoken(home, "fetch", **AFAR, state=state)
    assert not view.overview(home)["roles"]["fetch"]["alive"]
    assert ("not running" if state == "stopped" else "finished") in drawn(home)


def test_a_heartbeat_of_before_this_was_said_is_taken_for_one_of_here(tmp_path):
    spoken(tmp_path, "fetch", state="fetching")
    beat = {key: value for key, value in read_status(tmp_path)["fetch"].items() if key not in ("host", "pids")}
    assert elsewhere(beat) == "" and elsewhere(beat | {"pids": "another"}) == "another host"


def test_health_of_a_home_goes_by_the_heartbeat_of_who_cannot_be_asked(tmp_path):
    def asked(*more):
        found = CliRunner().invoke(health, ["--home", str(tmp_path), *more])
        return found.exit_code, found.output

    spoken(tmp_path, "fetch", **AFAR, state="waiting", metrics_port=1)
    code, words = asked()
    assert code == 0 and words.startswith("fetch: good: waiting, seen ") and asked("--ready")[0] == 1
    spoken(tmp_path, "fetch", **AFAR, state="fetching", metrics_port=1)
    assert asked("--ready")[0] == 0
    spoken(tmp_path, "fetch", at="2026-01-01T00:00:00Z", **AFAR, state="fetching", metrics_port=1)
    code, words = asked()
    assert code == 1 and "s ago on c0ffee" in words and SILENT_S == 120


def test_a_container_that_asks_for_its_role_by_name_is_not_content_with_its_predecessors_heartbeat(tmp_path):
    spoken(tmp_path, "fetch", **AFAR, state="fetching", metrics_port=1)
    found = CliRunner().invoke(health, ["fetch", "--home", str(tmp_path)])
    assert found.exit_code == 1 and "no answer on port 1" in found.output
