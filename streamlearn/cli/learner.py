"""The learner's role, wired: catalog -> stream -> trainer -> registry."""

import dataclasses
import os
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamlearn.contract.config import Config
from streamlearn.contract.export import Export
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.run import run_train
from streamlearn.snapshots.publish import publish
from streamlearn.snapshots.warm import read
from streamlearn.stream.loader import Stream

if TYPE_CHECKING:
    from streamlearn.cli.roles import Home

TOP = Path(__file__).parents[2]  # the repository, where it runs from one


def train_role(config: Config, home: "Home", metrics: LearnerMetrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    """Learn until `stop`."""
    store, registry = home.store(), home.registry()
    catalog = home.catalog(home.log().log_id)

    def open_stream(state: dict[str, Any] | None) -> Stream:
        train = config.train
        return Stream(config.stream, catalog, store, home.path / "cache", batch=train.batch, state=state, stop=stop, device=train.device)

    code = revision()

    def send(export: Export) -> tuple[str, str]:
        return publish(registry, dataclasses.replace(export, revision=code))

    warm = partial(read, config.train.init, registry) if config.train.init else None
    gallery = home.path / "history" / "gallery.json"
    run_train(config, open_stream, store, send, metrics, heartbeat, stop=stop, gallery=gallery, warm=warm)


def revision() -> str:
    """The commit that runs: STREAMLEARN_REVISION (images are built without .git), else git's word; empty where neither knows."""
    if told := os.environ.get("STREAMLEARN_REVISION"):
        return told
    if not (TOP / ".git").exists() or not shutil.which("git"):
        return ""
    asked = ["git", "-C", str(TOP), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
