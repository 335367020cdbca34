"""A connector's configuration: its options by its class, and the same in Kafka Connect's flat strings, both ways.

Ours (TOML, the event log) has values of the right type; Connect's has strings, which are read by the type of the option they are for.
Keys of every connector have Connect's names there (CONNECT); a class's own options are called the same in both.  Lists are commas; a
list with an entry that holds one is written as JSON, [ first.  Whatever is left out has its default, and stays left out.
"""

import json
import types
import typing
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal

from ingest.connectors import plugins
from ingest.connectors.base import LOCAL, Connector
from streamlearn.contract.config import ConnectorConfig, Section
from streamlearn.contract.config_file import complaints, section
from streamlearn.contract.errors import ConfigError

CONNECT = {  # our key -> Connect's
    "name": "name",
    "class": "connector.class",
    "tasks_max": "tasks.max",
    "errors_tolerance": "errors.tolerance",
    "errors_retry_delay_max_s": "errors.retry.delay.max.ms",
    "errors_log": "errors.log.enable",
    "dead_letter_topic": "errors.deadletterqueue.topic.name",
    "poll_s": "poll.interval.ms",
}
NO_SPLIT = "no class splits its work over several tasks yet; set it to 1"
OURS = {theirs: ours for ours, theirs in CONNECT.items()}
FIELDS = {field.alias or name: field for name, field in ConnectorConfig.model_fields.items()}


def options_of(config: ConnectorConfig, cls: type[Connector], where: str) -> Section:
    """The class's options.  Raises ConfigError with file, connector, key, value and remedy."""
    known = [key for key in FIELDS if key not in config.model_fields_set]
    return section(cls.Options, config.options, where=f"{where}: connector {config.name}", also=known)


def build(config: ConnectorConfig, where: str = "config") -> Connector:
    """The connector itself; nothing outside is touched.  Raises ConfigError."""
    try:
        cls = plugins.load(config.kind)
    except ConfigError as e:
        raise ConfigError(f"{where}: connector {config.name}: {e}") from e
    options = options_of(config, cls, where)
    if config.tasks_max != 1:
        raise ConfigError(f"{where}: connector {config.name}: tasks_max = {config.tasks_max}: {NO_SPLIT}")
    return cls(config.name, options)


def prove(config: ConnectorConfig, where: str = "config") -> None:
    """As build, and the connector looks at its source.  Raises ConfigError, or Retryable where the source is down."""
    connector = build(config, where)
    try:
        connector.check()
    finally:
        connector.close()


def local_paths(config: ConnectorConfig) -> dict[str, str]:
    """Options that name a path of this machine, with their values."""
    fields = plugins.load(config.kind).Options.model_fields
    return {k: v for k, v in config.options.items() if k in fields and LOCAL in fields[k].metadata and isinstance(v, str) and v}


def absolute(config: ConnectorConfig, folder: Path) -> ConnectorConfig:
    """Relative paths are relative to the folder of the file that holds them."""
    return config.with_options(**{key: str((folder / value).absolute()) for key, value in local_paths(config).items()})


def from_connect(flat: Mapping[str, Any], *, where: str) -> ConnectorConfig:
    """From Connect's `config` object, with `name` in it.  Raises ConfigError with all complaints."""
    if found := connect_complaints(flat):
        raise ConfigError("\n".join(f"{where}: connector {flat.get('name', '?')}: {text}" for _, text in found))
    return ConnectorConfig.model_validate(_ours(flat, plugins.load(str(flat["connector.class"])).Options))


def connect_complaints(flat: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with Connect's `config` object: (Connect's key, complaint)."""
    try:
        options = plugins.load(str(flat["connector.class"])).Options if "connector.class" in flat else None
    except ConfigError as e:
        return [("connector.class", str(e))]
    misnamed = [key for key in flat if key in FIELDS and key not in OURS]  # one name in each form
    found = [(key, f"{key}: no such key; it is written {CONNECT[key]} here") for key in misnamed]
    ours = _ours({k: v for k, v in flat.items() if k not in misnamed}, options)
    own = {k: v for k, v in ours.items() if k in FIELDS}
    found += [(CONNECT.get(key, key), CONNECT.get(key, key) + text.removeprefix(key)) for key, text in complaints(ConnectorConfig, own)]
    if isinstance(ours.get("tasks_max"), int) and ours["tasks_max"] > 1:
        found.append((CONNECT["tasks_max"], f"{CONNECT['tasks_max']} = {ours['tasks_max']}: {NO_SPLIT}"))
    if options is not None:
        rest = {k: v for k, v in ours.items() if k not in FIELDS}
        found += complaints(options, rest, also=[theirs for theirs in OURS if theirs not in flat])
    return found


def to_connect(config: ConnectorConfig) -> dict[str, Any]:
    """Connect's {"name", "config"}: what is set, as strings."""
    flat = {}
    for key, value in config.given().items():
        if value is not None:
            flat[CONNECT.get(key, key)] = _milliseconds(value) if CONNECT.get(key, "").endswith(".ms") else to_text(value)
    return {"name": config.name, "config": flat}


def _ours(flat: Mapping[str, Any], options: type[Section] | None) -> dict[str, Any]:
    found = {}
    fields = options.model_fields if options else {}
    for key, value in flat.items():
        ours = OURS.get(key)
        if ours is None:
            found[key] = coerced(value, fields[key].annotation) if key in fields else value
        elif key.endswith(".ms"):
            found[ours] = _seconds(value)
        else:
            found[ours] = coerced(value, FIELDS[ours].annotation)
    return found


def coerced(value: Any, want: Any) -> Any:
    """A string as the type that an option has; what is none of it stays as it is, for the complaint.  Not a string: as it is."""
    origin, args = typing.get_origin(want), typing.get_args(want)
    if origin is Annotated:
        return coerced(value, args[0])
    if origin in (typing.Union, types.UnionType):
        others = [a for a in args if a is not types.NoneType]
        return coerced(value, others[0]) if len(others) == 1 else value
    if not isinstance(value, str) or want is str:
        return value if want is not str or not isinstance(value, int | float) else to_text(value)  # Connect takes numbers for strings
    if origin is Literal:
        return next((choice for choice in args if to_text(choice) == value), value)
    if want is bool:
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    if want in (int, float):
        try:
            return want(value)
        except ValueError:
            return value
    if origin in (tuple, list):
        return _listed(value, args[0] if args else str)
    return _json(value)


def _listed(text: str, inner: Any) -> Any:
    found = _json(text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",")] if text.strip() else []
    return [coerced(entry, inner) for entry in found] if isinstance(found, list) else found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def to_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # 1800, as people write it
    if isinstance(value, list | tuple):
        texts = [to_text(entry) for entry in value]
        plain = all(t and t == t.strip() and "," not in t for t in texts) and not (texts and texts[0].startswith("["))
        return ",".join(texts) if plain and all(not isinstance(v, list | tuple | dict) for v in value) else json.dumps(list(value))
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _milliseconds(seconds: float) -> str:
    """Exact, so that the way back is."""
    return format((Decimal(repr(seconds)) * 1000).normalize(), "f")


def _seconds(value: Any) -> Any:
    try:
        return float(Decimal(str(value)) / 1000)
    except InvalidOperation:
        return value
