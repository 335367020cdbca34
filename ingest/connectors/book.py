"""What each connector is to do: the connectors of the configuration file, and those that were made at run time.

The latter, and every command (pause, resume, stop, restart, delete), are records of the compacted topic `connector-configs`: key = name,
value = {"config", "target", "restarts"} or {"deleted"}.  A record of a connector that stands in the file has no config: only its target.
The append is the commit point.  Whoever is answered has been obeyed, whenever the role `connect` comes to read it: it looks on every round.
Two who write the same connector at once: the last record counts, whole.
"""

import dataclasses
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from ingest.connectors.base import Cursor, dump
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import ConfigError, NotFound
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, SOURCE_STATE, EventLog, NewRecord

RUNNING, PAUSED, STOPPED = TARGETS = ("RUNNING", "PAUSED", "STOPPED")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One connector as it is wanted."""

    config: ConnectorConfig
    target: str = RUNNING
    restarts: int = 0  # how often a restart was asked for
    in_file: bool = False  # so only the file can change or remove it


@dataclass(frozen=True)
class _Record:
    config: ConnectorConfig | None
    target: str
    restarts: int


def entries(config: Config, log: EventLog) -> dict[str, Entry]:
    """All connectors by name, those of the file first.  Raises Retryable."""
    try:
        table = log.table(CONNECTOR_CONFIGS)
    except NotFound:  # nobody has made any yet
        table = {}
    records = {key.decode("utf-8", "replace"): _parse(key, value) for key, value in sorted(table.items())}
    found = {}
    for c in config.connectors:
        record = records.get(c.name) or _Record(None, RUNNING, 0)
        found[c.name] = Entry(c, record.target, record.restarts, in_file=True)
    for name, made in records.items():
        if name not in found and made is not None and made.config is not None and made.config.name == name:
            found[name] = Entry(made.config, made.target, made.restarts)
    return found


@functools.lru_cache(maxsize=1024)
def _parse(key: bytes, value: bytes) -> _Record | None:
    """None: deleted, or not ours.  Remembered, so that a bad record is complained of once."""
    try:
        raw = json.loads(value)
        if raw.get("deleted"):
            return None
        if raw["target"] not in TARGETS:
            raise ValueError(f"target = {raw['target']!r}")
        config = None if raw["config"] is None else ConnectorConfig.model_validate(raw["config"])
        return _Record(config, raw["target"], int(raw["restarts"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ValidationError) as e:
        logger.error("topic %s, connector %r: a record that cannot be read, left out: %s", CONNECTOR_CONFIGS, key, e)
        return None


def write(log: EventLog, entry: Entry) -> None:
    config = None if entry.in_file else entry.config.given()
    _append(log, entry.config.name, {"config": config, "target": entry.target, "restarts": entry.restarts})


def put(config: Config, log: EventLog, wanted: ConnectorConfig, target: str = RUNNING) -> str:
    """Make or change a connector: created, as `target` says, updated or unchanged.  Raises ConfigError where it stands in the file."""
    before = entries(config, log).get(wanted.name)
    if before is None:
        write(log, Entry(wanted, target))
        return "created"
    editable(before)
    if before.config == wanted:
        return "unchanged"
    write(log, dataclasses.replace(before, config=wanted))
    return "updated"


def aim(config: Config, log: EventLog, name: str, target: str) -> None:
    """Pause, resume or stop.  Raises NotFound."""
    entry = find(config, log, name)
    if entry.target != target:
        write(log, dataclasses.replace(entry, target=target))


def restart(config: Config, log: EventLog, name: str) -> None:
    """Raises NotFound."""
    entry = find(config, log, name)
    write(log, dataclasses.replace(entry, restarts=entry.restarts + 1))


def delete(config: Config, log: EventLog, name: str) -> None:
    """The cursor stays: a connector that is made anew under this name goes on from it.  Raises NotFound, ConfigError."""
    editable(find(config, log, name))
    _append(log, name, {"deleted": True})


def move(log: EventLog, name: str, cursor: Cursor | None) -> None:
    """Where a connector goes on; None: it begins anew.  What it announces again is announced anew too.  Nobody may have it meanwhile."""
    ends = {p: log.bounds(CANDIDATES, p)[1] for p in range(log.partitions(CANDIDATES))}
    log.append([NewRecord(SOURCE_STATE, name.encode(), dump({"cursor": cursor, "ends": ends}))])


def find(config: Config, log: EventLog, name: str) -> Entry:
    found = entries(config, log)
    if name not in found:
        raise NotFound(f"connector {name} not found; there are {', '.join(found) or 'none'}")
    return found[name]


def editable(entry: Entry) -> None:
    if entry.in_file:
        raise ConfigError(
            f"connector {entry.config.name} stands in the configuration file: change or remove it there; it can be paused or stopped"
        )


def watched(config: Config, log: EventLog) -> tuple[Path, ...]:
    """Folders whose files a candidate may name."""
    folders = (e.config.options.get("path") for e in entries(config, log).values() if e.config.kind == "folder")
    return tuple(Path(path).resolve() for path in folders if isinstance(path, str) and path)


def _append(log: EventLog, name: str, value: dict[str, object]) -> None:
    log.append([NewRecord(CONNECTOR_CONFIGS, name.encode(), dump(value))])
