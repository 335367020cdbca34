"""Real processes under torchrun: one is lost, or told to stop, or there are more or fewer of them; the sequence of batches goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from streamlearn.contract.durable import read_lines
from streamlearn.contract.object_store import POINTER, FolderStore
from streamlearn.contract.orders import input_key
from streamlearn.learn.checkpoint import Checkpoints
from tests.conftest import REPO
from tests.learn.world import same
from tests.parity.learner_world import furthest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]  # a start of a group is a dozen seconds of a core; a busy machine has them in minutes
END, MANY = 10, 100
ROLE = REPO / "tests" / "crash" / "rank_role.py"
ORDER = {"kind": "command", "number": 1, "action": "halve", "value": None, "by": "a test", "reason": "", "step": 5, "at": ""}


def command(home, world, end=END, parallel="ddp", strike=()):
    """(argv, environment) of a group."""
    here = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]  # whatever this machine calls itself
    torchrun = ["-m", "torch.distributed.run", *here, "--nproc-per-node", str(world), "--max-restarts", "2"]
    role = [str(ROLE), str(home), str(end), parallel, *map(str, strike)]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [sys.executable, *(torchrun if world > 1 else []), *role], env


def learn(home, world, **more):
    """Until all processes have ended; what they wrote to their logs."""
    FolderStore(home / "store").put(input_key(1), json.dumps(ORDER).encode())  # of the step that it names, whoever takes it
    argv, env = command(home, world, **more)
    done = subprocess.run(argv, env=env, cwd=REPO, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def ended(home):
    return sorted((home / "ended").read_text().splitlines())


def learnt(home, rank):
    """Places of the batches that this rank has learnt, as often as it has."""
    return [int(line) for line in (home / f"learnt-{rank}").read_text().splitlines()]


def newest(home):
    return Checkpoints(FolderStore(home / "store"), keep=3).load()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    home = tmp_path_factory.mktemp("alone")
    learn(home, 1)
    return home


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    learn(home, 2)
    return home


def test_two_ranks_learn_publish_and_obey_as_one_does(alone, pair):
    assert ended(pair) == [f"0 of 2 at {END}", f"1 of 2 at {END}"]
    far, where = furthest(newest(pair), newest(alone))
    assert far < 1e-6, where
    assert [line.split()[0] for line in (pair / "published").read_text().splitlines()] == ["4", "8"]
    told = [
        [line for line in read_lines(home / "history" / "train.jsonl") if "lr" in line and "event" not in line] for home in (pair, alone)
    ]
    assert len(told[0]) == 1 and told[0][0]["lr"] == told[1][0]["lr"] and told[0][0]["loss"] == pytest.approx(told[1][0]["loss"], rel=1e-6)
    assert newest(pair)["inputs"]["count"] == 1


def test_a_rank_that_is_killed_starts_the_group_again_from_the_last_checkpoint(pair, tmp_path):
    told = learn(tmp_path, 2, strike=(int(signal.SIGKILL), 1, 7))
    assert (tmp_path / "struck").exists() and "exitcode: -9" in told
    assert ended(tmp_path) == ended(pair)
    assert same(newest(tmp_path), newest(pair)) == set()
    assert (tmp_path / "published").read_text() == (pair / "published").read_text()
    resumed = [line["step"] for line in read_lines(tmp_path / "history" / "train.jsonl") if line.get("event") == "resumed"]
    assert resumed in ([6], [4])  # the checkpoint of step 6 may have been on its way
    for rank in (0, 1):
        assert learnt(pair, rank) == list(range(END))
        assert learnt(tmp_path, rank) == [*range(7), *range(resumed[0], END)]  # again from the checkpoint on, and nothing else again


def test_when_torchrun_itself_is_killed_no_rank_learns_on(tmp_path):
    argv, env = command(tmp_path, 2, end=MANY)
    torchrun = subprocess.Popen(argv, env=env, cwd=REPO, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not all((tmp_path / f"learnt-{rank}").exists() for rank in (0, 1)):
        assert torchrun.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    ranks = [child for child in psutil.Process(torchrun.pid).children() if str(ROLE) in child.cmdline()]
    torchrun.kill()
    torchrun.wait()
    assert len(ranks) == 2 and psutil.wait_procs(ranks, timeout=600)[1] == []
    assert not (tmp_path / "ended").exists() and len(learnt(tmp_path, 0)) < MANY


def test_one_told_to_stop_stops_all_and_another_number_of_them_goes_on(alone, tmp_path):
    learn(tmp_path, 2, parallel="fsdp", strike=(int(signal.SIGTERM), 1, 3))
    assert ended(tmp_path) == ["0 of 2 at 3", "1 of 2 at 3"]
    assert json.loads((tmp_path / "store" / POINTER).read_text())["checkpoints"][0]["step"] == 3
    learn(tmp_path, 1, end=6)
    learn(tmp_path, 2, parallel="fsdp")
    assert ended(tmp_path) == ["0 of 1 at 6", "0 of 2 at 10", "0 of 2 at 3", "1 of 2 at 10", "1 of 2 at 3"]
    far, where = furthest(newest(tmp_path), newest(alone))
    assert far < 1e-6, where
    assert newest(tmp_path)["images"] == newest(alone)["images"] and torch.get_default_dtype() == torch.float32
