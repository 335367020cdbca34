"""An order is taken exactly once, and the sequence is that of a learner that was never killed, whatever SIGKILL meets."""

import json
import os
import subprocess
import sys

import pytest
import torch

from streamlearn.contract.durable import read_lines
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.orders import COMMANDS, INPUTS, input_key
from streamlearn.learn.checkpoint import Checkpoints
from tests.conftest import REPO
from tests.crash.ordered import live
from tests.learn.world import same

END = 14
RECORD, WEIGHTS, POINTER = "train/inputs/", "checkpoints/0", "checkpoints/latest"
LIVES = {  # places of one life after another, on the same home
    "while it is given": ["before train/commands/", "after train/commands/"],
    "around its record": [f"before {RECORD}", f"after {RECORD}"],
    "around the checkpoint that holds it": [f"before {WEIGHTS}", f"after {WEIGHTS}", f"before {POINTER}", f"after {POINTER}"],
    "at every step": [f"step {n}" for n in range(1, 12)],
}


def lives(home, places):
    """What each life came to."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    asked = [sys.executable, "-m", "tests.crash.ordered", str(home), str(END), *places]
    done = subprocess.run(asked, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    return [line.rsplit(": ", 1)[1] for line in done.stdout.splitlines()], done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize("places", LIVES.values(), ids=list(LIVES))
def test_an_order_is_taken_exactly_once_wherever_sigkill_meets_the_learner(tmp_path, places):
    ended, errors = lives(tmp_path / "killed", places)
    assert ended == ["killed"] * len(places) + ["0"], errors
    store = FolderStore(tmp_path / "killed" / "store")
    assert len(store.list(COMMANDS)) == 1 and store.list(INPUTS) == [input_key(1)]
    entry = json.loads(store.get(input_key(1)))

    calm = FolderStore(tmp_path / "calm" / "store")  # never killed; its learner finds the same order at the same step
    for key in (*store.list(COMMANDS), input_key(1)):
        calm.put(key, store.get(key))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    live(tmp_path / "calm", END, "")
    torch.set_num_threads(threads)
    left, right = (Checkpoints(s, keep=3).load() for s in (store, calm))
    assert left["step"] == END and left["policy"]["halvings"] == [[entry["step"], 0.25]] and left["inputs"] == {"command": 1, "count": 1}
    assert same(left, right) == set()
    taken = [e["step"] for e in read_lines(tmp_path / "killed" / "history" / "train.jsonl") if e.get("kind") == "command"]
    assert set(taken) <= {entry["step"]}  # told again by a life that takes it again, always of the same step
