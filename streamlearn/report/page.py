"""One self-contained HTML page: no script, no request to anywhere; readable on a phone."""

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from streamlearn import view
from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.durable import read_lines
from streamlearn.contract.errors import Corrupt, NotFound, Retryable
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from streamlearn.report import plots
from streamlearn.stream.decode import decode

THUMB = 72  # px
POINTS = 1500  # of a curve; more cannot be seen
CSS = """
:root{--ink:#222831;--soft:#68727f;--line:#e2e6ec;--card:#fff;--page:#f5f7fa;--blue:#1f6feb}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:16px}h1{font-size:1.5rem;margin:.4rem 0}h2{font-size:1.1rem;margin:0 0 .6rem}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:14px 0;overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;padding:0;border:0;background:none}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}.tile b{display:block;font-size:1.35rem}
.tile span,.soft{color:var(--soft);font-size:.85rem}svg{width:100%;height:auto;max-width:860px}
table{border-collapse:collapse;width:100%;font-size:.88rem}th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}code{font-size:.85em}.row{display:flex;gap:4px;align-items:center;margin:4px 0}
.row img{width:72px;height:72px;object-fit:cover;border-radius:4px}.row span{width:90px;flex:none}.win{color:#2b8a3e;font-weight:600}
"""


def build_report(home: Path, config: Config, store: ObjectStore, out: Path) -> Path:
    """Write the page from what the roles have told so far."""
    found = view.overview(home)
    train = _last_by_step(line for line in read_lines(home / "history" / "train.jsonl") if "lr" in line and "event" not in line)
    events = [line for line in read_lines(home / "history" / "train.jsonl") if "event" in line]
    sections = [
        _tiles(found),
        _learning(train, [e for e in events if e["event"] == "halved"]),
        *_probing(found["curve"], _quarters(home, train)),
        _alarms(found["curve"], train),
        _intake(home, found),
        _snapshots(found["curve"]),
        _gallery(home, store),
    ]
    name = html.escape(config.train.name)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>{name}</title>"
    when = max((e["at"] for e in train[-1:]), default="")
    body = f"<main><h1>{name}</h1><div class=soft>streamlearn, last step recorded {html.escape(when)}</div>{''.join(sections)}</main>"
    durable.write(out, f"{head}<style>{CSS}</style>{body}</html>".encode())
    return out


def _tiles(found: dict[str, Any]) -> str:
    train = found["train"]
    best = max(found["curve"], key=lambda e: float(e["knn"]), default=None)
    tiles = [
        (f"{train.get('step', 0):,}", "steps"),
        (f"{train.get('images', 0):,}", f"images learnt, {train.get('fresh', 0):,} of them fresh"),
        (view.number(train.get("lr")), f"learning rate, {train.get('halvings', 0)} halvings"),
        ((train.get("last_snapshot") or {}).get("tag", "–"), "last snapshot"),
    ]
    if best:
        floor = max(best["random_knn"], best["raw_knn"])
        tiles.append(
            (
                f"{best['knn']:.1%}",
                f"best k-NN ({html.escape(best['bank'])}); untrained {best['random_knn']:.1%}, raw pixels {best['raw_knn']:.1%}",
            )
        )
        tiles.append((f"{best['knn'] / max(floor, 1e-9):.2f} ×", "of the better of the two baselines"))
    return (
        "<section class=tiles>"
        + "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
        + "</section>"
    )


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{f'<p class=soft>{note}</p>' if note else ''}{body}</section>"


def _learning(train: Sequence[dict[str, Any]], halvings: Sequence[dict[str, Any]]) -> str:
    if not train:
        return _section("Loss and learning rate", "<p>Nothing learnt yet.</p>")
    return _section("Loss and learning rate", plots.loss(_thin(train), halvings), "Dotted: a plateau was proved and the rate halved.")


def _probing(curve: Sequence[dict[str, Any]], quarters: Sequence[dict[str, Any]]) -> list[str]:
    if not curve:
        return [_section("Probes", "<p>No snapshot has been measured yet.</p>")]
    banks = dict.fromkeys(e["bank"] for e in curve)
    note = "Frozen features of every published snapshot, measured on labelled images it never learnt from."
    return [_section(f"Probes: {html.escape(b)}", plots.probes([e for e in curve if e["bank"] == b], quarters), note) for b in banks]


