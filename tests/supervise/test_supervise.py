"""The supervisor, on real processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from streamlearn.contract.config import SuperviseConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.supervise import GivenUp, RoleSpec, exclusive, supervise

FAST = SuperviseConfig(backoff_s=0.05, backoff_max_s=0.1, crash_loop=4, crash_window_s=30, grace_s=2, refresh_s=0.05)


def role(name, code):
    return RoleSpec(name, [sys.executable, "-c", code])


STEADY = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0))); print('up', flush=True); time.sleep(60)"


class Run:
    """supervise() in a thread."""

    def __init__(self, specs, logs, config=FAST, **more):
        self.stop, self.error, self.result, self.ticks = threading.Event(), None, None, []
        self.logs = logs

        def work():
            try:
                self.result = supervise(specs, config, logs, self.stop, self.ticks.append, **more)
            except BaseException as e:
                self.error = e

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def text(self, name):
        path = self.logs / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, condition, limit_s=120):
        deadline = time.monotonic() + limit_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert condition()

    def end(self):
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def test_a_killed_role_is_started_again_and_the_others_go_on(tmp_path):
    run = Run([role("a", "import os; print(os.getpid(), flush=True);" + STEADY), role("b", STEADY)], tmp_path)
    run.wait(lambda: "up" in run.text("a") and "up" in run.text("b"))
    os.kill(int(run.text("a").split()[0]), signal.SIGKILL)
    run.wait(lambda: run.text("a").count("up") == 2)
    run.end()
    assert run.result == {"a": 1, "b": 0} and run.text("a").endswith("bye\n") and run.text("b").count("up") == 1


def test_a_role_that_has_finished_its_work_is_left_alone_and_one_that_was_told_to_end_is_not(tmp_path):
    both = [role("a", "print('x', flush=True)"), role("b", "print('x', flush=True)"), role("c", STEADY)]
    run = Run(both, tmp_path, FAST.model_copy(update={"crash_loop": 1000}), finished=lambda name: name == "a")
    run.wait(lambda: run.text("b").count("x") >= 3)
    run.end()
    assert run.error is None and run.text("a").count("x") == 1
    assert run.result["a"] == run.result["c"] == 0 and run.result["b"] >= 2


def test_a_crash_loop_is_given_up_loudly_and_everything_is_stopped(tmp_path):
    run = Run([role("steady", STEADY), role("bad", "import sys; print('no luck', flush=True); sys.exit(3)")], tmp_path)
    run.thread.join(60)
    assert isinstance(run.error, GivenUp)
    assert "role bad died 4 times" in str(run.error) and "exit code 3" in str(run.error) and "no luck" in str(run.error)
    assert run.text("bad").count("no luck") == 4 and run.text("steady").endswith("bye\n")


def test_a_refused_configuration_is_not_tried_again(tmp_path):
    run = Run([role("bad", "import sys; print('error: x = 1: remedy', flush=True); sys.exit(2)")], tmp_path)
    run.thread.join(60)
    assert "refuses to start" in str(run.error) and "error: x = 1: remedy" in str(run.error) and run.text("bad").count("error") == 1


def test_a_stubborn_role_is_killed_after_its_grace(tmp_path, caplog):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    run = Run([role("stubborn", stubborn)], tmp_path, FAST.model_copy(update={"grace_s": 0.3}))
    run.wait(lambda: "up" in run.text("stubborn"))
    run.end()
    assert "role stubborn did not end within 0.3 s: killed" in caplog.text


def test_a_second_supervisor_on_one_home_is_refused_by_pid(tmp_path):
    with exclusive(tmp_path), pytest.raises(ConfigError, match=f"already in use by process {os.getpid()}"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_when_the_supervisor_is_killed_its_roles_end(tmp_path):
    code = (
        "import sys, threading; from pathlib import Path; from tests.supervise.test_supervise import *\n"
        "supervise([role('a', STEADY)], FAST, Path(sys.argv[1]), threading.Event(), lambda _: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not (tmp_path / "a.log").exists() or "up" not in (tmp_path / "a.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert children and not alive
