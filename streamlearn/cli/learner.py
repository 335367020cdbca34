"""The learner's role, wired: catalog -> stream -> trainer -> registry."""

import dataclasses
import logging
import os
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.event_log import EventLog
from streamlearn.contract.export import Export
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.overlay_store import OverlayStore
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.anneal import annealing, branch
from streamlearn.learn.inputs import Sources, Window
from streamlearn.learn.ranks import device_of, joined, meeting
from streamlearn.learn.run import run_train
from streamlearn.probes.drift_watch import read_state
from streamlearn.snapshots.artifact import version
from streamlearn.snapshots.publish import publish, results, steps
from streamlearn.snapshots.warm import read
from streamlearn.stream.loader import Stream

if TYPE_CHECKING:
    from streamlearn.cli.roles import Home

PROBES = ("ridge", "knn")  # of a result, the first it has: ridge is the smoother, and ranks alike (reference/learning.md, 1.2)
logger = logging.getLogger(__name__)
TOP = Path(__file__).parents[2]  # the repository, where it runs from one


def train_role(config: Config, home: "Home", log: EventLog, metrics: LearnerMetrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    """Learn until `stop`, as one of the processes that torchrun has started, or alone."""
    store, registry = home.store(), home.registry()
    catalog = home.catalog(log.log_id)

    def open_stream(state: dict[str, Any] | None) -> Stream:
        train = config.train
        ranks, cache, device = joined(timeout_s=train.ranks_timeout_s), home.path / "cache", device_of(train.device)
        return Stream(
            config.stream,
            catalog,
            store,
            cache,
            batch=train.batch,
            state=state,
            stop=stop,
            device=device,
            rank=ranks.rank,
            ranks=ranks.world,
        )

    code = revision()

    def send(export: Export) -> tuple[str, str]:
        return publish(registry, dataclasses.replace(export, revision=code))

    warm = partial(read, config.train.init, registry) if config.train.init else None
    gallery = home.path / "history" / "gallery.json"
    sources = Sources(probe=partial(errors, registry, config.plateau_bank), drift=partial(drift, home.path))
    with meeting(config.train.device, timeout_s=config.train.ranks_timeout_s):
        run_train(config, open_stream, store, send, metrics, heartbeat, stop=stop, gallery=gallery, warm=warm, sources=sources)


def anneal_role(config: Config, trunk: Path, folder: Path, *, share: float, steps: int, name: str, stop: threading.Event) -> str:
    """Branch off `trunk` into `folder`, or go on; what came of it, in words (learn/anneal.py)."""
    from streamlearn.cli.roles import Home

    there, own = Home(trunk, config), FolderStore(folder / "store")
    plan = branch(there.store(), own, config, share=share, steps=steps)
    config = annealing(config, plan, home=str(folder), name=name)
    durable.write(folder / "config.json", config.model_dump_json(indent=1).encode())
    registry, code = OciLayout(folder / "registry"), revision()

    def open_stream(state: dict[str, Any] | None) -> Stream:
        train, seen = config.train, OverlayStore(own, there.store())
        return Stream(
            config.stream, there.catalog(""), seen, folder / "cache", batch=train.batch, state=state, stop=stop, device=train.device
        )

    def send(export: Export) -> tuple[str, str]:
        notes = {**export.notes, "anneal": f"linear to zero over steps {plan.first} to {plan.end}"}
        return publish(registry, dataclasses.replace(export, revision=code, notes=notes))

    metrics, heart = LearnerMetrics(CollectorRegistry()), Heartbeat(folder, "train")
    state = run_train(config, open_stream, own, send, metrics, heart, stop=stop, gallery=folder / "history" / "gallery.json")
    if state.step < plan.end:
        return f"stopped at step {state.step} of {plan.end}; the same command goes on"
    tag = version(plan.end)
    return f"{tag}\t{registry.manifest(tag)[0].digest}\n`streamlearn snapshots list --home {folder}` shows it; `copy` takes it to another registry"


def errors(registry: Registry, bank: str, after: int) -> list[tuple[int, float]]:
    """(step, 1 - accuracy) of the snapshots after a step, as far as they were measured on `bank`."""
    found: list[tuple[int, float]] = []
    for step in steps(registry) if bank else ():
        if step <= after:
            continue
        descriptor = registry.find(version(step))
        measured = results(registry, descriptor.digest) if descriptor else []
        accuracies = [r[probe] for r in measured if r.get("bank") == bank for probe in PROBES if probe in r]
        if accuracies:
            found.append((step, 1 - float(accuracies[0])))
    return found


def drift(home: Path) -> dict[str, Window]:
    """What the drift watch of this home last found of each source."""
    try:
        sources = read_state(home)["sources"]
    except Corrupt as e:
        logger.warning("%s", e)
        return {}
    last = {name: source["windows"][-1] for name, source in sources.items() if source["windows"]}
    return {name: Window(w["distance"], w["threshold"]) for name, w in last.items() if "distance" in w}


def revision() -> str:
    """The commit that runs: STREAMLEARN_REVISION (images are built without .git), else git's word; empty where neither knows."""
    if told := os.environ.get("STREAMLEARN_REVISION"):
        return told
    if not (TOP / ".git").exists() or not shutil.which("git"):
        return ""
    asked = ["git", "-C", str(TOP), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