def _alarms(curve: Sequence[dict[str, Any]], train: Sequence[dict[str, Any]]) -> str:
    parts = []
    if curve:
        first = next(iter(curve))["bank"]
        parts.append(plots.ranks([e for e in curve if e["bank"] == first]))
    if train:
        parts.append(plots.codes(_thin(train)))
    return _section("Alarms for collapse", "".join(parts) or "<p>Nothing measured yet.</p>", "Without labels; alarms, never scores.")


def _intake(home: Path, found: dict[str, Any]) -> str:
    points, total, before = [], 0, 0
    outcomes: Counter[str] = Counter()
    last: dict[str, int] = {}
    for line in read_lines(home / "history" / "fetch.jsonl"):
        if "stored" not in line:
            continue
        if line["stored"] < before:  # the role was started again and counts anew
            before = 0
            outcomes.update(last)
        total += line["stored"] - before
        before, last = line["stored"], line.get("outcomes", {})
        points.append({"seconds": datetime.fromisoformat(line["at"]).timestamp(), "total": total})
    outcomes.update(last)
    if not points:
        return _section("Intake", "<p>Nothing fetched yet.</p>")
    rows = "".join(f"<tr><td>{html.escape(k.replace(':', ': '))}<td>{v:,}" for k, v in outcomes.most_common())
    table = f"<table><tr><th>outcome<th>candidates{rows}</table>"
    return _section(
        "Intake", plots.intake(_thin(points), points[0]["seconds"]) + table, f"{found['ingest'].get('lag', 0):,} candidates wait."
    )


def _snapshots(curve: Sequence[dict[str, Any]]) -> str:
    rows = []
    for e in list(curve)[-40:]:
        cells = [
            e["bank"],
            f"{e['step']:,}",
            *(f"{e[k]:.1%}" for k in ("knn", "random_knn", "raw_knn", "ridge")),
            f"{e['effective_rank']:.1f}",
        ]
        win = " class=win" if e["knn"] > max(e["random_knn"], e["raw_knn"]) else ""
        digest = html.escape(str(e.get("digest", ""))[7:19])
        rows.append(
            f"<tr{win}><td><code>{html.escape(e['tag'])}</code> <code class=soft>{digest}</code>"
            + "".join(f"<td>{html.escape(c)}" for c in cells)
        )
    head = "<tr><th>snapshot<th>bank<th>step<th>k-NN<th>untrained<th>raw pixels<th>ridge<th>eff. rank"
    return _section("Snapshots", f"<table>{head}{''.join(rows)}</table>" if rows else "<p>None measured yet.</p>")


def _gallery(home: Path, store: ObjectStore) -> str:
    title, note = "What some prototypes stand for", "For each, the most typical of a sample of the images learnt."
    path = home / "history" / "gallery.json"
    if not path.exists():
        return _section(title, "<p>Comes with the first snapshot.</p>")
    raw = json.loads(path.read_text())
    rows = []
    for prototype in raw["prototypes"]:
        images = "".join(f'<img alt="" src="{src}">' for ref in prototype["refs"] if (src := _thumbnail(store, ref)))
        rows.append(f"<div class=row><span class=soft>no. {prototype['id']}<br>{prototype['use']} images</span>{images}</div>")
    return _section(title, "".join(rows), f"{note} Step {raw['step']:,}.")


def _thumbnail(store: ObjectStore, ref: str) -> str:
    """A data URL; empty where the image has gone or cannot be read."""
    name, _, index = ref.rpartition("#")
    try:
        rows = read_sidecar(store.get(sidecar_key(name))).to_pylist()
        sample = [row for row in rows if row["outcome"] == STORED][int(index)]
        image = Image.fromarray(decode(store.get_range(name, sample["member_offset"], sample["member_size"])))
    except (NotFound, Corrupt, Retryable, IndexError):
        return ""
    image.thumbnail((2 * THUMB, 2 * THUMB))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _quarters(home: Path, train: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The demo's quarters, at the step that was being taken when they began."""
    found = []
    for line in read_lines(home / "history" / "demo.jsonl"):
        if line.get("event") == "quarter" and line["quarter"] > 0:
            step = next((t["step"] for t in train if t["at"] >= line["at"]), None)
            if step is not None:
                found.append({"quarter": line["quarter"], "step": step})
    return found


def _last_by_step(lines: Any) -> list[dict[str, Any]]:
    """A learner that was killed takes some steps again: the last line of a step counts."""
    found = {line["step"]: line for line in lines}
    return [found[step] for step in sorted(found)]


def _thin(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(lines[:: max(1, len(lines) // POINTS)])
