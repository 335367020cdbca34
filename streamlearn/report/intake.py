"""What comes in: how much, what became of it, how fresh all is, and whether the sources have changed."""

import itertools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from streamlearn.report import panels
from streamlearn.report.parts import clock, drawing, esc, grid, key, long, missing, percent, row, section, table
from streamlearn.report.past import Line, figure, moment, spread
from streamlearn.report.told import Told

OUTCOMES = 30  # rows
SOURCES = 12
WINDOWS = 120  # of a source


def intake(told: Told) -> str:
    title = "What came in"
    points: list[Line] = told.fetched.points
    if not points:
        how = "<code>streamlearn status</code> says whether a connector has found candidates, and what the fetcher waits for."
        return section("intake", title, missing("Nothing fetched yet.", how))
    times = [t for p in points if (t := moment(p["at"]))]
    total = panels.over_time(times, [p["total"] for p in points], "images stored")
    drawn = [
        drawing(
            "Images stored",
            total,
            f"Images stored, {points[-1]['total']:,} by {points[-1]['at']}",
            f"{points[-1]['total']:,} by {clock(points[-1]['at'])}",
        )
    ]
    rates = _rates(points)
    if len(rates) > 1:
        svg = panels.over_time([t for t, _ in rates], [r for _, r in rates], "images a minute")
        drawn.append(drawing("Rate", svg, f"Images stored a minute, now {rates[-1][1]:,.0f}", f"now {rates[-1][1]:,.0f} a minute"))
    return section("intake", title, grid(drawn, wide=True), _outcomes(told), _sources(told))


def _rates(points: Sequence[Line]) -> list[tuple[datetime, float]]:
    """Images a minute between some of the points: few enough that each is a mean over several shards."""
    some = spread(points, 60)
    found = []
    for one, other in itertools.pairwise(some):
        before, after = moment(one["at"]), moment(other["at"])
        if before and after and after > before:
            found.append((after, 60 * (other["total"] - one["total"]) / (after - before).total_seconds()))
    return found


def _outcomes(told: Told) -> str:
    counts = told.fetched.outcomes
    every = sum(counts.values())
    if not every:
        return ""
    rows = []
    for name, count in counts.most_common(OUTCOMES):
        bar = f"<i class='bar{'' if name == 'stored' else ' no'}' style='width:{max(0.5, 100 * count / every):.1f}%'></i>"
        rows.append(f"<tr><th scope=row>{esc(name.replace(':', ': '))}<td>{count:,}<td>{percent(count / every)}<td class=wide>{bar}")
    left = f", the {OUTCOMES} most frequent of {len(counts)} outcomes" if len(counts) > OUTCOMES else ""
    return "<h3>What became of the candidates</h3>" + table(
        ("outcome", "candidates", "share", ""), rows, caption=f"{every:,} candidates{left}", kind="bars"
    )


def _sources(told: Told) -> str:
    connectors = told.told("connect", "connectors")
    if not isinstance(connectors, dict) or not connectors:
        return ""
    rows = []
    for name, c in sorted(connectors.items())[:SOURCES]:
        why = str(c.get("trace") or c.get("retrying") or "").strip().splitlines()[-1:] or [""]
        rows.append(row(esc(name), (esc(str(c.get("state", "?")).lower()), f"{c.get('candidates') or 0:,}", esc(why[0][:90]))))
    return "<h3>Sources</h3>" + table(("source", "state", "candidates", "says"), rows)


def freshness(told: Told) -> str:
    """How old the newest of everything is."""
    told_of = told.told
    stream, checkpoint = told_of("train", "stream") or {}, told_of("train", "last_checkpoint") or {}
    marks = [
        ("image stored", told_of("fetch", "last_shard_at"), f"{told_of('fetch', 'lag') or 0:,} candidates wait to be fetched"),
        ("step", (told.learnt.lines or [{}])[-1].get("at"), _ahead(stream)),
        ("checkpoint", checkpoint.get("at"), f"step {checkpoint['step']}" if checkpoint else "none yet since its start"),
        (
            "snapshot",
            (told_of("train", "last_snapshot") or {}).get("at"),
            str((told_of("train", "last_snapshot") or {}).get("tag", "none yet")),
        ),
        ("measurement", (told.entries or [{}])[-1].get("at"), f"{told_of('evaluate', 'pending') or 0} snapshots wait to be measured"),
    ]
    rows = [row(what, (_age(told, at), esc(said))) for what, at, said in marks]
    return section("freshness", "How fresh is it?", table(("newest", "age", ""), rows, kind="wrap"), note=_unseen(stream))


