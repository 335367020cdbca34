"""The learner's role, wired: catalog -> stream -> trainer -> registry."""

import threading
from typing import TYPE_CHECKING, Any

from streamlearn.contract.config import Config
from streamlearn.contract.export import Export
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.run import run_train
from streamlearn.snapshots.publish import publish
from streamlearn.stream.loader import Stream

if TYPE_CHECKING:
    from streamlearn.cli.roles import Home


def train_role(config: Config, home: "Home", metrics: LearnerMetrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    """Learn until `stop`."""
    store, registry = home.store(), home.registry()
    catalog = home.catalog(home.log().log_id)

    def open_stream(state: dict[str, Any] | None) -> Stream:
        train = config.train
        return Stream(config.stream, catalog, store, home.path / "cache", batch=train.batch, state=state, stop=stop, device=train.device)

    def send(export: Export) -> tuple[str, str]:
        return publish(registry, export)

    run_train(config, open_stream, store, send, metrics, heartbeat, stop=stop, gallery=home.path / "history" / "gallery.json")
