"""How learning goes: the loss on images before they are learnt, the rate, what was learnt; and whether it has collapsed."""

from streamlearn.probes.alarms import ALARMS
from streamlearn.report import panels
from streamlearn.report.parts import drawing, esc, grid, key, missing, section
from streamlearn.report.past import POINTS, Line, figure, spread
from streamlearn.report.told import Told

# measure -> its name, and how to read it
MEASURES = {
    "effective_rank": ("effective rank", "how many directions the features fill"),
    "rankme": ("RankMe", "the same, by singular values"),
    "participation_ratio": ("participation ratio", "the same, by the largest few"),
    "alpha_req": ("α-ReQ", "how fast directions fade; about 1 is good"),
    "uniformity": ("uniformity", "0: all in one place"),
    "lidar": ("LiDAR", "directions that tell images apart"),
    "alignment": ("alignment", "of views; read it with uniformity"),
    "code_entropy": ("code entropy / ln K", "1: the codes say nothing"),
    "prototype_perplexity": ("prototype perplexity / K", "0: one prototype takes all"),
}


def learning(told: Told) -> str:
    title = "Loss and learning rate"
    lines = told.learnt.lines
    if not lines:
        return section(
            "loss",
            title,
            missing(
                "Nothing learnt yet.", "The learner writes a line every ten steps; <code>streamlearn status</code> says what it waits for."
            ),
        )
    events = _marks(told)
    loss = [(x["step"], y) for x in lines if (y := figure(x, "loss")) is not None]
    rate = [(x["step"], x["lr"]) for x in lines]
    norm = [(x["step"], y) for x in lines if (y := figure(x, "grad_norm")) is not None]
    span = f"steps {lines[0]['step']:,} to {lines[-1]['step']:,}"
    drawn = [
        drawing("Prequential loss", panels.curve(loss, "nats", events, smoothed=True), f"Loss over {span}, {_from_to(loss)}", _now(loss)),
        drawing(
            "Learning rate", panels.curve(rate, "rate", events, zero=True), f"Learning rate over {span}, {_from_to(rate)}", _halvings(told)
        ),
        drawing("Images learnt", panels.stacked(_images(lines), "images"), f"Images learnt over {span}", _mix(lines)),
    ]
    if norm:
        drawn.append(
            drawing(
                "Gradient norm",
                panels.curve(norm, "norm", events, smoothed=True, zero=True),
                f"Gradient norm over {span}, {_from_to(norm)}",
            )
        )
    note = "The loss is taken on fresh images before they are learnt (test, then train), so it cannot be had by heart. Faint: as told; bold: smoothed."
    marks = [
        ("var(--red)", "dots", "a plateau was proved and the rate halved"),
        ("var(--soft)", "dash", "a new quarter or generation, a warm start"),
    ]
    return section("loss", title, key(marks), grid(drawn, wide=True), _bad(told), note=note)


def _marks(told: Told) -> panels.Marks:
    """Steps of halvings; and where the data, or where the weights came from, changed."""
    first = told.learnt.lines[0]["step"]
    halved = [e["step"] for e in told.learnt.events.get("halved", [])[-40:]]
    warm = [(e["step"], "warm start") for e in told.learnt.events.get("warm_start", [])[-3:]]
    return halved, [*warm, *((step, name) for step, name in generations(told) if step > first)]


def generations(told: Told) -> list[tuple[float, str]]:
    """At which step each generation begins, by the snapshots' own; the demo says its quarters itself."""
    if told.quarters:
        return told.quarters
    found: list[tuple[float, str]] = []
    known: set[str] = set()
    for entry in told.entries:
        name = entry.get("generation")
        if isinstance(name, str) and name and name not in known:
            known.add(name)
            found.append((entry["step"], name))
    return found[-12:] if len(found) > 1 else []