def _age(told: Told, at: object) -> str:
    then = moment(at)
    return "–" if then is None else long((told.now - then).total_seconds())


def _ahead(stream: Mapping[str, Any]) -> str:
    ahead = stream.get("shards_ahead")
    return "" if ahead is None else f"{ahead} stored shards not learnt yet"


def _unseen(stream: Mapping[str, Any]) -> str:
    lost = stream.get("expired_unseen") or 0
    return f"{lost:,} images expired before they were learnt: the learner is slower than the stream." if lost else ""


def drift(told: Told) -> str:
    title = "Have the sources changed?"
    if told.drift.why:
        return section("drift", title, missing(esc(told.drift.why), "Delete it: every source gets a new reference."))
    window = told.config.probe.drift_window
    if not window:
        return section("drift", title, missing("Drift is not watched.", "<code>probe.drift_window</code> is 0; 4096 switches it on."))
    sources = told.drift.value.get("sources", {})
    drawn = [_source(name, rows) for name, source in sorted(sources.items()) if (rows := _windows(source))]
    states = [_state(name, source, window) for name, source in sorted(sources.items())[:SOURCES]]
    if not states:
        how = (
            f"A source is looked at when {window:,} of its images are stored (<code>probe.drift_window</code>) and a snapshot is published."
        )
        return section("drift", title, missing("No window has been measured yet.", how))
    head = ("source", "newest window", "distance", "threshold", "windows", "drifted", "images waiting")
    note = (
        f"Fréchet distance (64 components) of the newest {window:,} images of each source to its first. Beyond the threshold, which "
        f"{told.config.probe.drift_false_alarm:.0%} of the windows of an unchanged source exceed, they differ."
    )
    marks = [("var(--blue)", "", "distance"), ("var(--red)", "dots", "threshold, by bootstrap"), ("var(--red)", "●", "drift")]
    return section("drift", title, key(marks) + grid(drawn[:SOURCES]) if drawn else "", table(head, states), note=note)


def _windows(source: Mapping[str, Any]) -> list[Line]:
    held = source.get("windows")
    rows = [w for w in held if _whole(w)] if isinstance(held, list) else []
    return spread(rows, WINDOWS, lambda w: w.get("found") == "drift")


def _whole(window: Any) -> bool:
    return (
        isinstance(window, dict)
        and moment(window.get("at")) is not None
        and all(figure(window, key) is not None for key in ("distance", "threshold"))
    )


def _source(name: str, rows: Sequence[Line]) -> str:
    last = rows[-1]
    svg = panels.over_time(
        [t for w in rows if (t := moment(w["at"]))],
        [w["distance"] for w in rows],
        "Fréchet-64",
        thresholds=[w["threshold"] for w in rows],
        size=panels.SIZE,
    )
    said = f"now {last['distance']:.3g}, without drift at most {last['threshold']:.3g}"
    return drawing(esc(name), svg, f"Drift of {name} over {len(rows)} windows: {said}", said)


def _state(name: str, source: Mapping[str, Any], window: int) -> str:
    windows = [w for w in source.get("windows", []) if isinstance(w, dict)]
    last = windows[-1] if windows else {}
    drifted = sum(w.get("found") == "drift" for w in windows)
    found = str(last.get("found", "none yet"))
    figures = ["–" if (x := figure(last, k)) is None else f"{x:.3g}" for k in ("distance", "threshold")]
    shown = f"<span class=bad>{esc(found)}</span>" if found == "drift" else esc(found)
    when = f" <span class=soft>{clock(last['at'])}</span>" if "at" in last else ""
    waiting = source.get("waiting", [])
    return row(esc(name), (shown + when, *figures, f"{len(windows):,}", f"{drifted:,}", f"{len(waiting):,} of {window:,}"))


def drifting(told: Told) -> list[str]:
    """Sources whose newest window has drifted; HTML."""
    found = []
    for name, source in sorted(told.drift.value.get("sources", {}).items()):
        rows = _windows(source)
        if rows and rows[-1].get("found") == "drift":
            found.append(
                f"<b>Drift:</b> source {esc(name)}: Fréchet-64 {rows[-1]['distance']:.3g}, without drift at most {rows[-1]['threshold']:.3g}"
            )
    return found
