"""`streamlearn serve` as a process: it says where it is, is healthy, refuses what it cannot do, and ends when told."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from streamlearn.contract.config import Config
from tests.conftest import REPO
from tests.serve.serving import DEADLINE_S, TOKEN, filled, tokens

COMMAND = [sys.executable, "-m", "streamlearn"]


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=DEADLINE_S) as answer:
        return answer.read()


def started(process, home):
    """Its heartbeat, once it serves."""
    path, end = home / "status" / "serve.json", time.monotonic() + DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and (said := json.loads(path.read_text())).get("state") == "serving":
            return said
        time.sleep(0.05)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("how", ["serve", "role"])
def test_it_serves_a_home_until_told_to_stop(tmp_path, how):
    filled(tmp_path, steps=(1, 2))
    if how == "serve":
        argv = ["serve", "--home", str(tmp_path), "--port", "0", "--tokens", tokens(tmp_path)]
    else:  # as `up` or a container starts it; a path in the file is relative to the file
        tokens(tmp_path)
        (tmp_path / "run.toml").write_text("[serve]\nport = 0\ntokens_file = 'tokens'\n")
        argv = ["role", "serve", "--home", str(tmp_path), "--config", str(tmp_path / "run.toml")]
    process = subprocess.Popen([*COMMAND, *argv], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        said = started(process, tmp_path)
        url, metrics = f"http://127.0.0.1:{said['port']}", f"http://127.0.0.1:{said['metrics_port']}"
        tags = json.loads(get(f"{url}/v2/streamlearn/tags/list", Authorization=f"Bearer {TOKEN}"))
        assert tags == {"name": "streamlearn", "tags": ["0.1.0", "0.2.0", "candidate", "stable"]}
        get(f"{url}/v2/streamlearn/manifests/stable", Authorization=f"Bearer {TOKEN}")
        assert json.loads(get(f"{metrics}/healthz"))["healthy"] and json.loads(get(f"{metrics}/readyz"))["ready"]
        assert b'serve_pulls_total{protocol="oci",tag="stable"} 1.0' in get(f"{metrics}/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("argv", "complaint"), [
    ([], "no snapshots yet"), (["--address", "0.0.0.0"], "can be reached by others"), (["--tokens", "no-such-file"], "No such file"), (["--port", "taken"], "cannot listen"),
])  # fmt: skip
def test_what_it_cannot_do_it_says_in_one_line(tmp_path, argv, complaint):
    if argv:
        filled(tmp_path, steps=(1,))
    with socket.create_server(("127.0.0.1", 0)) as other:
        argv = [str(other.getsockname()[1]) if word == "taken" else word for word in argv]
        command = [*COMMAND, "serve", "--home", str(tmp_path), *argv]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr


def test_up_starts_it_only_when_asked_to():
    assert not Config().serve.enabled


def test_it_needs_no_torch():
    code = "import sys, streamlearn.serve.run; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip() == "False"
