"""`streamlearn doctor`: is everything there that the configuration needs?"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from streamlearn.cli.roles import CATALOG, ROLES, Home
from streamlearn.contract import config_file
from streamlearn.contract.config import BankConfig, Config, ConnectorConfig
from streamlearn.contract.errors import ConfigError, NotFound, Retryable
from streamlearn.contract.event_log import CANDIDATES, COMPACTED, DEAD_LETTERS, SHARDS, retry_topic
from streamlearn.contract.registry import OciLayout
from streamlearn.operate import doctor as look
from streamlearn.operate.doctor import ERROR, OK, WARNING, Finding, tried

WAIT_S = 10.0  # for an answer of a server
STYLES = {OK: "green", WARNING: "yellow", ERROR: "bold red"}


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file.  [default: HOME/config.json, as `up` wrote it]")
@click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def doctor(*, file: Path | None, home: Path, as_json: bool) -> None:
    """Look for what is wrong, and say what to do about it.  Changes nothing.  Exit code 1 on an error."""
    home = home.resolve()
    found = [*look.versions()]
    config, said = _config(file, home)
    found += said
    found += tried("folder", lambda: look.folder(home), "let the user that runs the roles write there")
    found += _with(config or Config(), home, whole=config is not None)
    bad = any(f.level == ERROR for f in found)
    if as_json:
        click.echo(json.dumps({"good": not bad, "findings": [asdict(f) for f in found]}, indent=2))
    else:
        _print(found)
    sys.exit(int(bad))


def _config(file: Path | None, home: Path) -> tuple[Config | None, list[Finding]]:
    kept = home / "config.json"
    where = file or kept
    try:
        if file is not None:
            config = config_file.load(file)
            config = config.model_copy(update={"serve": config.serve.beside(file.parent)})
        elif kept.exists():
            config = config_file.load(None, base=config_file.from_json(kept.read_text(), where=str(kept)))
        else:
            what = f"{kept}: no loop has run here: looked at with the defaults"
            return None, [Finding(WARNING, "config", what, "name the file that is to be run: --config FILE")]
    except ConfigError as e:
        remedy = "mend the key that it names (docs/configuration.md), then `streamlearn config check`"
        return None, [look.of_error("config", line, remedy) for line in str(e).splitlines()]
    return config, [Finding(OK, "config", f"{where}: good (digest {config.digest[:12]})")]


def _with(config: Config, home: Path, *, whole: bool) -> Iterator[Finding]:
    yield from tried("home", lambda: look.state(home, config), "restore it from a backup")
    adapters = Home(home, config)
    newest = 0
    if whole:
        there, size = _store(config, adapters)
        newest = size
        yield from there
        yield from tried("event log", lambda: _log(config), "look at [log.kafka] and at the brokers")
        yield from tried("registry", lambda: _registry(config, home), "look at [snapshots] and at the registry")
        yield from _sources(config)
    yield from tried("disk", lambda: look.disk(home, config, newest), "free some space")
    if not look.runs(home):
        yield from tried("ports", lambda: look.ports(config, ROLES, home), "choose other ports")
    yield from look.watched(config)
    yield from tried("device", lambda: _device(config), "set train.device")


def _store(config: Config, adapters: Home) -> tuple[list[Finding], int]:
    size, remedy = 0, "look at [store] and at the store"
    quick = config.store.model_copy(update={"attempts": 1, "connect_timeout_s": min(WAIT_S, config.store.connect_timeout_s)})
    adapters = Home(adapters.path, config.model_copy(update={"store": quick}))
    where = f"s3://{quick.bucket}/{quick.prefix}" if quick.kind == "s3" else str(adapters.path / "store")
    found = tried("store", lambda: look.store(adapters.store(), where), remedy)
    if quick.kind == "s3":
        url = quick.endpoint_url or f"https://s3.{quick.region}.amazonaws.com"
        found += tried("clock", lambda: look.clock(url, quick.ca_bundle), remedy)
    if any(f.level == ERROR for f in found):
        return found, 0

    def rest() -> list[Finding]:
        nonlocal size
        said, size = look.checkpoints(adapters.store())
        return said

    if quick.kind == "s3" or (adapters.path / "store").exists():
        found += tried("checkpoints", rest, remedy)
    if quick.kind == "s3" or (adapters.path / "store" / CATALOG).exists():
        found += tried("catalog", lambda: look.catalog(adapters.catalog("")), "restore it from a backup")
    return found, size


def _log(config: Config) -> Iterator[Finding]:
    if config.log.kind != "kafka":
        return
    from streamlearn.adapters.kafka_log import KafkaLog

    kafka = config.log.kafka
    log = KafkaLog(kafka.model_copy(update={"start_timeout_s": min(WAIT_S, kafka.start_timeout_s)}))
    try:
        topics, lacking = {}, []
        for topic in (
            CANDIDATES,
            *(retry_topic(i) for i in range(len(config.fetch.retry_delays_s))),
            DEAD_LETTERS,
            SHARDS,
            *sorted(COMPACTED),
        ):
            try:
                topics[topic] = log.partitions(topic)
            except NotFound:
                lacking.append(topic)
        yield from look.partitions(topics, config)
        made = f"; {', '.join(lacking)} not there yet: roles make them" if lacking else ""
        yield Finding(OK, "event log", f"Kafka {log.log_id} at {', '.join(kafka.servers)} answers, {len(topics)} topics{made}")
    finally:
        log.close()


def _registry(config: Config, home: Path) -> Iterator[Finding]:
    if not config.snapshots.registry:
        if (home / "registry" / "oci-layout").exists():
            yield Finding(OK, "registry", f"{home / 'registry'}: {len(OciLayout(home / 'registry').names())} tags")
        return
    from streamlearn.adapters.oci_registry import OciRegistry

    quick = config.snapshots.model_copy(update={"attempts": 1, "connect_timeout_s": min(WAIT_S, config.snapshots.connect_timeout_s)})
    with tempfile.TemporaryDirectory(prefix="streamlearn-doctor-") as scratch:
        registry = OciRegistry(quick, Path(scratch))
        tags = len(registry.names())
        registry.may_push()
    yield Finding(OK, "registry", f"{quick.registry}: {tags} tags, and it may be written")
    yield from look.clock(f"{registry.wire.origin}/v2/", quick.ca_bundle)


def _sources(config: Config) -> Iterator[Finding]:
    """Connectors, banks, tokens."""
    for connector in config.connectors:
        yield from tried("connectors", partial(_connector, connector), "look at its [[connectors]]")
    for bank in config.probe.banks:
        yield from tried("banks", partial(_bank, config, bank), "look at its [[probe.banks]]")
    if config.serve.enabled:
        yield from tried("serve", partial(_serve, config), "look at [serve]")


def _connector(connector: ConnectorConfig) -> Iterator[Finding]:
    from ingest.connectors.configure import prove

    try:
        prove(connector)
    except Retryable as e:
        yield Finding(WARNING, "connectors", str(e), "the connector tries again by itself; look at its source")
    else:
        yield Finding(OK, "connectors", f"{connector.name}: nothing wrong with its source is seen")


def _bank(config: Config, bank: BankConfig) -> Iterator[Finding]:
    from streamlearn.probes.evaluator import check_banks

    check_banks(config.model_copy(update={"probe": config.probe.model_copy(update={"banks": (bank,)})}))
    yield Finding(OK, "banks", f"{bank.name}: can be read")


def _serve(config: Config) -> Iterator[Finding]:
    from streamlearn.serve.run import check

    check(config)
    yield Finding(OK, "serve", f"{config.serve.address}:{config.serve.port}")


def _device(config: Config) -> Iterator[Finding]:
    import torch

    wanted, there = config.train.device, torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(there))
    if wanted.startswith("cuda"):
        number = int(wanted.partition(":")[2] or 0)
        if number >= there:
            built = (
                f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
                if torch.version.cuda
                else f"torch {torch.__version__} has no CUDA"
            )
            remedy = "install the driver and the torch for it, or set train.device = 'cpu'"
            yield Finding(ERROR, "device", f"train.device = {wanted!r}: there are {there} GPUs; {built}", remedy)
            return
        free, total = torch.cuda.mem_get_info(number)
        yield Finding(OK, "device", f"{torch.cuda.get_device_name(number)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    elif there:
        yield Finding(WARNING, "device", f"train.device = {wanted!r}, but there is {names}", "set train.device = 'cuda'")
    else:
        yield Finding(OK, "device", f"{wanted}, {torch.get_num_threads()} threads for torch; no GPU")


def _print(found: list[Finding]) -> None:
    table = Table("", "check", Column("found", overflow="fold"), Column("what to do", overflow="fold"))
    for f in found:
        table.add_row(Text(f.level, STYLES[f.level]), f.check, Text(f.what), Text(f.remedy))
    Console().print(table)
    counts = {level: sum(f.level == level for f in found) for level in (ERROR, WARNING)}
    click.echo(f"{counts[ERROR]} errors, {counts[WARNING]} warnings, of {len(found)} checks")
