"""What the roles have told, as the report needs it: read line by line and thinned on the way, so that months of history need no more memory
than a day's, and hardly more time.

Every figure is checked on reading: a line that a crash has torn, or that another version wrote otherwise, is left out, never an error.
"""

import json
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamlearn.contract.durable import read_lines

POINTS = 600  # of a curve; more cannot be seen on a screen's width
EVENTS = 200  # of a history, the newest of each kind
STORED = re.compile(rb'"stored": ?(\d+)')  # of a line of the fetcher: its first is the count
Line = dict[str, Any]


def figure(line: Mapping[str, Any], name: str) -> float | None:
    """A finite number, or None."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def moment(at: object) -> datetime | None:
    """A time as the roles write it (RFC 3339), in UTC; None where it is none."""
    try:
        then = datetime.fromisoformat(str(at))
    except ValueError:
        return None
    return then if then.tzinfo else then.replace(tzinfo=UTC)


def bounds(entry: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Of a probe: its 95 % interval, or, where several draws were made, a standard deviation about their mean."""
    low, high, middle, spread_ = (figure(entry, key) for key in (f"{name}_low", f"{name}_high", name, f"{name}_deviation"))
    if low is not None and high is not None:
        return low, high
    return None if middle is None or spread_ is None else (middle - spread_, middle + spread_)


class Thinned:
    """At most twice `POINTS` lines of a stream, evenly: whenever there are more, every second one goes and half as many are taken.

    A learner that was killed takes some steps again: what it had told of them goes.
    """

    def __init__(self, by_step: bool = False):
        self.by_step, self.stride, self.seen = by_step, 1, 0
        self.lines: list[Line] = []

    def wants(self) -> bool:
        """Asked for each line; so those that are not wanted need not be parsed."""
        self.seen += 1
        return (self.seen - 1) % self.stride == 0

    def add(self, line: Line) -> None:
        while self.by_step and self.lines and self.lines[-1]["step"] >= line["step"]:
            self.lines.pop()
        self.lines.append(line)
        if len(self.lines) > 2 * POINTS:
            del self.lines[1::2]
            self.stride *= 2


@dataclass
class Learnt:
    """The learner's history: `lines` with step and lr, rising; `events` by kind, the newest last; how many there were of each kind."""

    lines: list[Line]
    events: dict[str, list[Line]]
    counts: Counter[str]


def learnt(home: Path) -> Learnt:
    thin, events, counts = Thinned(by_step=True), dict[str, deque[Line]](), Counter[str]()
    last = b""
    for raw in _raw(home / "history" / "train.jsonl"):
        if b'"event"' in raw:
            line = _parsed(raw)
            if line is not None and isinstance(line.get("event"), str) and figure(line, "step") is not None:
                events.setdefault(line["event"], deque(maxlen=EVENTS)).append(line)
                counts[line["event"]] += 1
            continue
        last = raw
        if thin.wants():
            _add_step(thin, raw)
    _add_step(thin, last)  # the newest is always there
    return Learnt(thin.lines, {kind: list(lines) for kind, lines in events.items()}, counts)


def _add_step(thin: Thinned, raw: bytes) -> None:
    line = _parsed(raw)
    if line is not None and figure(line, "step") is not None and figure(line, "lr") is not None:
        thin.add(line)


@dataclass
class Fetched:
    """The fetcher's history over all its restarts."""

    points: list[Line]  # `at`, `total`: images stored until then
    outcomes: Counter[str]


def fetched(home: Path) -> Fetched:
    """The role counts anew when it is started again: a smaller count than before is such a start."""
    thin, outcomes = Thinned(), Counter[str]()
    before, count, finished = b"", 0, 0
    for raw in _raw(home / "history" / "fetch.jsonl"):
        told = STORED.search(raw)
        if told is None or not raw.rstrip().endswith(b"}"):
            continue
        if int(told[1]) < count:
            finished += count
            outcomes.update(_outcomes(before))
        before, count = raw, int(told[1])
        if thin.wants():
            _add_total(thin, raw, finished + count)
    _add_total(thin, before, finished + count)
    outcomes.update(_outcomes(before))
    return Fetched(thin.lines, outcomes)


def _add_total(thin: Thinned, raw: bytes, total: int) -> None:
    line = _parsed(raw)
    if line is not None and moment(line.get("at")) is not None and (not thin.lines or thin.lines[-1]["at"] != line["at"]):
        thin.add({"at": line["at"], "total": total})


def _outcomes(raw: bytes) -> dict[str, int]:
    held = (_parsed(raw) or {}).get("outcomes")
    return {str(k): v for k, v in held.items() if isinstance(v, int)} if isinstance(held, dict) else {}


def measured(home: Path) -> list[Line]:
    """One entry a snapshot and bank, by step: all that any protocol found; of what was measured twice the last."""
    found: dict[tuple[str, int], Line] = {}
    for line in read_lines(home / "history" / "evaluate.jsonl"):
        bank, step = line.get("bank"), line.get("step")
        if isinstance(bank, str) and isinstance(step, int):
            found.setdefault((bank, step), {}).update(line)
    return [found[key] for key in sorted(found, key=lambda k: (k[1], k[0]))]


def with_recorded(entries: Sequence[Line], continual: Mapping[str, Any]) -> list[Line]:
    """With the figures that stand in continual.json alone: an evaluator killed before it told its history has recorded them all the same."""
    known = {(e["bank"], e["step"]): dict(e) for e in entries}
    for probe, whole in continual.get("probes", {}).items():
        for row in whole.get("by_snapshot", []):
            for bank, score in row["scores"].items():
                entry = known.setdefault(
                    (bank, row["step"]), {"bank": bank, "step": row["step"], "digest": row["digest"], "tag": f"0.{row['step']}.0"}
                )
                entry.setdefault(probe, score)
                entry.setdefault("generation", row["generation"])
    return [known[key] for key in sorted(known, key=lambda k: (k[1], k[0]))]


def spread(lines: Sequence[Line], points: int, keep: Callable[[Line], bool] = lambda _: False) -> list[Line]:
    """Some of them, evenly, with the first, the last, and those to keep."""
    stride = max(1, math.ceil(len(lines) / points))
    return [line for i, line in enumerate(lines) if i % stride == 0 or i == len(lines) - 1 or keep(line)]


@dataclass
class Document:
    """One JSON file of the home.  `value` is empty where there is none, or none that can be read: then `why` says so."""

    value: dict[str, Any] = field(default_factory=dict)
    why: str = ""


def document(path: Path, *needed: str, schema: str = "") -> Document:
    """With the keys that are needed of it, of that schema if one is named."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Document()
    except ValueError as e:
        return Document(why=f"{path.name} cannot be read: {e}")
    if not isinstance(value, dict) or any(key not in value for key in needed) or (schema and value.get("schema") != schema):
        return Document(why=f"{path.name} cannot be read: it should hold {schema or 'a gallery'}, with {', '.join(needed)}")
    return Document(value)


def _raw(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as f:
            yield from f


def _parsed(raw: bytes) -> Line | None:
    try:
        value = json.loads(raw)
    except ValueError:
        return None  # torn by a kill in the middle of a write
    return value if isinstance(value, dict) else None