def _now(points: list[tuple[float, float]]) -> str:
    end = max(1, min(10, len(points) // 5))  # of a short run no more than its end: else "now" is the whole of it
    last = [y for _, y in points[-end:]]
    return f"now {sum(last) / len(last):.3f} nats, {points[0][1]:.3f} at first" if last else ""


def _halvings(told: Told) -> str:
    count = told.learnt.counts["halved"]
    last = told.learnt.events["halved"][-1]["step"] if count else 0
    return (
        f"halved {count} {'time' if count == 1 else 'times'}, last at step {last:,}"
        if count
        else "constant since the warm-up: no plateau proved yet"
    )


def _images(lines: list[Line]) -> list[list[tuple[float, float]]]:
    rows = [
        (x["step"], fresh, max(0.0, seen - fresh))
        for x in lines
        if (seen := figure(x, "images")) is not None and (fresh := figure(x, "fresh")) is not None
    ]
    return [[(s, fresh) for s, fresh, _ in rows], [(s, again) for s, _, again in rows]]


def _mix(lines: list[Line]) -> str:
    layers = _images(lines)
    if not layers[0]:
        return ""
    fresh, again = layers[0][-1][1], layers[1][-1][1]
    return f"<span style='color:var(--blue)'>■</span> fresh {fresh:,.0f}, <span style='color:var(--orange)'>■</span> replayed {again:,.0f}"


def _bad(told: Told) -> str:
    counts = told.learnt.counts
    said = [
        f"{words}: {counts[name]:,}"
        for name, words in (("bad_step", "Steps skipped as not finite"), ("resumed", "Times resumed"))
        if counts[name]
    ]
    return f"<p class=soft>{'. '.join(said)}.</p>" if said else ""


def _from_to(points: list[tuple[float, float]]) -> str:
    return f"from {points[0][1]:.4g} to {points[-1][1]:.4g}" if points else "no figure"


def collapse(told: Told) -> str:
    """Each label-free measure with its limit."""
    title = "Has it collapsed?"
    banks = {bank: spread(rows, POINTS // 2) for bank, lines in told.banks.items() if (rows := [e for e in lines if "alarms" in e])}
    drawn = [d for name in MEASURES if (d := _measure(name, banks)) is not None]
    drawn += [
        d
        for name, own in (("code_entropy", "code_entropy"), ("prototype_perplexity", "perplexity"))
        if (d := _own(told, name, own)) is not None
    ]
    if not drawn:
        return section(
            "collapse", title, missing("Nothing measured yet.", "These come with the first snapshot that is measured on a bank.")
        )
    colours = [(f"var({panels.COLOUR_NAMES[i % len(panels.COLOUR_NAMES)]})", "", esc(bank)) for i, bank in enumerate(banks)]
    marks = [*colours, ("var(--red)", "dots", "limit; tinted: the side that is an alarm")]
    note = "Measured without labels. They are alarms, never scores: a random network has a high rank too."
    return section("collapse", title, key(marks), _raised(told), grid(drawn), note=note)


def _measure(name: str, banks: dict[str, list[Line]]) -> str | None:
    series = [[(e["step"], y) for e in rows if (y := figure(e, name)) is not None] for rows in banks.values()]
    if name in ("code_entropy", "prototype_perplexity") or not any(series):
        return None  # the learner's own, which it tells every ten steps
    shown = [points for points in series if points]
    return _drawn(name, series, ", ".join(f"{points[-1][1]:.3g}" for points in shown))


def _own(told: Told, name: str, own: str) -> str | None:
    points = [(x["step"], y) for x in told.learnt.lines if (y := figure(x, own)) is not None]
    if not points:
        return None
    return _drawn(name, [points], f"{points[-1][1]:.3f}")


def _drawn(name: str, series: list[list[tuple[float, float]]], now: str) -> str:
    caption, words = MEASURES[name]
    small = f"{words}<br>now {now}; {_limit(name)}"
    return drawing(caption, panels.measure(series, ALARMS.get(name)), f"{caption}, {words}: now {now}; {_limit(name)}", small)


def _limit(name: str) -> str:
    if name not in ALARMS:
        return "no limit"
    side, limit = ALARMS[name]
    return f"alarm {side} {limit:g}"


def _raised(told: Told) -> str:
    """When alarms were raised, of snapshots."""
    raised = [e for e in told.entries if e.get("alarms")]
    if not raised:
        return "<p class=win>No snapshot has raised an alarm.</p>"
    steps = sorted({e["step"] for e in raised})
    return f"<p class=bad>Snapshots that raised alarms: {len(steps):,}, the last at step {steps[-1]:,}.</p>"


def alarms(told: Told) -> list[str]:
    """Of each bank's newest snapshot, in words; HTML."""
    found = []
    for entry in told.newest:
        names = [n for n in entry["alarms"] if n in ALARMS] if isinstance(entry["alarms"], list) else []
        if names:
            said = ", ".join(f"{n.replace('_', ' ')} {figure(entry, n) or 0:.3g} ({_limit(n)})" for n in names)
            found.append(f"<b>Collapse alarm:</b> snapshot {esc(entry.get('tag', entry['step']))} on {esc(entry['bank'])}: {said}")
    return found
