"""Small plots, one for each bank and probe, measure, or source, that stay readable on a phone: no legend, no title, no text from data inside.

The page sets headings and keys around them, in its own type.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import matplotlib.dates
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

from streamlearn.report.past import bounds
from streamlearn.report.plots import BLUE, GREEN, INK, ORANGE, RED, SOFT, STYLE, smooth, svg

SIZE, WIDE = (4.0, 2.4), (4.7, 2.7)  # inches at 72 to the page's pixel and a third
SERIES = (BLUE, ORANGE, GREEN, INK)  # banks; more are not told apart
COLOUR_NAMES = ("--blue", "--orange", "--green", "--ink")  # the same, for the page's keys
BARS = 60  # points, above which intervals are drawn as a band
Point = tuple[float, float]
Lines = Sequence[Mapping[str, Any]]
Marks = tuple[Sequence[float], Sequence[tuple[float, str]]]


def _open(size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axis


def _steps(axis: Axes) -> None:
    axis.set_xlabel("step")
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def probe(
    entries: Lines, name: str, marks: Mapping[int, str], *, baselines: Mapping[str, float], changes: Sequence[tuple[float, str]]
) -> str:
    """One probe on one bank, in percent, with its 95 % intervals.

    `marks`: step -> channels that point there; `baselines`: `--` or `:` -> accuracy; `changes`: steps at which a generation begins, and its name.
    """
    with plt.rc_context(STYLE):
        figure, axis = _open()
        x = [e["step"] for e in entries]
        y = np.array([100 * float(e[name]) for e in entries])
        _intervals(axis, entries, name)
        axis.plot(x, y, color=BLUE, linewidth=1.8, marker="o" if len(x) <= BARS else "", markersize=3.5)
        for style, value in baselines.items():
            axis.axhline(100 * value, color=ORANGE, linestyle=style, linewidth=1.4)
        for e, at in zip(entries, y, strict=True):
            if e["step"] in marks:
                axis.plot([e["step"]], [at], "D", color=GREEN, markersize=7, markeredgecolor="white", zorder=5)
                axis.annotate(
                    marks[e["step"]], (e["step"], at), (0, -9), textcoords="offset points", ha=_side(x, e["step"]), va="top", fontsize=8.5,
                    bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8},
                )  # fmt: skip
        axis.margins(x=0.06, y=0.22)
        axis.set_ylim(max(0.0, axis.get_ylim()[0]), min(102.0, axis.get_ylim()[1]))
        _uprights(axis, changes)
        axis.set_ylabel("%")
        _steps(axis)
        return svg(figure, tight=False)


def _side(x: Sequence[int], at: int) -> str:
    """Text at the margins stays inside."""
    share = (at - x[0]) / max(1, x[-1] - x[0])
    return "left" if share < 0.2 and len(x) > 1 else "right" if share > 0.8 else "center"


def _intervals(axis: Axes, entries: Lines, name: str) -> None:
    rows = [(e["step"], 100 * held[0], 100 * held[1]) for e in entries if (held := bounds(e, name)) is not None]
    if not rows:
        return
    x, bottom, top = np.array(rows).T
    if len(rows) > BARS:
        axis.fill_between(x, bottom, top, color=BLUE, alpha=0.2, linewidth=0)
    else:
        axis.vlines(x, bottom, top, color=BLUE, alpha=0.45, linewidth=2.5)


def _uprights(axis: Axes, changes: Sequence[tuple[float, str]]) -> None:
    """What changed at which step, written above the plot where there is room for it; called when the axis has its range."""
    low, high = axis.get_xlim()
    free = low
    for at, what in sorted(changes):
        axis.axvline(at, color=SOFT, linewidth=0.9, linestyle=(0, (4, 2)))
        if at >= free:
            axis.annotate(
                what, (at, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8, color=SOFT, ha="center"
            )
            free = at + (high - low) * 0.028 * (len(what) + 1)


def measure(series: Sequence[Sequence[Point]], limit: tuple[str, float] | None, *, steps: bool = True) -> str:
    """One label-free measure of each bank over steps; the side of `limit` that is an alarm is tinted, and points there are red."""
    with plt.rc_context(STYLE):
        figure, axis = _open()
        for i, points in enumerate(series):
            if not points:
                continue
            x, y = zip(*points, strict=True)
            axis.plot(x, y, color=SERIES[i % len(SERIES)], linewidth=1.8, marker="o" if len(x) <= BARS else "", markersize=3.5)
        if limit is not None:
            _alarm(axis, [p for points in series for p in points], *limit)
        axis.margins(x=0.06)
        if steps:
            _steps(axis)
        return svg(figure, tight=False)


def _alarm(axis: Axes, points: Sequence[Point], side: str, limit: float) -> None:
    values = [y for _, y in points] + [limit]
    room = 0.12 * (max(values) - min(values) or abs(limit) or 1.0)
    low, high = min(values) - room, max(values) + room
    if min(values) >= 0:
        low = max(0.0, low)  # a rank has nothing below
    axis.set_ylim(low, high)
    axis.axhline(limit, color=RED, linewidth=1.2, linestyle=":")
    axis.axhspan(*((low, limit) if side == "below" else (limit, high)), color=RED, alpha=0.09, linewidth=0)
    beyond = [(x, y) for x, y in points if (y < limit if side == "below" else y > limit)]
    if beyond:
        axis.plot(*zip(*beyond, strict=True), "o", color=RED, markersize=5.5, zorder=5)


def curve(points: Sequence[Point], unit: str, marks: Marks, *, smoothed: bool = False, zero: bool = False) -> str:
    """A curve of the learner's history; `marks`: steps of halvings, and what else changed at which step."""
    halved, changes = marks
    with plt.rc_context(STYLE):
        figure, axis = _open(WIDE)
        if points:
            x, y = zip(*points, strict=True)
            if smoothed:
                axis.plot(x, y, color=BLUE, alpha=0.3, linewidth=1)
                axis.plot(x, smooth(y, 1 - 1 / max(3.0, len(y) / 40)), color=BLUE, linewidth=2)
            else:
                axis.plot(x, y, color=BLUE, linewidth=2)
        for step in halved:
            axis.axvline(step, color=RED, linestyle=":", linewidth=1.3)
        _uprights(axis, changes)
        axis.set_ylabel(unit)
        if zero:
            axis.set_ylim(bottom=0)
        _steps(axis)
        return svg(figure, tight=False)


