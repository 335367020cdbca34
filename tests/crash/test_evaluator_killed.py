"""The role `evaluate` as a process, killed with SIGKILL again and again: every snapshot is measured, none twice, and the pictures are whole."""

import json
import random
import subprocess
import sys
import time

import pytest

from streamlearn.contract.config import BankConfig
from streamlearn.contract.registry import OciLayout
from streamlearn.snapshots.publish import publish, results
from tests.conftest import REPO
from tests.probes.world import bank_file, config
from tests.snapshots.test_publish import export

SNAPSHOTS, KILLS, DEADLINE_S = 3, 4, 280


@pytest.mark.slow
def test_killed_again_and_again_every_snapshot_is_measured_once(tmp_path):
    banks = tuple(BankConfig(name=f"b{i}", train=bank_file(tmp_path, name=f"{i}.parquet", first=i), generation="2026Q4") for i in range(2))
    settings = config(tmp_path, banks=banks)
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    registry = OciLayout(tmp_path / "registry")
    digests = [publish(registry, export(step, seed=step))[1] for step in range(1, SNAPSHOTS + 1)]
    wanted, draw, kills = SNAPSHOTS * len(banks), random.Random(1), 0
    until = time.monotonic() + DEADLINE_S

    def recorded():
        return sum(len(results(OciLayout(tmp_path / "registry"), d)) for d in digests)

    while recorded() < wanted:
        assert time.monotonic() < until, f"{recorded()} of {wanted} results, {kills} kills"
        role = subprocess.Popen(
            [sys.executable, "-m", "streamlearn", "role", "evaluate", "--home", str(tmp_path)], cwd=REPO, stderr=subprocess.DEVNULL
        )
        try:
            more = recorded() + draw.randint(0, 3)  # let it get some way, so that it comes to an end
            pause = draw.random()
            while kills < KILLS and recorded() < min(more, wanted) and role.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(pause)
            while kills >= KILLS and recorded() < wanted and role.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            assert role.poll() is None
        finally:
            role.kill()
            role.wait()
        kills += 1
    for digest in digests:
        found = results(OciLayout(tmp_path / "registry"), digest)
        keys = [(r["bank_digest"], r["protocol"]) for r in found]
        assert len(keys) == len(set(keys)) == 2
    json.loads((tmp_path / "continual.json").read_text())
    assert kills >= 2
