"""What a person sees: the live view, one line of a log, `streamlearn status`.  Made from heartbeats and histories alone."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from streamlearn.contract.durable import read_lines
from streamlearn.contract.status import age_s, elsewhere, judged, read_status

BARS = "▁▂▃▄▅▆▇█"
ROLES = ("demo", "connect", "fetch", "train", "evaluate", "serve", "refresh")
WAITING = ("waiting", "waiting_on", "waiting_since", "waiting_s", "waiting_at")
INGEST = ("stored", "images_per_s", "lag", "shards", "spool_bytes", "last_shard_at", "outcomes", *WAITING)
TRAIN = (
    *("state", "step", "images", "fresh", "images_per_s", "loss", "lr", "halvings", "round", "cursor", "wait_share", "perplexity"),
    *("lr_held", "plateau_waits", "skipped_steps", "rollbacks", "collapse_signs"),
    *("code_entropy", "effective_rank", "bad_steps", "last_snapshot", "last_checkpoint", "checkpoint_failures", "stream"),
    *WAITING,
)
WAITERS = (("connect", "connect"), ("fetch", "ingest"), ("train", "train"))  # roles, and where the view has them
OLD_S = 30.0  # a heartbeat older than this is said to be old


def overview(home: Path, restarts: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Everything the views show, as plain values (`status --json`)."""
    status = read_status(home)
    roles = {}
    for name in ROLES:
        if name in status:
            beat = status[name]
            roles[name] = {
                "state": beat.get("state", "?"),
                "pid": beat.get("pid"),
                "alive": _alive(beat, name),
                "age_s": age_s(beat),
                "elsewhere": elsewhere(beat),
                "metrics_port": beat.get("metrics_port"),
            }
    return {
        "home": str(home),
        "roles": roles,
        "restarts": dict(restarts or {}),
        "ingest": _pick(status.get("fetch", {}), *INGEST),
        "connect": _pick(status.get("connect", {}), *WAITING),
        "candidates": status.get("connect", {}).get("candidates", 0),
        "sources": status.get("connect", {}).get("sources", {}),
        "connectors": status.get("connect", {}).get("connectors", {}),
        "train": _pick(status.get("train", {}), *TRAIN),
        "evaluate": _pick(status.get("evaluate", {}), "evaluated", "pending", "failed", "last", "gate"),
        "curve": curve(home),
    }


def curve(home: Path) -> list[dict[str, Any]]:
    """One entry a snapshot and bank: the last line written of it, by step."""
    found = {(line["bank"], line["step"]): line for line in read_lines(home / "history" / "evaluate.jsonl") if "knn" in line}
    return [found[key] for key in sorted(found)]


def sparkline(values: list[float], width: int = 32) -> str:
    values = values[-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[round((v - low) / span * (len(BARS) - 1))] for v in values)


def line(view: Mapping[str, Any], seconds: float) -> str:
    """One plain line, for logs."""
    ingest, train = view["ingest"], view["train"]
    parts = [
        f"up {seconds:.0f} s",
        f"ingest {ingest.get('images_per_s', 0) or 0:g} img/s, stored {ingest.get('stored', 0)}, lag {ingest.get('lag', 0)}, shards {ingest.get('shards', 0)}",
        f"step {train.get('step', 0)}, loss {number(train.get('loss'))}, lr {number(train.get('lr'))}, {train.get('images_per_s', 0) or 0:g} img/s",
        probe_line(view),
    ]
    if failing := [name for name, count in view["restarts"].items() if count]:
        parts.append("restarts " + ", ".join(f"{name} {view['restarts'][name]}" for name in failing))
    for role in (ingest, train):
        if role.get("waiting"):
            parts.append(f"WAITING for {role['waiting_s']:.0f} s: {role['waiting']}")
    return " | ".join(parts)


def probe_line(view: Mapping[str, Any]) -> str:
    best = max(view["curve"], key=lambda e: float(e["knn"]), default=None)
    if best is None:
        return "no snapshot probed yet"
    last = view["curve"][-1]
    tail = f"(best {best['knn']:.1%}, untrained {best['random_knn']:.1%}, raw pixels {best['raw_knn']:.1%})"
    return f"{last['tag']} k-NN {last['knn']:.1%} {tail}"


def panel(view: Mapping[str, Any], seconds: float) -> RenderableType:
    """The live view; fits 80 x 24."""
    title = f"streamlearn · up {_duration(seconds)}"
    return Panel(
        Group(_roles(view), Text(), _figures(view), Text(), _probes(view), _failures(view)),
        title=title,
        subtitle=str(view["home"])[-70:],
        border_style="cyan",
        width=100,
    )


