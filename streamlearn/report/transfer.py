"""Does it forget?  The matrix of generations as a heat map, and what it comes to in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from streamlearn.report.parts import esc, missing, percent, section, table
from streamlearn.report.past import Line, figure, spread
from streamlearn.report.probing import PROBES
from streamlearn.report.told import Told

SNAPSHOTS = 10  # rows of the other heat map
# measure -> what a person may read off it; {x}: points, without sign
WORDS = {
    "in_domain": ("At home", "the last snapshot of a generation is right on its own generation's bank in", "{x}"),
    "backward": ("On the past", "on banks of earlier generations, a later snapshot is right in", "{x}"),
    "forward": ("On the future", "on banks of generations it had not seen, a snapshot is right in", "{x}"),
    "forgetting": ("Forgetting", "on older banks the newest snapshot is below the best that any generation's did by", "{x} points"),
    "backward_transfer": ("Backward transfer", "since an older generation was learnt, the figure on its bank has moved by", "{x} points"),
    "forward_transfer": ("Forward transfer", "before a generation is learnt, its bank is ahead of an untrained network by", "{x} points"),
}
SHARES = ("in_domain", "backward", "forward")


def transfer(told: Told) -> str:
    title = "Does it forget?"
    if told.continual.why:
        return section(
            "transfer", title, missing(esc(told.continual.why), "The evaluator writes it anew with its next result, and when it starts.")
        )
    whole = told.continual.value.get("probes", {})
    parts = [part for name, found in whole.items() if name in ("knn", "ridge", "logistic") and (part := _matrix(name, found))]
    if not parts:
        how = "Name the generation of two or more banks (<code>probe.banks.generation</code>, <code>banks add --generation</code>) for the matrix of generations."
        return section("transfer", title, missing("No bank belongs to a generation yet.", how), _by_snapshot(told))
    note = "Row: the last snapshot of a generation. Column: the bank of a generation. Below the diagonal is the past, above it the future."
    return section("transfer", title, *parts, _by_snapshot(told), note=note)


def _matrix(name: str, found: Mapping[str, Any]) -> str:
    order: Sequence[str] = found["generations"]
    if not order:
        return ""
    lines = [*found["matrix"], found["untrained"]]
    values = [x for line in lines for x in line if x is not None]
    rows = []
    for generation, snapshot, line in zip(order, found["snapshots"], found["matrix"], strict=True):
        step = f"<span class=soft> step {snapshot['step']:,}</span>" if snapshot else "<span class=soft> none yet</span>"
        own = order.index(generation)
        rows.append(_heat(esc(generation) + step, line, values, own))
    rows.append(_heat("untrained network", found["untrained"], values, -1))
    head = ("last snapshot of ↓ on the bank of →", *(esc(g) for g in order))
    probe = PROBES.get(name, esc(name))
    told = "".join(f"<li>{words}" for measure in WORDS if (words := _words(measure, found)))
    heat = table(head, rows, caption=f"{probe}, percent right; outlined: at home", kind="heat")
    return f"<h3>{probe}</h3>{heat}<ul>{told}</ul>" if told else f"<h3>{probe}</h3>{heat}"


def _heat(first: str, line: Sequence[float | None], values: Sequence[float], own: int) -> str:
    """One row; the deeper the tint the higher the figure, from the lowest to the highest of the table."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    cells = []
    for i, x in enumerate(line):
        if x is None:
            cells.append("<td class=soft>–")
            continue
        share = 0.06 + 0.54 * (x - low) / ((high - low) or 1.0)
        edge = ";outline:2px solid var(--ink);outline-offset:-2px" if i == own else ""
        cells.append(f"<td style='background:rgba(var(--tint),{share:.2f}){edge}'>{100 * x:.1f}")
    return f"<tr><th scope=row>{first}{''.join(cells)}"


def _words(measure: str, found: Mapping[str, Any]) -> str:
    value = found["measures"].get(measure)
    if value is None:
        return ""
    title, words, form = WORDS[measure]
    between = found["intervals"].get(measure)
    if measure in SHARES:
        shown = percent(value)
        bars = f" (95 %: {100 * between[0]:.1f} to {100 * between[1]:.1f})" if between else ""
    else:
        sign = "" if measure == "forgetting" else "+"
        shown = form.format(x=f"{100 * value:{sign}.1f}")
        bars = f" (95 %: {100 * between[0]:{sign}.1f} to {100 * between[1]:{sign}.1f})" if between else ""
    return f"<b>{title}:</b> {words} <b>{shown}</b>{bars}{_verdict(measure, value, between)}"


def _verdict(measure: str, value: float, between: Sequence[float] | None) -> str:
    """Only what the interval bears out."""
    if measure != "backward_transfer" or not between:
        return ""
    if between[1] < 0:
        return ": <span class=bad>it forgets</span>"
    return ": <span class=win>what came later helped</span>" if between[0] > 0 else ": no change that this many images can tell"


def _by_snapshot(told: Told) -> str:
    """Rows of snapshots, columns of banks: k-NN; where there are two or more of both."""
    steps: dict[int, dict[str, Line]] = {}
    for e in told.entries:
        if figure(e, "knn") is not None:
            steps.setdefault(e["step"], {})[e["bank"]] = e
    banks = list(told.banks)
    if len(steps) < 2 or len(banks) < 2:
        return ""
    shown = spread([{"step": s} for s in sorted(steps)], SNAPSHOTS)
    lines = [[_score(steps[s["step"]].get(bank)) for bank in banks] for s in shown]
    values = [x for line in lines for x in line if x is not None]
    rows = [_heat(f"step {s['step']:,}", line, values, -1) for s, line in zip(shown, lines, strict=True)]
    return "<h3>Snapshots on all banks</h3>" + table(
        ("snapshot ↓ on bank →", *map(esc, banks)), rows, caption="k-NN, percent right", kind="heat"
    )


def _score(entry: Line | None) -> float | None:
    return None if entry is None else figure(entry, "knn")