def stacked(layers: Sequence[Sequence[Point]], unit: str) -> str:
    """Areas on top of each other over steps, all with the same x."""
    with plt.rc_context(STYLE):
        figure, axis = _open(WIDE)
        if layers and layers[0]:
            axis.stackplot(
                [x for x, _ in layers[0]], [[y for _, y in layer] for layer in layers], colors=(BLUE, ORANGE), alpha=0.75, linewidth=0
            )
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _steps(axis)
        return svg(figure, tight=False)


def over_time(
    times: Sequence[datetime], values: Sequence[float], unit: str, *, thresholds: Sequence[float] = (), size: tuple[float, float] = WIDE
) -> str:
    """Values at times in UTC; with `thresholds`, one a value, what exceeds its own is red."""
    at = np.array([t.astimezone(UTC).replace(tzinfo=None) for t in times], "datetime64[ms]")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        axis.plot(at, values, color=BLUE, linewidth=1.8, marker="o" if thresholds and len(times) <= BARS else "", markersize=3.5)
        if thresholds:
            axis.plot(at, thresholds, color=RED, linestyle=":", linewidth=1.3)
            beyond = [i for i, (v, t) in enumerate(zip(values, thresholds, strict=True)) if v > t]
            axis.plot(at[beyond], [values[i] for i in beyond], "o", color=RED, markersize=5.5, zorder=5)
        axis.xaxis.set_major_locator(locator := matplotlib.dates.AutoDateLocator(minticks=3, maxticks=5))  # type: ignore[no-untyped-call]
        axis.xaxis.set_major_formatter(matplotlib.dates.ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
        plain = ScalarFormatter(useOffset=False) if thresholds else StrMethodFormatter("{x:,.0f}")
        axis.yaxis.set_major_formatter(plain)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(unit)
        axis.set_xlabel("UTC")
        return svg(figure, tight=False)
