"""Reading the configuration: one TOML file, a preset beneath it, environment overrides, validation.

`load()` reads the file, applies `STREAMLEARN__SECTION__KEY=value` overrides, puts the preset that is named underneath, and validates.
Every complaint names the file (or variable), the key, the value and the remedy, and is raised before anything on disk is changed.
"""

import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.presets import preset

ENV_PREFIX = "STREAMLEARN__"
Model = TypeVar("Model", bound=BaseModel)


def load(
    path: Path | None, *, base: Config | None = None, env: Mapping[str, str] = os.environ, overrides: Mapping[str, str] | None = None
) -> Config:
    """Read, override, validate.

    `overrides` are `section.key=value` settings of the command line; they win over the environment, which wins over the file, which
    wins over the preset that any of them names, which wins over `base` (for callers without a file).
    Raises ConfigError with file, key, value and remedy.
    """
    raw: dict[str, Any] = {}
    where = str(path) if path else "defaults"
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; write one from `streamlearn config show`") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: not TOML: {e}") from e
    settings = [
        (f"environment {name}", name[len(ENV_PREFIX) :].lower().split("__"), v)
        for name, v in sorted(env.items())
        if name.startswith(ENV_PREFIX)
    ]
    settings += [(f"--set {key}", key.split("."), v) for key, v in (overrides or {}).items()]
    origins = {}
    for origin, keys, text in settings:
        _put(raw, keys, text, origin)
        origins[".".join(keys)] = origin
    beneath: Mapping[str, Any] = base.model_dump(mode="json") if base else {}
    if raw.get("preset"):
        beneath = merged(beneath, preset(raw["preset"], where=origins.get("preset", where)).overlay())
    return validate(merged(beneath, raw), where=where, origins=origins)


def merged(beneath: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables of both, key by key; what `above` says wins, and its lists stand whole."""
    both = dict(beneath)
    for key, value in above.items():
        under = both.get(key)
        both[key] = merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return both


def validate(raw: Mapping[str, Any], *, where: str, origins: Mapping[str, str] | None = None) -> Config:
    """A Config from plain values; lists stand where TOML and JSON have no tuples."""
    return section(Config, raw, where=where, origins=origins)


def section(
    model: type[Model], raw: Mapping[str, Any], *, where: str, origins: Mapping[str, str] | None = None, also: Sequence[str] = ()
) -> Model:
    """Any frozen model from plain values.  `also` are keys that are known beside it, for the suggestions.

    Raises ConfigError with all complaints, each naming `where` (or its origin), key, value and remedy.
    """
    try:
        return model.model_validate(_tuples(raw, model))
    except ValidationError as e:
        raise ConfigError("\n".join(_complaint(error, model, where, origins or {}, also) for error in e.errors())) from None


def complaints(model: type[BaseModel], raw: Mapping[str, Any], *, also: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What `section` would complain of: (first part of the key, complaint)."""
    try:
        model.model_validate(_tuples(raw, model))
    except ValidationError as e:
        return [(str(error["loc"][0]) if error["loc"] else "", _complaint(error, model, "", {}, also)[2:]) for error in e.errors()]
    return []


def from_json(data: str, *, where: str) -> Config:
    """A Config as `model_dump_json` wrote it."""
    try:
        raw = json.loads(data)
    except ValueError as e:
        raise ConfigError(f"{where}: not JSON: {e}") from e
    return validate(raw, where=where)


def _put(raw: dict[str, Any], keys: list[str], text: str, origin: str) -> None:
    """Place one override.  The text is read as a TOML value if it is one, else as a string: 64, 0.5, true, [1, 2], plain words."""
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    at = raw
    for key in keys[:-1]:
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{origin}: {key} is not a section; lists such as connectors are set in the file")
    at[keys[-1]] = value


def _tuples(value: Any, want: Any) -> Any:
    """Make lists tuples and whole numbers floats where the models want them: strict pydantic does neither."""
    origin, args = typing.get_origin(want), typing.get_args(want)
    if origin is Annotated:
        return _tuples(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return _tuples(value, args[0])
    if isinstance(want, type) and issubclass(want, BaseModel) and isinstance(value, Mapping):
        fields = want.model_fields
        return {k: _tuples(v, fields[k].annotation) if k in fields else v for k, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is ... else args
        return tuple(_tuples(v, w) for v, w in zip(value, inner, strict=True)) if len(inner) == len(value) else tuple(value)
    if want is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _complaint(error: ErrorDetails, root: type[BaseModel], where: str, origins: Mapping[str, str], also: Sequence[str]) -> str:
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc)
    place = origins.get(key, where)
    if error["type"] == "extra_forbidden":
        known = _keys(root, loc[:-1]) + ([] if loc[1:] else list(also))
        near = difflib.get_close_matches(loc[-1], known, n=1)
        hint = f"; did you mean {'.'.join([*loc[:-1], near[0]])}?" if near else f"; known here: {', '.join(known)}"
        return f"{place}: {key}: no such key{hint}"
    if error["type"] == "missing":
        return f"{place}: {key}: required, and has no default"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return f"{place}: {message}"
    shown = re.sub(r"://[^/@\s]+@", "://…@", repr(error["input"]))  # a password in an address goes into no log
    return f"{place}: {key} = {shown}: {message[:1].lower()}{message[1:]}"


def _keys(root: Any, loc: list[str]) -> list[str]:
    """The keys that exist at a place, for the suggestion."""
    model = root
    for part in loc:
        if part.isdigit():
            continue
        want = model.model_fields[part].annotation
        while typing.get_args(want):
            want = typing.get_args(want)[0]
        model = want
    return [field.alias or name for name, field in model.model_fields.items()]
