"""`streamlearn role NAME`: the composition root.  The only place that chooses adapters and wires seams to roles."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import click
from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics

from streamlearn.cli.health import serve
from streamlearn.cli.logs import JsonLines
from streamlearn.contract import config_file, durable, metrics
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError, NotFound, Retryable, StreamlearnError, Unreachable
from streamlearn.contract.event_log import EventLog, SqliteLog
from streamlearn.contract.object_store import POINTER, FolderStore, ObjectStore
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.contract.status import Heartbeat

ROLES = ("demo", "connect", "fetch", "train", "evaluate", "serve", "refresh")  # the order is that of their ports: add at the end
CATALOG = "catalog/shards"
AGAIN_S = 1.0  # before what is out is asked again; of brokers each try takes log.kafka.start_timeout_s
T = TypeVar("T")
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
        _run(name, folder, _logged(name, config()), stop)
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


def _logged(name: str, config: Config) -> Config:
    if config.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines(name))
    return config


def _run(name: str, folder: Path, config: Config, stop: threading.Event) -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, which no query asks for
    registry = CollectorRegistry()
    first = name != "train" or int(os.environ.get("RANK", "0")) == 0  # torchrun's: the first of the learner's processes speaks for all
    metrics.role_metrics(registry, name, folder)
    heartbeat = Heartbeat(folder, name, mute=not first)
    if first:  # one exporting process a role
        port = config.metrics_port + ROLES.index(name) if config.metrics_port else 0
        heartbeat.beat(metrics_port=serve(port, registry, heartbeat, host=config.metrics_host), metrics_host=config.metrics_host)
    heartbeat.beat(state="starting", force=True)
    roles = {
        "demo": _demo,
        "connect": _connect,
        "fetch": _fetch,
        "train": _train,
        "evaluate": _evaluate,
        "serve": _serve,
        "refresh": _refresh,
    }
    roles[name](config, Home(folder, config), registry, heartbeat, stop)
    heartbeat.beat(state="stopped" if stop.is_set() else "finished", force=True)


def reached(look: Callable[[], T], heartbeat: Heartbeat, beating: Gauge, stop: threading.Event, waiting: Gauge | None = None) -> T | None:
    """What `look` finds, once it answers; None: told to stop.  A role that is started while brokers or the store are out waits as one that runs does."""
    began = time.monotonic()
    while not stop.is_set():
        try:
            found = look()
        except (Unreachable, Retryable) as e:
            waited, on = time.monotonic() - began, e.on if isinstance(e, Retryable) else "broker"
            logger.warning("%s", e)
            beating.set_to_current_time()
            heartbeat.beat(state="waiting", waiting=str(e), waiting_on=on, waiting_s=round(waited, 1), waiting_at="start", force=True)
            if waiting is not None:
                metrics.set_waiting(waiting, on, waited)
            stop.wait(AGAIN_S)
            continue
        heartbeat.beat(state="starting", waiting="", waiting_on="", waiting_s=0.0, waiting_at="", force=True)
        if waiting is not None:
            metrics.set_waiting(waiting, "", 0.0)
        return found
    return None


def answers(store: ObjectStore) -> ObjectStore:
    """`store`, which is asked for what the learner begins with.  Raises Retryable."""
    with contextlib.suppress(NotFound):
        store.get(POINTER)
    return store


def _config(folder: Path, file: Path | None) -> Config:
    if file is not None:
        config = config_file.load(file)
        config = config.model_copy(update={"home": str(folder), "serve": config.serve.beside(file.parent)})
        durable.write(
            folder / "config.json", config.model_dump_json(indent=1).encode()
        )  # for `status`, `dataset` and the others with --home
        return config
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{path}: no such file; `streamlearn up --home {folder}` writes it, or name a TOML file with --config")
    return config_file.from_json(path.read_text(), where=str(path))


def _demo(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.demo.run import run_demo

    run_demo(config, home.path, metrics.DemoMetrics(registry), heartbeat, stop)


def _connect(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from ingest.connectors.run import run_connect

    token, m = os.environ.get("STREAMLEARN_REST_TOKEN", ""), metrics.ConnectMetrics(registry)
    if (log := reached(home.log, heartbeat, m.heartbeat, stop, m.waiting)) is not None:
        run_connect(config, log, m, heartbeat, stop, token=token)


def _fetch(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from ingest.fetch.run import run_fetch

    m = metrics.FetchMetrics(registry)
    if (log := reached(home.log, heartbeat, m.heartbeat, stop, m.waiting)) is not None:
        run_fetch(config, log, home.store(), home.catalog(log.log_id), m, heartbeat, stop=stop, home=home.path)


def _train(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.cli.learner import train_role

    m = metrics.LearnerMetrics(registry)
    log = reached(home.log, heartbeat, m.heartbeat, stop, m.waiting)
    if log is not None and reached(lambda: answers(home.store()), heartbeat, m.heartbeat, stop, m.waiting) is not None:
        train_role(config, home, log, m, heartbeat, stop)


def _evaluate(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.probes.evaluator import run_evaluate

    # positions are the log's matter: the evaluator only follows, and needs no log
    intake = (home.catalog(""), home.store()) if config.probe.drift_window else None
    run_evaluate(config, home.registry(), metrics.EvaluatorMetrics(registry), heartbeat, stop, home=home.path, intake=intake)


def _serve(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from streamlearn.serve.run import run_serve

    source = home.registry() if config.snapshots.registry else None
    run_serve(config, OciLayout(home.path / "registry"), metrics.ServeMetrics(registry), heartbeat, stop, source=source)


def _refresh(config: Config, home: Home, registry: CollectorRegistry, heartbeat: Heartbeat, stop: threading.Event) -> None:
    from ingest.keeper import run_refresh

    m = metrics.RefreshMetrics(registry)
    if (log := reached(home.log, heartbeat, m.heartbeat, stop)) is not None:
        run_refresh(config, log, home.store(), home.catalog(log.log_id), m, heartbeat, stop=stop, home=home.path)
