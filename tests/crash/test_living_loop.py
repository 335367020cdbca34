"""The whole loop, as a user runs it: real processes over real HTTP, killed at random, then audited."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.kills import audit_home, drive
from streamlearn.cli.roles import Home
from streamlearn.contract.status import read_status
from streamlearn.snapshots.pull import list_snapshots
from tests.conftest import REPO
from tests.ingest.server import picture


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_a_dozen_times_nothing_is_lost_and_nothing_is_doubled(tmp_path, data_dir, monkeypatch):
    """The short form of `python -m bench.kills`, which kills fifty times and more."""
    monkeypatch.setattr("bench.kills.DATA", data_dir)
    killed = drive(tmp_path, images=300, kills=12, seed=3, limit_s=420)
    found = audit_home(tmp_path, 300)
    assert sum(killed.values()) >= 12 and found.wrong == [], "\n".join(found.lines)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_folder_of_images_goes_all_the_way_round_and_on_again(tmp_path):
    """`streamlearn up --images --probe`: snapshots, probes, report; stopped, and going on where it was."""
    images, bank = tmp_path / "images", tmp_path / "bank"
    for i in range(90):
        for path in (images / f"{i}.jpg", bank / f"class{i % 3}" / f"{i}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i, size=(40, 36)))
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff not really")
    home = tmp_path / "home"
    small = [
        "train.batch=16",
        "train.snapshot_steps=4",
        "train.checkpoint_steps=2",
        "objective.prototypes=8",
        "shard.max_age_s=1",
        "stream.workers=1",
    ]
    command = [sys.executable, "-m", "streamlearn", "up", "--images", str(images), "--probe", str(bank), "--home", str(home)]
    for setting in [*small, "train.bn_images=32", "train.threads=1", "supervise.report_s=1000"]:
        command += ["--set", setting]

    def run_until(done, limit_s=150):
        loop = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + limit_s
        while loop.poll() is None and not done(read_status(home)) and time.monotonic() < deadline:
            time.sleep(0.2)
        loop.send_signal(signal.SIGINT)
        out, _ = loop.communicate(timeout=90)
        assert loop.returncode == 0, out
        return out

    def probed(status):
        return (status.get("evaluate", {}).get("last") or {}).get("step", 0) >= 4

    out = run_until(probed)
    first = read_status(home)["train"]
    assert "report:" in out and "k-NN" in out
    page = (home / "report.html").read_text()
    assert page.count("<svg") >= 4 and "http://" not in page.replace("http://www.w3.org", "") and "data:image/jpeg" in page
    status = json.loads(subprocess.check_output([sys.executable, "-m", "streamlearn", "status", "--json", "--home", str(home)], cwd=REPO))
    assert status["ingest"]["stored"] == 90 and status["ingest"]["outcomes"]["rejected:truncated"] == 1

    run_until(lambda s: s.get("train", {}).get("step", 0) > first["step"] + 2)
    second = read_status(home)["train"]
    assert second["step"] > first["step"] and second["cursor"] == first["cursor"] and second["fresh"] == 90
    steps = [s.step for s in list_snapshots(Home(home).registry())]
    assert steps == sorted(set(steps)) and steps[0] == 4


def test_a_bad_command_line_is_refused_before_anything_is_made(tmp_path):
    for arguments, complaint in [
        (["--images", str(tmp_path / "nowhere")], "no such folder"),
        (["--urls", str(tmp_path / "nowhere.txt")], "no such file"),
        (["--demo", "--images", str(tmp_path)], "--demo is a source of its own"),
        (["--demo", "--set", "train.bach=3"], "train.bach: no such key; did you mean train.batch?"),
        (["--demo", "--set", "model.backbone=resnet50"], "unknown; one of"),
        (["--demo", "--set", "oops"], "write KEY=VALUE"),
        (["--config", str(tmp_path / "nowhere.toml")], "no such file"),
    ]:
        home = tmp_path / "home"
        command = [sys.executable, "-m", "streamlearn", "up", "--home", str(home), *arguments]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(REPO)})
        assert done.returncode == 2 and complaint in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not Path(home / "config.json").exists()
