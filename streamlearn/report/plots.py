"""Plots as inline SVG: how they look, and the curve of the served page; the report's panels are in panels.py."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
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


def probes(entries: Lines) -> str:
    """Accuracy of each snapshot on one bank, against untrained networks and raw pixels."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 4))
        steps, last = [e["step"] for e in entries], entries[-1]
        axis.plot(steps, [100 * e["knn"] for e in entries], "o-", color=BLUE, label="k-NN", linewidth=2, markersize=4)
        axis.plot(steps, [100 * e["ridge"] for e in entries], "s-", color=GREEN, label="ridge", linewidth=2, markersize=4)
        for name, label, style in (("random", "untrained network", "--"), ("raw", "raw pixels", ":")):
            axis.axhline(100 * last[f"{name}_knn"], color=BLUE, linestyle=style, linewidth=1.2, label=f"{label}, k-NN")
            axis.axhline(100 * last[f"{name}_ridge"], color=GREEN, linestyle=style, linewidth=1.2, label=f"{label}, ridge")
        axis.set_xlabel("step")
        axis.set_ylabel("accuracy (%)")
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        return svg(figure)


def smooth(values: Sequence[float], keep: float = 0.7) -> list[float]:
    """Exponential average, without the lag of its start."""
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(total / weight)
    return found


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
