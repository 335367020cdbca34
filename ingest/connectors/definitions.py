"""What Connect calls a config definition: every key of a class, with its type, default and meaning, and what is wrong with a value."""

from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from ingest.connectors import plugins
from ingest.connectors.configure import CONNECT, FIELDS, connect_complaints, to_text
from streamlearn.contract.errors import ConfigError

MEANING = {  # docs/configuration.md says the same at length
    "name": "names the connector and its cursor",
    "class": "the connector's class",
    "tasks_max": "threads",
    "errors_tolerance": "none: a refused entry fails the connector; all: it becomes a dead letter",
    "errors_retry_delay_max_s": "longest pause between tries after a fault, milliseconds",
    "errors_log": "say refused entries in the log too",
    "dead_letter_topic": "the topic of refused entries",
    "poll_s": "between looks at the source, milliseconds",
}


def validate(name: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """Connect's answer to .../config/validate.  Raises ConfigError when the class cannot be imported."""
    if flat["connector.class"] != name:
        raise ConfigError(f"connector.class = {flat['connector.class']!r}, but the request is for {name}")
    complaints: dict[str, list[str]] = {}
    for key, text in connect_complaints(flat):
        complaints.setdefault(key.strip(), []).append(text)
    fields = [(CONNECT[key], field, MEANING[key], "Common") for key, field in FIELDS.items()]
    options = plugins.load(name).Options
    fields += [(key, field, field.description or "", name) for key, field in options.model_fields.items()]
    configs = []
    for order, (key, field, meaning, group) in enumerate(fields):
        definition = _definition(key, field) | {"documentation": meaning, "group": group, "order": order}
        value = to_text(flat[key]) if key in flat else definition["default_value"]
        configs.append({"definition": definition, "value": _value(key, value, complaints.pop(key, []))})
    for key, errors in complaints.items():  # keys that there are none of
        configs.append({"definition": _unknown(key), "value": _value(key, to_text(flat.get(key)), errors)})
    return {
        "name": name,
        "error_count": sum(len(c["value"]["errors"]) for c in configs),
        "groups": ["Common", name],
        "configs": configs,
    }


def _value(key: str, value: str | None, errors: list[str]) -> dict[str, Any]:
    return {"name": key, "value": value, "recommended_values": [], "errors": errors, "visible": True}


def _definition(key: str, field: FieldInfo) -> dict[str, Any]:
    required = field.is_required()
    return {
        "name": key,
        "type": "LONG" if key.endswith(".ms") else _type(field.annotation),
        "required": required,
        "default_value": None if required else default_text(key, field),
        "importance": "HIGH" if required else "MEDIUM",
        "width": "MEDIUM",
        "display_name": key,
        "dependents": [],
    }


def default_text(key: str, field: FieldInfo) -> str | None:
    value = field.get_default(call_default_factory=True)
    if key.endswith(".ms"):
        return f"{value * 1000:.0f}"
    return None if value is None else to_text(value)


def _unknown(key: str) -> dict[str, Any]:
    return {"name": key, "type": "STRING", "required": False, "default_value": None, "importance": "LOW", "documentation": "", "group": ""}


def _type(want: Any) -> str:
    if get_origin(want) in (tuple, list):
        return "LIST"
    plain = next((a for a in (want, *get_args(want)) if a in (bool, int, float)), str)
    return {bool: "BOOLEAN", int: "INT", float: "DOUBLE", str: "STRING"}[plain]
