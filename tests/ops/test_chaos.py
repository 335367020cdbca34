"""What the chaos drill (bench/chaos.py) does with the shipped rules, and what it believes of them."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from bench.chaos import MORE, TEMPLATE, written
from bench.chaos_clock import Clock
from bench.chaos_watch import RULES, Told, paced, watching
from streamlearn.contract.config_file import load
from tests.conftest import missing
from tests.ops import queries
from tests.ops.prometheus import free_port

FILES = sorted(RULES.glob("*.yml"))


def test_at_their_own_pace_the_rules_are_the_shipped_ones():
    assert FILES and all(paced(file.read_text(), 1, 15) == file.read_text() for file in FILES)


@pytest.mark.parametrize("pace", [6, 90])
def test_faster_rules_are_rules_with_the_same_names(tmp_path, pace):
    for file in FILES:
        text = paced(file.read_text(), pace, 15 / pace)
        (tmp_path / file.name).write_text(text)
        assert [line for line in text.splitlines() if "alert:" in line] == [x for x in file.read_text().splitlines() if "alert:" in x]
    done = subprocess.run(["promtool", "check", "rules", *sorted(tmp_path.glob("*.yml"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pace", [1, 6, 90])
def test_prometheus_starts_with_them(tmp_path, pace):
    if shutil.which("prometheus") is None:
        missing("prometheus is not installed: Debian's prometheus")
    with watching(tmp_path, {"train": free_port()}, pace) as prometheus:
        assert prometheus.ready()


def test_times_pass_faster_and_nothing_else_does():
    text = "".join(paced(file.read_text(), 6, 2.5) for file in FILES)
    for found in (
        "(fetch_waiting_seconds[20000ms])) > 100.000",
        "instance:heartbeat_age:seconds > 50.000",
        "streamlearn_home_bytes < 0.03",
        "(fetch_lag_records) > 10000",
        "[300000ms]) >= 3",  # RoleRestarting: as many starts
        "for: 20000ms",
    ):
        assert found in text, found
    assert "[10000ms]" in paced("[5s]", 6, 2.5)  # never fewer scrapes than a rate needs


def test_each_class_of_faults_waits_for_an_alert_that_there_is(tmp_path):
    text = (queries.OPS.parent / "bench/chaos.py").read_text()
    wanted = {name for name in queries.alerts() if f'"{name}"' in text}
    assert wanted == {"FetchWaiting", "DiskFull", "RoleDown", "RoleSilent", "RoleRestarting"}
    assert Told("DiskFull", skipped="no root").line("disk full", 6).endswith("not injected: no root")
    assert "NEVER RAISED" in Told("DiskFull", times=2).line("disk full", 6)
    assert "2 of 2 times, after 30 s (20 to 40; 3.0 min" in Told("DiskFull", times=2, after_s=[20.0, 40.0]).line("disk full", 6)


def test_its_configuration_is_one(tmp_path):
    text = MORE.format(
        port=9100,
        template=TEMPLATE.format(home=tmp_path, data=tmp_path),
        partitions=3,
        kafka=written({"servers": ("127.0.0.1:1",), "api_version": (2, 3)}),
        store=written({"kind": "s3", "bucket": "b", "endpoint_url": "http://127.0.0.1:1"}),
    )
    (tmp_path / "run.toml").write_text(text)
    config = load(tmp_path / "run.toml")
    assert config.metrics_port == 9100 and config.log.partitions == 3 and config.store.bucket == "b"


def test_a_clock_is_set_back_and_sleeps_stay_true(tmp_path):
    clock = Clock(tmp_path)
    if clock.lacks:
        missing(f"no shim can be built: {clock.lacks}")
    asks = "import time; input(); a = time.time(), time.monotonic(); time.sleep(0.01); print(*a)"
    with subprocess.Popen(
        [sys.executable, "-c", asks], env=os.environ | clock.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        clock.step(-900)
        wall, monotonic = map(float, running.communicate("\n")[0].split())
    assert abs(time.time() - 900 - wall) < 300 and abs(time.monotonic() - monotonic) < 300
