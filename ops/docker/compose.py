"""Reading docker-compose.yml and its override files as Compose does: variables, merging, `!override` and `!reset`.

Only what our files use of the specification: a check needs no engine, and runs wherever the tests do.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_]\w*)(?::?([-?])([^}]*))?\}|([A-Za-z_]\w*))")
REPLACED = {"command", "entrypoint", "test"}  # lists that a later file replaces; others are joined


class Missing(ValueError):
    """A variable without value or default."""


class _Whole:
    """What a tag says: take this value as it is (`!override`), or none (`!reset`)."""

    def __init__(self, value: Any):
        self.value = value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe, and knows the two tags."""


def _override(loader: _Loader, node: yaml.Node) -> _Whole:
    if isinstance(node, yaml.SequenceNode):
        return _Whole(loader.construct_sequence(node, deep=True))
    if isinstance(node, yaml.MappingNode):
        return _Whole(loader.construct_mapping(node, deep=True))
    return _Whole(loader.construct_scalar(node))  # type: ignore[arg-type]


_Loader.add_constructor("!override", _override)
_Loader.add_constructor("!reset", lambda *_: _Whole(None))


def environment(path: Path) -> dict[str, str]:
    """A .env file: NAME=value lines."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolated(value: Any, env: Mapping[str, str]) -> Any:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?why}`, `$$`, in every string.  Raises Missing."""
    if isinstance(value, dict):
        return {k: interpolated(v, env) for k, v in value.items()}
    if isinstance(value, list):
        return [interpolated(v, env) for v in value]
    if isinstance(value, _Whole):
        return _Whole(interpolated(value.value, env))
    return VARIABLE.sub(lambda m: _value(m, env), value) if isinstance(value, str) else value


def _value(found: re.Match[str], env: Mapping[str, str]) -> str:
    if found[1]:
        return "$"
    name = found[2] or found[5]
    if env.get(name):
        return env[name]
    if found[3] == "-":
        return found[4]
    if found[3] == "?" or name not in env:
        raise Missing(f"{name}: {found[4] or 'not set, and no default'}")
    return env[name]


def merged(below: Any, above: Any, key: str = "") -> Any:
    """As `docker compose -f below -f above`: mappings by key, mounts by target, lists joined, commands and tests replaced."""
    if isinstance(above, _Whole):
        return above.value
    if isinstance(below, dict) and isinstance(above, dict):
        out = dict(below)
        for k, v in above.items():
            out[k] = merged(below.get(k), v, k)
            if out[k] is None:
                del out[k]
        return out
    if isinstance(below, list) and isinstance(above, list) and key not in REPLACED:
        if key == "volumes":
            return [*(v for v in below if target(v) not in {target(a) for a in above}), *above]
        return [*below, *(a for a in above if a not in below)]
    return _plain(above)


def _plain(value: Any) -> Any:
    """Without tags, where nothing lies below."""
    if isinstance(value, _Whole):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def target(mount: str) -> str:
    """Where a mount of the short form lands: `[source:]target[:mode]`."""
    parts = mount.split(":")
    return parts[0] if len(parts) == 1 else parts[1]


def read(file: Path) -> Any:
    return yaml.load(file.read_text(), _Loader)


def load(files: Sequence[Path], env: Mapping[str, str]) -> dict[str, Any]:
    """The project as one mapping.  Raises Missing, yaml.YAMLError."""
    whole: Any = {}
    for file in files:
        whole = merged(whole, interpolated(read(file), env))
    return dict(whole)
