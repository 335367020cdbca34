"""`streamlearn up`: the whole loop on this machine."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from streamlearn import view
from streamlearn.contract import durable
from streamlearn.contract.config import BankConfig, Config, ConnectorConfig
from streamlearn.contract.config_file import from_json, load
from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.export import is_path
from streamlearn.contract.status import read_status
from streamlearn.supervise import RoleSpec, exclusive, supervise

PLAIN_S = 10.0  # between lines when the output is not a terminal
CHECKPOINTS = "store/checkpoints/latest.json"  # of a home whose store is a folder
FIXED = ("model", "objective")  # what a home cannot change once it has learnt
FIXED_STREAM = ("seed", "fresh_fraction", "replay", "reservoir")
SMALL_PX = 64  # up to this, images are learnt by the recipe for small ones
logger = logging.getLogger(__name__)


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file (docs/configuration.md).")
@click.option("--demo", is_flag=True, help="The image world made by code; what is run when no source is named.")
@click.option("--images", type=click.Path(path_type=Path), help="A folder of your images, watched.")
@click.option("--urls", type=click.Path(path_type=Path), help="A list of URLs: .txt, .csv or .parquet.")
@click.option("--probe", type=click.Path(path_type=Path), help="A labelled bank: a folder with one sub-folder a class, or a .parquet.")
@click.option("--home", type=click.Path(path_type=Path), help="The folder of all state.  [default: .streamlearn]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override one key, e.g. train.batch=64.")
@click.option("--for", "seconds", type=float, help="End by itself after so many seconds.")
def up(
    *,
    file: Path | None,
    demo: bool,
    images: Path | None,
    urls: Path | None,
    probe: Path | None,
    home: Path | None,
    settings: tuple[str, ...],
    seconds: float | None,
) -> None:
    """Run the whole loop on this machine until Ctrl-C.  The same command goes on from where it was."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s", stream=sys.stderr)
    overrides = overrides_of(settings)
    config, folder = _resolve(file, home, overrides, demo=demo, images=images, urls=urls, probe=probe)
    with exclusive(folder):
        _prepare(config, folder)
        _run(config, folder, seconds)


def overrides_of(settings: tuple[str, ...]) -> dict[str, str]:
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"--set {setting}: write KEY=VALUE, e.g. --set train.batch=64")
    return dict(s.split("=", 1) for s in settings)


def _resolve(
    file: Path | None,
    home: Path | None,
    overrides: Mapping[str, str],
    *,
    demo: bool,
    images: Path | None,
    urls: Path | None,
    probe: Path | None,
) -> tuple[Config, Path]:
    """The configuration and the home, both absolute."""
    if file is not None:
        if demo or images or urls:
            raise ConfigError("--config names its sources itself; leave out --demo, --images and --urls")
        config = load(file, overrides=overrides)
        folder = (home or file.parent / config.home).resolve()
        config = _absolute(config, file)
    else:
        folder = (home or Path(".streamlearn")).resolve()
        config = load(None, base=_preset(demo, images, urls, folder), overrides=overrides)
    if is_path(config.train.init):
        init = ((file.parent if file else Path()) / config.train.init).resolve()
        config = config.model_copy(update={"train": config.train.model_copy(update={"init": str(init)})})
    if probe is not None:
        bank = BankConfig(name="probe", train=str(probe.resolve()))
        config = config.model_copy(update={"probe": config.probe.model_copy(update={"banks": (*config.probe.banks, bank)})})
    if not config.connectors:
        raise ConfigError("no source of images: name [[connectors]] in the file, or use --images, --urls or --demo")
    return config.model_copy(update={"home": str(folder)}), folder


def _preset(demo: bool, images: Path | None, urls: Path | None, folder: Path) -> Config:
    from streamlearn.demo.preset import demo_config

    if not (images or urls):
        return demo_config(folder)
    if demo:
        raise ConfigError("--demo is a source of its own; leave it out with --images or --urls")
    sources = []
    if images:
        if not images.is_dir():
            raise ConfigError(f"--images {images}: no such folder")
        sources.append(ConnectorConfig.of("images", "folder", path=str(images.resolve())))
    if urls:
        if not urls.exists():
            raise ConfigError(f"--urls {urls}: no such file")
        sources.append(ConnectorConfig.of("urls", "urls", path=str(urls.resolve())))
    from streamlearn.cli.sizes import recipe_for

    return recipe_for(images, SMALL_PX).model_copy(update={"connectors": tuple(sources)})


def _absolute(config: Config, file: Path) -> Config:
    """Relative paths are relative to the file that holds them."""
    from ingest.connectors.configure import absolute, build

    def at(path: str) -> str:
        return str((file.parent / path).resolve()) if path else ""

    for connector in config.connectors:
        build(connector, str(file))  # here its complaints can name the file
    connectors = tuple(absolute(c, file.parent.resolve()) for c in config.connectors)
    banks = tuple(b.model_copy(update={"train": at(b.train), "test": at(b.test)}) for b in config.probe.banks)
    probe = config.probe.model_copy(update={"banks": banks})
    return config.model_copy(update={"connectors": connectors, "probe": probe, "serve": config.serve.beside(file.parent)})


