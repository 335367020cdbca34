"""What published snapshots are good for: probe curves, and the table of snapshots."""

from collections.abc import Sequence

from streamlearn.report import panels
from streamlearn.report.learning import generations
from streamlearn.report.parts import clock, drawing, esc, grid, key, missing, percent, row, section, table
from streamlearn.report.past import Line, bounds, figure, spread
from streamlearn.report.told import Told

PROBES = {
    "knn": "k-NN",
    "ridge": "ridge",
    "logistic": "logistic",
    "low_shot_1": "logistic, 1 % of the labels",
    "low_shot_10": "logistic, 10 % of the labels",
    "finetune_bit": "fine-tuned (BiT)",
    "finetune_seer": "fine-tuned (SEER)",
}
SHOWN = 160  # snapshots of a curve, besides those that channels name
PANELS = 24
ROWS = 40  # of the table of snapshots


def probing(told: Told) -> str:
    title = "Is it getting better?"
    if not told.entries:
        return section("probes", title, missing("No snapshot has been measured yet.", _how(told)))
    wanted = [(bank, name, rows) for bank, lines in told.banks.items() for name in PROBES if (rows := _with(lines, name))]
    drawn: dict[str, list[str]] = {}
    for bank, name, rows in wanted[:PANELS]:
        drawn.setdefault(bank, []).append(_panel(told, bank, name, rows))
    left = len(wanted) - PANELS
    more = f"<p class=soft>And {left} more: <code>streamlearn probe matrix --json</code> has all.</p>" if left > 0 else ""
    note = "Frozen features of every published snapshot, measured on labelled images it never learnt from; the upright bars are 95 % intervals."
    marks = [
        ("var(--blue)", "", "snapshots"),
        ("var(--orange)", "dash", "untrained networks"),
        ("var(--orange)", "dots", "raw pixels"),
        ("var(--soft)", "dash", "a generation begins"),
        *([("var(--green)", "◆", ", ".join(map(esc, told.channels)))] if told.channels else []),
    ]
    return section("probes", title, key(marks), *(f"<h3>{esc(bank)}</h3>{grid(plots)}" for bank, plots in drawn.items()), more, note=note)


def _how(told: Told) -> str:
    if not told.config.probe.banks and not told.told("evaluate", "banks"):
        return "No bank is registered: <code>streamlearn banks add NAME --train …</code> registers one (docs/probes.md)."
    step = told.config.train.snapshot_steps
    return f"The first snapshot is published at step {step:,} (<code>train.snapshot_steps</code>); the role <code>evaluate</code> then measures it."


def _with(lines: Sequence[Line], name: str) -> list[Line]:
    return [e for e in lines if figure(e, name) is not None]


def _panel(told: Told, bank: str, name: str, rows: list[Line]) -> str:
    marks = {e["step"]: ", ".join(tags) for e in rows if (tags := told.tags(str(e.get("digest", ""))))}
    shown = spread(rows, SHOWN, lambda e: e["step"] in marks)
    last = rows[-1]
    base = {style: value for style, key in (("--", f"random_{name}"), (":", f"raw_{name}")) if (value := _known(rows, key)) is not None}
    first, final = rows[0]["step"], last["step"]
    changes = [(step, what) for step, what in generations(told) if first < step <= final]
    said = f"{percent(last[name])}{_interval(last, name)} at step {final:,}"
    best = max(rows, key=lambda e: float(e[name]))
    if best[name] > last[name]:
        said += f"; best {percent(best[name])} at step {best['step']:,}"
    against = "".join(f"; {word} {percent(base[style])}" for style, word in (("--", "untrained"), (":", "raw pixels")) if style in base)
    alt = f"{PROBES[name]} on {bank}: {len(rows)} snapshots, first {percent(rows[0][name])}, {said}{against}"
    caption = f"{PROBES[name]}{_metric(last)}"
    return drawing(caption, panels.probe(shown, name, marks, baselines=base, changes=changes), alt, esc(said + against))


def _metric(entry: Line) -> str:
    return " (mAP)" if entry.get("metric") == "map" else ""


def _interval(entry: Line, name: str) -> str:
    held = bounds(entry, name)
    if held is None:
        return ""
    draws = ", one deviation of the draws" if f"{name}_low" not in entry else ""
    return f" ({100 * held[0]:.1f} to {100 * held[1]:.1f}{draws})"


def _known(rows: Sequence[Line], name: str) -> float | None:
    """The newest that is there."""
    return next((value for e in reversed(rows) if (value := figure(e, name)) is not None), None)


def tiles(told: Told) -> list[tuple[str, str]]:
    """The best k-NN, and what it is worth."""
    best = max((e for e in told.entries if figure(e, "knn") is not None), key=lambda e: float(e["knn"]), default=None)
    if best is None:
        return []
    found = [(percent(best["knn"]), f"best k-NN ({esc(best['bank'])}, step {best['step']:,})")]
    random, raw = (_known(told.banks[best["bank"]], name) for name in ("random_knn", "raw_knn"))
    if random is not None and raw is not None:
        found[0] = (found[0][0], f"{found[0][1]}; untrained {percent(random)}, raw pixels {percent(raw)}")
        found.append((f"{best['knn'] / max(random, raw, 1e-9):.2f} ×", "of the better of the two baselines"))
    return found


def snapshots(told: Told) -> str:
    title = "Snapshots"
    if not told.entries:
        return section("snapshots", title, missing("None measured yet.", _how(told)))
    tagged = [e for e in told.entries[:-ROWS] if told.tags(str(e.get("digest", "")))]
    rows = [_row(told, e) for e in [*tagged[-ROWS:], *told.entries[-ROWS:]]]
    head = ("snapshot", "bank", "step", "k-NN", "untrained", "raw pixels", "ridge", "eff. rank", "measured (UTC)")
    left = len(told.entries) - len(rows)
    note = f"The newest {len(rows)} and those that channels name; {left:,} older ones are in the registry." if left else ""
    return section("snapshots", title, table(head, rows, caption="Green: above both baselines."), note=note)


def _row(told: Told, e: Line) -> str:
    digest = str(e.get("digest", ""))
    marks = "".join(f"<span class=tag>{esc(tag)}</span>" for tag in told.tags(digest))
    values = [figure(e, name) for name in ("knn", "random_knn", "raw_knn", "ridge")]
    knn, floor = values[0], [v for v in values[1:3] if v is not None]
    rank = figure(e, "effective_rank")
    cells = [esc(e["bank"]), f"{e['step']:,}", *map(percent, values), "–" if rank is None else f"{rank:.1f}", clock(e.get("at", "–"))]
    better = knn is not None and bool(floor) and knn > max(floor)
    return row(f"<code>{esc(e.get('tag', ''))}</code> <code class=soft>{esc(digest[7:19])}</code>{marks}", cells, "win" if better else "")
