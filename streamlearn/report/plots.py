"""Plots of the report, as inline SVG."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, BLUE, ORANGE, GREEN, RED = "#222831", "#9aa4b2", "#1f6feb", "#e8590c", "#2b8a3e", "#c92a2a"
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#e6e9ee", "figure.facecolor": "white",
    "axes.axisbelow": True, "svg.hashsalt": "streamlearn", "legend.frameon": False, "text.color": INK,
    "svg.fonttype": "none", "text.parse_math": False,  # text stays text: it can be read aloud, found, and holds no formula of a stranger's
}  # fmt: skip
# what a page may set as it likes (in the dark, for one); where it does not, the drawing has its own
COLOURS = {
    INK: "--ink", SOFT: "--soft", BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", RED: "--red", "#e6e9ee": "--grid", "#ffffff": "--card",
}  # fmt: skip
Lines = Sequence[dict[str, Any]]


def loss(train: Lines, halvings: Lines) -> str:
    """Loss over steps, with the learning rate below and its halvings marked."""
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.6), sharex=True, height_ratios=(3, 1))
        points = [(line["step"], line["loss"]) for line in train if line.get("loss") is not None]
        if points:
            steps, values = [p[0] for p in points], [p[1] for p in points]
            top.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1)
            top.plot(steps, smooth(values), color=BLUE, linewidth=2)
        bottom.plot([line["step"] for line in train], [line["lr"] for line in train], color=ORANGE, linewidth=2)
        for line in halvings:
            for axis in (top, bottom):
                axis.axvline(line["step"], color=RED, linestyle=":", linewidth=1.2)
        top.set_ylabel("loss on fresh images (nats)")
        bottom.set_ylabel("learning rate")
        bottom.set_xlabel("step")
        bottom.set_ylim(bottom=0)
        return svg(figure)


def probes(entries: Lines, quarters: Lines) -> str:
    """Accuracy of each snapshot on one bank, against untrained networks and raw pixels."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 4))
        steps, last = [e["step"] for e in entries], entries[-1]
        axis.plot(steps, [100 * e["knn"] for e in entries], "o-", color=BLUE, label="k-NN", linewidth=2, markersize=4)
        axis.plot(steps, [100 * e["ridge"] for e in entries], "s-", color=GREEN, label="ridge", linewidth=2, markersize=4)
        for name, label, style in (("random", "untrained network", "--"), ("raw", "raw pixels", ":")):
            axis.axhline(100 * last[f"{name}_knn"], color=BLUE, linestyle=style, linewidth=1.2, label=f"{label}, k-NN")
            axis.axhline(100 * last[f"{name}_ridge"], color=GREEN, linestyle=style, linewidth=1.2, label=f"{label}, ridge")
        for line in quarters:
            axis.axvline(line["step"], color=SOFT, linewidth=1)
            axis.annotate(
                f"quarter {line['quarter']}",
                (line["step"], 1),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                color=SOFT,
                rotation=90,
                va="top",
                ha="right",
            )
        axis.set_xlabel("step")
        axis.set_ylabel("accuracy (%)")
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        return svg(figure)


def ranks(entries: Lines) -> str:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3))
        steps = [e["step"] for e in entries]
        axis.plot(steps, [e["effective_rank"] for e in entries], "o-", color=BLUE, label="effective rank", markersize=4)
        axis.plot(steps, [e["rankme"] for e in entries], "s-", color=ORANGE, label="RankMe", markersize=4)
        finish(axis, "step", "of the features on the bank")
        return svg(figure)


def codes(train: Lines) -> str:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3))
        steps = [line["step"] for line in train]
        axis.plot(steps, [line["code_entropy"] for line in train], color=BLUE, label="code entropy / ln K (1: collapse)")
        axis.plot(steps, [line["perplexity"] for line in train], color=ORANGE, label="prototype perplexity / K (0: collapse)")
        axis.set_ylim(0, 1.02)
        finish(axis, "step", "")
        return svg(figure)


def intake(fetch: Lines, since: float) -> str:
    """Images stored over time; each entry has `seconds` and `total`."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3))
        axis.plot(
            [(line["seconds"] - since) / 60 for line in fetch],
            [line["total"] for line in fetch],
            color=BLUE,
            linewidth=2,
            drawstyle="steps-post",
        )
        finish(axis, "minutes", "images stored", legend=False)
        return svg(figure)


def smooth(values: Sequence[float], keep: float = 0.7) -> list[float]:
    """Exponential average, without the lag of its start."""
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(total / weight)
    return found


def finish(axis: Axes, x: str, y: str, *, legend: bool = True) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)
    if legend:
        axis.legend(fontsize=8)


def svg(figure: Figure, *, tight: bool = True) -> str:
    """Inline SVG without the XML header; scales with the page.  `tight`: cut to what is drawn, else of the figure's own size."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight" if tight else None, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    drawing = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, text[text.index("<svg") :])
    return re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)  # it names addresses that nobody needs


def _variable(found: re.Match[str]) -> str:
    name = COLOURS.get(found[2])
    return f"{found[1]}: var({name}, {found[2]})" if name else found[0]