def _prepare(config: Config, folder: Path) -> None:
    """Everything that can be found wrong is found wrong here, before anything is started or overwritten."""
    from ingest.connectors.configure import prove
    from streamlearn.learn.backbones import names

    if config.model.backbone not in names():
        raise ConfigError(f"model.backbone = {config.model.backbone!r}: unknown; one of {', '.join(names())}")
    path = folder / "config.json"
    if path.exists():
        _compatible(from_json(path.read_text(), where=str(path)), config, folder)
    if is_path(config.train.init) and not Path(config.train.init).exists() and not (folder / CHECKPOINTS).exists():
        raise ConfigError(f"train.init = {config.train.init!r}: no such file; only a home that has not learnt yet needs it")
    if config.demo.enabled:
        from streamlearn.demo.run import world_of, write_banks

        write_banks(folder, world_of(config))
    for connector in config.connectors:
        try:
            prove(connector)
        except Retryable as e:
            logger.warning("%s; it is tried again while the loop runs", e)
    from streamlearn.probes.evaluator import check_banks

    check_banks(config)
    if config.serve.enabled:
        from streamlearn.serve.run import check

        check(config)
    durable.write(path, config.model_dump_json(indent=1).encode())


def _compatible(before: Config, after: Config, folder: Path) -> None:
    """A home goes on with the model, the log and the order it began with."""
    if not (folder / CHECKPOINTS).exists():
        return
    old, new = before.model_dump(), after.model_dump()
    pairs: list[tuple[str, Any, Any]] = [(name, old[name], new[name]) for name in FIXED]
    pairs += [(f"log.{name}", old["log"][name], new["log"][name]) for name in ("kind", "partitions")]
    pairs += [(f"store.{name}", old["store"][name], new["store"][name]) for name in ("kind", "bucket", "prefix")]
    pairs += [(f"stream.{name}", old["stream"][name], new["stream"][name]) for name in FIXED_STREAM]
    pairs += [("train.batch", old["train"]["batch"], new["train"]["batch"])]
    for name, one, other in pairs:
        if one != other:
            what = {k: (one[k], other[k]) for k in one if one[k] != other[k]} if isinstance(one, dict) else (one, other)
            raise ConfigError(f"{folder}: this home has learnt with another {name}: {what} (before, now); set it back, or use a new --home")


def _run(config: Config, folder: Path, seconds: float | None) -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    names = [
        *(["demo"] if config.demo.enabled else []),
        "connect",
        "fetch",
        "train",
        "evaluate",
        *(["serve"] if config.serve.enabled else []),
    ]
    # torch's OpenMP threads spin while they wait, which on a machine shared by all roles costs the others (and itself) most of their time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    specs = [RoleSpec(n, [sys.executable, "-m", "streamlearn", "role", n, "--home", str(folder)]) for n in names]
    shutil.rmtree(folder / "status", ignore_errors=True)  # of an earlier run
    console = Console()
    reporter = Reporter(folder, config.supervise.report_s)
    began = time.monotonic()
    show = LiveView(folder, console, began) if console.is_terminal else PlainView(folder, began)

    def tick(restarts: dict[str, int]) -> None:
        show.draw(restarts)
        reporter.tick()
        if seconds is not None and time.monotonic() - began >= seconds:
            stop.set()

    with show:
        restarts = supervise(specs, config.supervise, folder / "logs", stop, tick, finished=lambda name: _finished(folder, name))
    reporter.last()
    _summary(folder, restarts, config)


def _finished(folder: Path, role: str) -> bool:
    """A role says so itself, in its last heartbeat."""
    return read_status(folder).get(role, {}).get("state") == "finished"


class PlainView:
    """Log lines, when nobody watches."""

    def __init__(self, home: Path, began: float):
        self.home, self.began, self.last = home, began, -PLAIN_S

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

    def draw(self, restarts: dict[str, int]) -> None:
        seconds = time.monotonic() - self.began
        if seconds - self.last >= PLAIN_S:
            self.last = seconds
            click.echo(view.line(view.overview(self.home, restarts), seconds))


class LiveView:
    """The live view on a terminal."""

    def __init__(self, home: Path, console: Console, began: float):
        self.home, self.began = home, began
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> None:
        self.live.start()

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def draw(self, restarts: dict[str, int]) -> None:
        self.live.update(view.panel(view.overview(self.home, restarts), time.monotonic() - self.began), refresh=True)


class Reporter:
    """Writes the report page in a process of its own: it can be slow or fail without touching the loop."""

    def __init__(self, home: Path, period_s: float):
        self.home, self.period_s, self.next = home, period_s, time.monotonic() + min(period_s, 60.0)
        self.process: subprocess.Popen[bytes] | None = None

    def tick(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            if self.process.returncode:
                logger.error("the report page could not be written (exit code %d), see %s", self.process.returncode, self.home / "logs")
            self.process = None
        if self.period_s and self.process is None and time.monotonic() >= self.next:
            self.next = time.monotonic() + self.period_s
            self.start()

    def start(self) -> None:
        with (self.home / "logs" / "report.log").open("ab") as out:
            argv = ["nice", "-n", "10", sys.executable, "-m", "streamlearn", "report", "--home", str(self.home)]
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def last(self) -> None:
        if not self.period_s:
            return
        if self.process is not None:
            self.process.wait()
        self.start()
        if self.process is not None:
            self.process.wait()


def _summary(folder: Path, restarts: dict[str, int], config: Config) -> None:
    found = view.overview(folder, restarts)
    train, ingest = found["train"], found["ingest"]
    click.echo(f"stopped at step {train.get('step', 0)}: {train.get('images', 0)} images learnt, {ingest.get('stored', 0)} stored")
    click.echo(f"probes: {view.probe_line(found)}")
    if config.supervise.report_s:
        click.echo(f"report: {folder / 'report.html'}")
    for role, times in restarts.items():
        if times:
            click.echo(f"restarted: {role}, {times} times; see {folder / 'logs' / role}.log")
    click.echo(f"go on with the same command; state is in {folder}")