def _roles(view: Mapping[str, Any]) -> RenderableType:
    shown = []
    for name, role in view["roles"].items():
        finished = role["state"] == "finished"
        good = finished or (role["alive"] and role["age_s"] < OLD_S)
        text = Text("● " if good else "○ ", style="green" if good else "red", no_wrap=True)  # a role and its state stay on one line
        text.append(f"{name} ", style="default")
        text.append(_said(role) if role["alive"] or finished else _gone(role), style="dim default")
        if view["restarts"].get(name):
            text.append(f" ↻{view['restarts'][name]}", style="yellow")
        shown.append(text)
    row = Table.grid(padding=(0, 2))
    row.add_row(Text("roles ", style="bold"), Columns(shown, padding=(0, 2)))
    return row


def _said(role: Mapping[str, Any]) -> str:
    at = f" on {role['elsewhere']}" if role["elsewhere"] else ""
    return str(role["state"])[:24] + at


def _gone(role: Mapping[str, Any]) -> str:
    """Of another host or container nobody here knows that it is dead."""
    if not role["elsewhere"] or role["state"] == "stopped" or not math.isfinite(role["age_s"]):
        return "not running"
    return f"seen {_duration(role['age_s'])} ago on {role['elsewhere']}"


def _figures(view: Mapping[str, Any]) -> RenderableType:
    ingest, train = view["ingest"], view["train"]
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(justify="left")
    snapshot = train.get("last_snapshot") or {}
    rows = [
        ("[bold]ingest[/]", f"{ingest.get('images_per_s', 0) or 0:g} images/s", "stored", f"{ingest.get('stored', 0):,}"),
        ("", f"lag {ingest.get('lag', 0):,}", "shards", f"{ingest.get('shards', 0):,}"),
        (
            "[bold]learn[/]",
            f"{train.get('images_per_s', 0) or 0:g} images/s",
            "step",
            f"{train.get('step', 0):,}  (round {train.get('round', 0)})",
        ),
        ("", f"loss {number(train.get('loss'))}", "images", f"{train.get('images', 0):,}  ({train.get('fresh', 0):,} fresh)"),
        ("", f"learning rate {number(train.get('lr'))}", "halvings", _halvings(train)),
        ("", f"waiting for data {train.get('wait_share', 0) or 0:.0%}", "effective rank", number(train.get("effective_rank"))),
        ("[bold]snapshot[/]", f"{snapshot.get('tag', '–')}", "digest", str(snapshot.get("digest", "–"))[7:19] or "–"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _halvings(train: Mapping[str, Any]) -> str:
    """And what keeps the next one from coming."""
    waits = "held" if train.get("lr_held") else f"flat, waits: {train['plateau_waits']}" if train.get("plateau_waits") else ""
    return f"{train.get('halvings', 0)}{'  · ' if waits else ''}{waits}"


def _probes(view: Mapping[str, Any]) -> RenderableType:
    if not view["curve"]:
        return Text.assemble(("probes  ", "bold"), ("no snapshot probed yet", "dim"))
    text = Text()
    for bank in dict.fromkeys(e["bank"] for e in view["curve"]):
        entries = [e for e in view["curve"] if e["bank"] == bank]
        values = [float(e["knn"]) for e in entries]
        text.append("probes  ", style="bold")
        text.append(f"{bank} k-NN ")
        text.append(sparkline(values), style="green")
        text.append(f" {values[-1]:.1%}", style="bold green")
        text.append(f"  best {max(values):.1%}  ridge {entries[-1]['ridge']:.1%}\n")
        text.append(
            f"        untrained {entries[-1]['random_knn']:.1%}   raw pixels {entries[-1]['raw_knn']:.1%}   snapshots {len(values)}",
            style="dim",
        )
    return text


def _failures(view: Mapping[str, Any]) -> RenderableType:
    outcomes = {k: v for k, v in (view["ingest"].get("outcomes") or {}).items() if k != "stored"}
    text = Text("\n")
    if outcomes:
        text.append("refused in this run  ", style="bold")
        text.append(
            "  ".join(f"{name.removeprefix('rejected:')} {count}" for name, count in sorted(outcomes.items(), key=lambda i: -i[1])),
            style="dim",
        )
    waits = [(f"{name} waits since {view[room].get('waiting_since')} for", view[room].get("waiting")) for name, room in WAITERS]
    for label, value in (*waits, ("snapshots that cannot be measured", view["evaluate"].get("failed"))):
        if value:
            text.append(f"\n{label}: {value}", style="red")
    for name, connector in view["connectors"].items():
        if why := connector.get("trace") or connector.get("retrying"):
            text.append(f"\nconnector {name} {connector['state']}: {str(why).strip().splitlines()[-1][:120]}", style="red")
    if view["train"].get("bad_steps"):
        text.append(f"\nsteps skipped as not finite: {view['train']['bad_steps']}", style="red")
    return text


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _alive(beat: Mapping[str, Any], role: str) -> bool:
    """Whether that process is there and is that role; pids are used again by others.  Of one that cannot be seen from here: whether it speaks."""
    pid = beat.get("pid")
    if elsewhere(beat):
        return beat.get("state") not in ("stopped", "finished") and judged(beat, age_s(beat))[0]
    if not isinstance(pid, int):
        return False
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return pid == os.getpid()
    return role.encode() in words
