"""`streamlearn connectors`: what the connectors of a home are to do, and what they do.

Orders are records of the home's event log, as those of the REST API are, so no running loop is needed: the role `connect` obeys
when it comes to read them.
"""

import itertools
import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ingest.connectors import book, plugins
from ingest.connectors.base import Cursor, load
from ingest.connectors.configure import absolute, build, from_connect, to_connect
from streamlearn.cli.options import HOME
from streamlearn.cli.roles import Home
from streamlearn.contract import config_file
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import ConfigError, NotFound
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, SOURCE_STATE, EventLog
from streamlearn.view import overview

_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
_FILE = click.argument("file", type=click.Path(path_type=Path))
_NAME = click.argument("name")


@click.group()
def connectors() -> None:
    """Sources of candidates: list, validate, plan, start, pause, resume, stop, restart, status, offsets, delete."""


@connectors.command("list")
@HOME
@_JSON
@click.option("--plugins", "classes", is_flag=True, help="The classes there are, instead.")
def list_(home: Path, as_json: bool, classes: bool) -> None:
    """The connectors of a home and what they do."""
    if classes:
        found = [{"class": p.name, "package": p.package, "version": p.version} for p in plugins.plugins().values()]
    else:
        config, log = _open(home)
        found = [_status(home, entry) for entry in book.entries(config, log).values()]
    _show(found, as_json)


@connectors.command()
@HOME
@_JSON
@_NAME
def status(home: Path, name: str, as_json: bool) -> None:
    """One connector: its state, its configuration, its cursor."""
    config, log = _open(home)
    entry = book.find(config, log, name)
    found = _status(home, entry) | {"config": to_connect(entry.config)["config"], "cursor": _cursor(log, name)}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        click.echo(f"{key:11} {json.dumps(value) if isinstance(value, dict) else value}")


@connectors.command()
@_FILE
def validate(file: Path) -> None:
    """Exit 0 if every connector of FILE (.toml, or Connect's .json) is well configured; nothing is opened or written."""
    for connector in _read(file):
        click.echo(f"{file}: connector {connector.name} (class {connector.kind}): good")


@connectors.command()
@_FILE
@HOME
@_JSON
@click.option("--first", type=click.IntRange(min=0), default=5, show_default=True, help="Candidates to show of each connector.")
def plan(file: Path, home: Path, as_json: bool, first: int) -> None:
    """What `start FILE` would do, and the first candidates that would be announced.  Looks at the source; writes nothing."""
    config, log = _look(home)
    before = book.entries(config, log) if log is not None else {}
    plans = [_plan(connector, before.get(connector.name), _cursor(log, connector.name), first) for connector in _read(file)]
    if as_json:
        click.echo(json.dumps(plans, indent=2))
        return
    for found in plans:
        click.echo(f"{found['name']}: {found['action']}; begins at {json.dumps(found['cursor'])}")
        for candidate in found["candidates"]:
            click.echo(f"  {candidate['url']}  ({candidate['source_ref']})")
        for where, what, why in found["refused"]:
            click.echo(f"  refused: {where}: {what}: {why}")
        if not found["candidates"] and not found["refused"]:
            click.echo("  nothing now")


@connectors.command()
@_FILE
@HOME
@_JSON
def start(file: Path, home: Path, as_json: bool) -> None:
    """Make the connectors of FILE (.toml, or Connect's .json), or change those that are there already."""
    wanted = _read(file)
    config, log = _open(home)
    for connector in wanted:  # all or none of the file
        if entry := book.entries(config, log).get(connector.name):
            book.editable(entry)
    _show([{"name": c.name, "action": book.put(config, log, c)} for c in wanted], as_json)


def _order(name: str, text: str, obey: Callable[[Config, EventLog, str], None]) -> None:
    """A command that takes the name of a connector and leaves a record."""

    @connectors.command(name, help=text)
    @HOME
    @_NAME
    def command(home: Path, name: str) -> None:
        config, log = _open(home)
        obey(config, log, name)
        click.echo(f"{name}: the role connect obeys within a second, if it runs; `streamlearn connectors status {name}` says")


_order("pause", "Stop discovering; what it holds stays open.  Survives restarts.", lambda c, g, n: book.aim(c, g, n, book.PAUSED))
_order("resume", "Go on at the cursor.", lambda c, g, n: book.aim(c, g, n, book.RUNNING))
_order("stop", "Close it and let go of what it holds.  Survives restarts.", lambda c, g, n: book.aim(c, g, n, book.STOPPED))
_order("restart", "Close it and open it again: after FAILED, once what it says is mended.", book.restart)
_order("delete", "Remove it.  Its cursor stays: one made anew under this name goes on from there.", book.delete)


@connectors.command()
@HOME
@_NAME
@click.option("--reset", is_flag=True, help="Begin anew: what is announced again is announced anew too.")
@click.option("--set", "cursor", help="Go on there: a JSON object, as this command shows it.")
def offsets(home: Path, name: str, reset: bool, cursor: str | None) -> None:
    """How far a connector has got in its source; of a stopped one, --reset or --set it."""
    config, log = _open(home)
    entry = book.find(config, log, name)
    if reset or cursor is not None:
        to = None if reset else _object(cursor or "")
        if entry.target != book.STOPPED or _status(home, entry)["state"] not in (book.STOPPED, "UNASSIGNED"):
            raise ConfigError(
                f"connector {name} is not stopped: `streamlearn connectors stop {name}`, and wait until its status says STOPPED"
            )
        book.move(log, name, to)
    click.echo(json.dumps(_cursor(log, name)))


