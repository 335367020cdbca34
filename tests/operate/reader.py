"""A reader of the pages: a folder to type in, with what the pages take for granted, and a home that has learnt.

The home is made by the README's own first line, `streamlearn up --images ~/pictures --probe ~/labelled --home runs/mine`, at sizes (SMALL, by the
environment) at which it has published and measured after half a minute.  Beside it lies, where the pages look for it:

    .venv/bin/streamlearn      the tree under test; the same as `streamlearn` on the PATH
    on the PATH besides        the commands of the environment that the tests run in, activated or not: model_signing
    .streamlearn, runs/web     what commands without --home mean, and the home of `up --urls`: the same home
    ~/pictures, ~/labelled     drawn images; ~/labelled has a folder a class, so has ~/pets; ~/cifar is two parquet files
    urls.txt, run.toml         a list whose addresses nobody answers at; the file of a run on ~/pictures
    laion.json                 a connector of Connect's shape, which reads urls.txt
    tokens.txt                 of somebody who may pull
    the tag 0.2000.0           with SMALL that step is far away: it names the newest snapshot
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import read_status
from streamlearn.snapshots.promote import promote
from tests.conftest import REPO
from tests.ingest.server import picture
from tests.operate.pages import Line

SMALL = {
    "TRAIN__BATCH": "16",
    "TRAIN__SNAPSHOT_STEPS": "8",
    "TRAIN__CHECKPOINT_STEPS": "2",
    "TRAIN__BN_IMAGES": "32",
    "TRAIN__THREADS": "1",
    "TRAIN__OPTIM__WARMUP_STEPS": "2",
    "OBJECTIVE__PROTOTYPES": "8",
    "SHARD__MAX_AGE_S": "1",
    "STREAM__WORKERS": "1",
    "STREAM__MAX_REPLAY_PER_FRESH": "1000",  # there is always something left to anneal on
    "LOG__PARTITIONS": "1",  # so that candidates/0/17 is there, as it is in the demo's home: one host is one partition
    "PROBE__LOW_SHOT_SEEDS": "2",
    "SUPERVISE__REPORT_S": "1000",
    "SERVE__PORT": "0",
    "SNAPSHOTS__PROMOTE": "never",
}
RUN_TOML = """
preset = "demo"
[[connectors]]
name = "pictures"
class = "folder"
path = "pictures"
"""
LAION = '{"name": "laion", "config": {"connector.class": "urls", "path": "urls.txt"}}'
IMAGES, CLASSES = 100, 3
LIMIT_S = 600.0  # for anything: machines that run tests are busy


class Reader:
    """Types lines in its folder, which is its HOME as well."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {f"STREAMLEARN__{key}": value for key, value in SMALL.items()}
        path = (folder / ".venv" / "bin", Path(sys.executable).parent, os.environ["PATH"])
        self.env |= {"HOME": str(folder), "PYTHONPATH": str(REPO), "PATH": ":".join(map(str, path))}

    def run(self, line: Line) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", line.text], **self._where(), capture_output=True, timeout=LIMIT_S, check=False)

    def run_until(self, line: Line, seen: Callable[[], bool]) -> tuple[int, str]:
        """Ctrl-C once it has been seen to work, or is over; (exit code, what it said)."""
        log = self.folder / "said.log"
        with log.open("w") as out:
            process = subprocess.Popen(["bash", "-c", f"exec {line.text}"], **self._where(), stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + LIMIT_S
            while not seen():
                assert process.poll() is None and time.monotonic() < deadline, f"{line}: it is not seen to work\n{log.read_text()}"
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            return process.wait(LIMIT_S), log.read_text()
        finally:
            process.kill()

    def _where(self) -> dict[str, Any]:
        return {"cwd": self.folder, "env": self.env, "text": True}

    def status(self, home: str) -> dict[str, dict[str, Any]]:
        return read_status(self.folder / home)

    def copy(self, folder: Path) -> "Reader":
        """Another of the same, to do with as it likes."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Reader(folder)


def settle(folder: Path) -> Reader:
    """All but the home."""
    command = folder / ".venv" / "bin" / "streamlearn"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m streamlearn "$@"\n')
    command.chmod(0o755)
    images = [picture(i, size=(100, 90)) for i in range(IMAGES)]
    for i, image in enumerate(images):
        for path in (folder / "pictures" / f"{i}.jpg", folder / "labelled" / f"class{i % CLASSES}" / f"{i}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
        path = folder / "pets" / f"class{i % CLASSES}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(IMAGES + i, size=(100, 90)))
    (folder / "cifar").mkdir()
    for name, part in (("train", slice(0, 70)), ("test", slice(70, IMAGES))):
        table = {"jpeg": images[part], "label": [i % CLASSES for i in range(IMAGES)][part]}
        pq.write_table(pa.table(table), folder / "cifar" / f"{name}.parquet")
    (folder / "urls.txt").write_text("".join(f"https://images.invalid/{i}.jpg\n" for i in range(5)))
    (folder / "run.toml").write_text(RUN_TOML)
    (folder / "laion.json").write_text(LAION)
    (folder / "tokens.txt").write_text("reader 0123456789abcdef0123456789abcdef\n")
    return Reader(folder)


def learnt(folder: Path, line: Line) -> Reader:
    """`line` makes the home runs/mine: everything is learnt, two snapshots are measured, and two have been `stable`."""
    reader = settle(folder)

    def measured() -> bool:
        said = reader.status("runs/mine")
        learnt = said.get("train", {}).get("cursor", {}) == {"candidates/0": IMAGES}  # so that `drain` finds nothing left
        return learnt and int(said.get("evaluate", {}).get("evaluated", 0)) >= 2

    code, said = reader.run_until(line, measured)
    assert code == 0, said
    layout = OciLayout(folder / "runs" / "mine" / "registry")
    layout.tag(layout.tags()["candidate"].digest, "0.2000.0")
    for channel, tag in (
        ("stable", "0.8.0"),
        ("best", "0.8.0"),
        ("stable", "0.16.0"),
    ):  # by hand: the gate promises nothing of so small a learner
        promote(layout, channel, tag, by="reader", why="to begin with")
    (folder / ".streamlearn").symlink_to("runs/mine")
    (folder / "runs" / "web").symlink_to("mine")
    return reader
