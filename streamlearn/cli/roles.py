"""`streamlearn role NAME`: the composition root.  The only place that chooses adapters and wires seams to roles."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
from prometheus_client import CollectorRegistry

from streamlearn.cli.health import serve
from streamlearn.contract import config_file, metrics
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError, StreamlearnError
from streamlearn.contract.event_log import EventLog, SqliteLog
from streamlearn.contract.object_store import FolderStore, ObjectStore
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.contract.status import Heartbeat

ROLES = ("demo", "connect", "fetch", "train", "evaluate", "serve")
CATALOG = "catalog/shards"
logger = logging.getLogger("streamlearn")


@dataclass(frozen=True)
class Home:
    """The adapters that the configuration chooses; the embedded ones live in the home folder."""

    path: Path
    config: Config = field(default_factory=Config)

    def log(self) -> EventLog:
        if self.config.log.kind == "kafka":
            from streamlearn.adapters.kafka_log import KafkaLog

            return KafkaLog(self.config.log.kafka)
        return SqliteLog(self.path / "log.sqlite")

    def store(self) -> ObjectStore:
        if self.config.store.kind == "s3":
            from streamlearn.adapters.s3_store import S3Store

            return S3Store(self.config.store)
        return FolderStore(self.path / "store")

    def catalog(self, log_id: str) -> DeltaCatalog:
        if self.config.store.kind == "s3":
            from streamlearn.adapters.s3_store import S3Store, delta_options

            return DeltaCatalog(S3Store(self.config.store).uri(CATALOG), log_id=log_id, storage_options=delta_options(self.config.store))
        return DeltaCatalog(str(self.path / "store" / CATALOG), log_id=log_id)

    def registry(self) -> Registry:
        if self.config.snapshots.registry:
            from streamlearn.adapters.oci_registry import OciRegistry

            return OciRegistry(self.config.snapshots, self.path / "transfers")
        return OciLayout(self.path / "registry")


@click.command()
@click.argument("name", type=click.Choice(ROLES))
@click.option(
    "--home", "folder", type=click.Path(path_type=Path, file_okay=False), required=True, help="The role's own state: spool, caches, status."
)
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file.  [default: HOME/config.json, as `up` writes it]")
def role(name: str, folder: Path, file: Path | None) -> None:
    """Run one role of the loop: what `up` starts for each, and what a container runs."""
    folder = folder.resolve()
    in_this_process(name, folder, lambda: _config(folder, file))


def in_this_process(name: str, folder: Path, config: Callable[[], Config]) -> None:
    """Until it ends or is told to; then the process ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    code = 0
    try:
        _run(name, folder, config(), stop)
    except ConfigError as e:
        click.echo(f"error: {e}", err=True)
        code = 2
    except StreamlearnError:
        logger.exception("%s stops", name)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # the libraries' threads (delta-rs, DataLoader, HTTP) have nothing left to do; joining them can only hang or abort
    os._exit(code)


def _run(name: str, folder: Path, config: Config, stop: threading.Event) -> None:
    registry = CollectorRegistry()
    first = name != "train" or int(os.environ.get("RANK", "0")) == 0  # torchrun's: the first of the learner's processes speaks for all
    heartbeat = Heartbeat(folder, name, mute=not first)
    port = config.metrics_port + ROLES.index(name) if config.metrics_port and first else 0
    heartbeat.beat(metrics_port=serve(port, registry, heartbeat), state="starting", force=True)
    roles = {"demo": _demo, "connect": _connect, "fetch": _fetch, "train": _train, "evaluate": _evaluate, "serve": _serve}
    roles[name](config, Home(folder, config), registry, heartbeat, stop)
    heartbeat.beat(state="stopped" if stop.is_set() else "finished", force=True)


def _config(folder: Path, file: Path | None) -> Config:
    if file is not None:
        config = config_file.load(file)
        folder.mkdir(parents=True, exist_ok=True)
        return config.model_copy(update={"home": str(folder), "serve": config.serve.beside(file.parent)})
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{path}: no such file; `streamlearn up --home {folder}` writes it, or name a TOML file with --config")
    return config_file.from_json(path.read_text(), where=str(path))


def _demo(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.demo.run import run_demo

    run_demo(config, home.path, metrics.DemoMetrics(registry), heartbeat, stop)


def _connect(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from ingest.connectors.run import run_connect

    token = os.environ.get("STREAMLEARN_REST_TOKEN", "")
    run_connect(config, home.log(), metrics.ConnectMetrics(registry), heartbeat, stop, token=token)


def _fetch(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from ingest.fetch.run import run_fetch

    log = home.log()
    run_fetch(config, log, home.store(), home.catalog(log.log_id), metrics.FetchMetrics(registry), heartbeat, stop=stop, home=home.path)


def _train(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.cli.learner import train_role

    train_role(config, home, metrics.LearnerMetrics(registry), heartbeat, stop)


def _evaluate(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.probes.evaluator import run_evaluate

    # positions are the log's matter: the evaluator only follows, and needs no log
    intake = (home.catalog(""), home.store()) if config.probe.drift_window else None
    run_evaluate(config, home.registry(), metrics.EvaluatorMetrics(registry), heartbeat, stop, home=home.path, intake=intake)


def _serve(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.serve.run import run_serve

    run_serve(config, OciLayout(home.path / "registry"), metrics.ServeMetrics(registry), heartbeat, stop)