def _object(text: str) -> Cursor:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"--set {text!r}: not JSON: {e}") from e
    if not isinstance(found, dict):
        raise ConfigError(f'--set {text!r}: a JSON object is wanted, such as {{"byte": 0}}')
    return found


def _config(home: Path) -> Config:
    path = home / "config.json"
    if not path.exists():
        raise ConfigError(f"{home}: no loop has run here; `streamlearn up --home {home}` starts one")
    return config_file.from_json(path.read_text(), where=str(path))


def _open(home: Path) -> tuple[Config, EventLog]:
    config = _config(home)
    log = Home(home.resolve(), config).log()
    for topic in (CANDIDATES, CONNECTOR_CONFIGS, SOURCE_STATE):
        log.ensure_topic(topic, config.log.partitions)
    return config, log


def _look(home: Path) -> tuple[Config, EventLog | None]:
    """As _open, but nothing is made that is not there."""
    if not (home / "config.json").exists():
        return Config(), None
    config = _config(home)
    if config.log.kind == "sqlite" and not (home / "log.sqlite").exists():
        return config, None
    return config, Home(home.resolve(), config).log()


def _read(file: Path) -> list[ConnectorConfig]:
    """The connectors of a file, their options validated and their paths absolute.  Raises ConfigError."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: cannot be read: {e}") from e
    found = _from_json(text, str(file)) if file.suffix.lower() == ".json" else _from_toml(text, str(file))
    if not found:
        raise ConfigError(f"{file}: no connectors in it; name [[connectors]], each with name and class")
    for connector in found:
        build(connector, str(file))
    return [absolute(connector, file.parent.resolve()) for connector in found]


def _from_json(text: str, where: str) -> list[ConnectorConfig]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{where}: not JSON: {e}") from e
    if not isinstance(raw, dict) or not isinstance(raw.get("config"), dict) or set(raw) - {"name", "config"}:
        raise ConfigError(f'{where}: a connector is {{"name": "...", "config": {{"connector.class": "...", ...}}}}')
    named = {"name": raw["name"]} if "name" in raw else {}
    if raw["config"].get("name", raw.get("name")) != raw.get("name"):
        raise ConfigError(f"{where}: name is {raw.get('name')!r} and, in its config, {raw['config']['name']!r}")
    return [from_connect(named | raw["config"], where=where)]


def _from_toml(text: str, where: str) -> list[ConnectorConfig]:
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{where}: not TOML: {e}") from e
    return list(config_file.validate(raw, where=where).connectors)


def _status(home: Path, entry: book.Entry) -> dict[str, Any]:
    """As the role said last, if it runs; else nobody has taken it."""
    seen = overview(home.resolve())
    role = seen["roles"].get("connect", {})
    running = role.get("alive") and role["state"] in ("watching", "waiting")
    said = seen["connectors"].get(entry.config.name, {}) if running else {}
    found = {
        "name": entry.config.name,
        "class": entry.config.kind,
        "target": entry.target,
        "state": said.get("state", "UNASSIGNED"),
        "candidates": said.get("candidates", 0),
        "from": "file" if entry.in_file else "log",
    }
    return found | {key: said[key] for key in ("retrying", "trace") if key in said}


def _cursor(log: EventLog | None, name: str) -> Cursor | None:
    if log is None:
        return None
    try:
        state = load(name, log.latest(SOURCE_STATE, name.encode()))
    except NotFound:
        return None
    return None if state is None else state[0]


def _plan(wanted: ConnectorConfig, before: book.Entry | None, cursor: Cursor | None, first: int) -> dict[str, Any]:
    action = "would be created"
    if before is not None:
        action = "unchanged" if before.config == wanted else "would be changed"
        if before.in_file:
            action = "would be refused: it stands in the configuration file of the home"
    connector = build(wanted)
    candidates: list[dict[str, Any]] = []
    refused: list[tuple[str, str, str]] = []
    try:
        connector.check()
        batches = connector.discover(cursor)
        while len(candidates) < first and (found := next(batches, None)) is not None:
            candidates += [json.loads(c.to_json()) for c in found.candidates]
            refused += found.refused
    finally:
        connector.close()
    return {"name": wanted.name, "action": action, "cursor": cursor, "candidates": candidates[:first], "refused": refused[:first]}


def _show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for line in _table(rows):
        click.echo(line)


def _cell(row: dict[str, Any], key: str) -> str:
    unknown = key == "candidates" and row.get("state") == "UNASSIGNED"  # its role tells how many, since it began
    return "–" if unknown else str(row.get(key, ""))


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        yield "none"
        return
    keys = [key for key in dict.fromkeys(itertools.chain(*rows)) if key not in ("trace", "retrying")]
    cells = [keys, *([_cell(row, key) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line, row in zip(cells, [{}, *rows], strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        if why := row.get("trace") or row.get("retrying"):
            yield f"    {str(why).strip().splitlines()[-1]}"
