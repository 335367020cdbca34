"""The acceptance: backed up while it learns, wiped, restored, and gone on with; the auditor finds nothing missing and nothing double."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from bench.kills import TEMPLATE, audit_home, feed, settled
from ingest.audit import verify
from streamlearn.cli.roles import Home
from streamlearn.contract.config_file import from_json
from streamlearn.contract.status import read_status
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.stream.audit import audit
from tests.conftest import REPO

IMAGES = 300
COMMAND = [sys.executable, "-m", "streamlearn"]


def cli(*words):
    return json.loads(subprocess.run([*COMMAND, *map(str, words), "--json"], cwd=REPO, check=True, capture_output=True, text=True).stdout)


def until(done, limit_s=400):
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_backed_up_while_it_learns_then_wiped_nothing_is_lost_and_nothing_is_doubled(tmp_path, data_dir):
    home, place = tmp_path / "home", tmp_path / "backups"
    home.mkdir()
    (home / "run.toml").write_text(TEMPLATE.format(home=home, data=data_dir))
    source = [sys.executable, "-m", "bench.serve", str(data_dir / "cifar10-train.parquet"), "--count", str(IMAGES)]
    server = subprocess.Popen(source, cwd=REPO, stdout=subprocess.PIPE, text=True)
    up = [*COMMAND, "up", "--config", home / "run.toml", "--home", home]
    loop = subprocess.Popen(up, cwd=REPO)
    try:
        base, fed = server.stdout.readline().split()[-1], 0
        made = []
        for images, step in ((100, 6), (180, 11), (240, 16)):  # three backups, while images come in and the learner goes on
            while fed < images:
                fed = feed(home / "urls.txt", base, images, fed)
            until(lambda step=step: read_status(home).get("train", {}).get("step", 0) >= step)
            before = known(home)
            made.append(cli("backup", "--home", home, "--to", place))
            assert before[0] <= made[-1]["step"]
        assert [b["number"] for b in made] == [1, 2, 3] and made[-1]["same"] > made[-1]["new"] > 0
        loop.send_signal(signal.SIGKILL)
        loop.wait(60)
        until(lambda: not [pid for pid in pids(home) if alive(pid)])
        shutil.rmtree(home)

        restored = cli("restore", "--from", place, "--home", home)
        step, rows, snapshots = known(home)
        assert step == restored["step"] == made[-1]["step"]
        assert before[1] <= rows and before[2] <= snapshots  # all that was there when the backup began
        check(home, restored)
        loop = subprocess.Popen(up, cwd=REPO)
        while not settled(home, IMAGES) and loop.poll() is None:
            fed = feed(home / "urls.txt", base, IMAGES, len((home / "urls.txt").read_text().split()))
            time.sleep(0.5)
        loop.send_signal(signal.SIGINT)
        assert loop.wait(120) == 0
        found = audit_home(home, IMAGES)
        assert found.wrong == [], "\n".join(found.lines)
    finally:
        loop.kill()
        server.terminate()


def known(home):
    """(step of the newest checkpoint, shards, tags) that are committed now."""
    at = Home(home, from_json((home / "config.json").read_text(), where="config.json"))
    steps = [e["step"] for e in json.loads(at.store().get("checkpoints/latest.json"))["checkpoints"]]
    return steps[0], {row.key for row in at.catalog(at.log().log_id).rows()}, set(at.registry().names())


def check(home, restored):
    """The restored home, before anything runs in it."""
    config = from_json((home / "config.json").read_text(), where="config.json")
    at = Home(home, config)
    log = at.log()
    assert verify(log, at.store(), at.catalog(log.log_id), deep=True, sample=0).findings == []
    state = Checkpoints(at.store(), keep=3).load()
    assert state["step"] == restored["step"]
    assert all(end <= restored["positions"][place] for place, end in state["stream"]["cursor"].items())
    learnt = audit(config.stream, at.store(), state["stream"])
    assert learnt.batches == state["step"] and set(learnt.fresh.values()) == {1}


def pids(home):
    return [s["pid"] for s in read_status(home).values() if "pid" in s]


def alive(pid):
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.strip()[:1] not in (
        "",
        "Z",
    )
