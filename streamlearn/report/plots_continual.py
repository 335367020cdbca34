"""Plots of the evaluator's two files: the transfer matrix as a heat map, snapshots on each generation with error bars, drift of each source."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from streamlearn.report.plots import BLUE, GREEN, INK, ORANGE, RED, SOFT, STYLE, finish, svg


def matrix(found: Mapping[str, Any]) -> str:
    """A[last snapshot of a generation, bank of a generation] in percent; `found` is one of `probes` of continual.json."""
    names = found["generations"]
    A = np.array([[np.nan if x is None else 100 * x for x in line] for line in [*found["matrix"], found["untrained"]]])
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(min(8.0, 2.5 + len(names)), 1.5 + 0.6 * (len(names) + 1)))
        axis.imshow(A, cmap="Blues", aspect="auto", vmin=0, vmax=max(1.0, float(np.nanmax(A, initial=0.0))))
        middle = np.nanmax(A, initial=0.0) / 2
        for (i, j), value in np.ndenumerate(A):
            axis.text(j, i, "–" if np.isnan(value) else f"{value:.1f}", ha="center", va="center", color="white" if value > middle else INK)
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names) + 1), [*names, "untrained"])
        axis.set_xlabel(f"{found['probe']} on the bank of (%)")
        axis.set_ylabel("last snapshot of")
        return svg(figure)


def generations(found: Mapping[str, Any]) -> str:
    """Each bank's figure over all snapshots."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3.6))
        for i, (bank, generation) in enumerate(found["banks"].items()):
            points = [(e["step"], 100 * e["scores"][bank]) for e in found["by_snapshot"] if bank in e["scores"]]
            if points:
                colour = (BLUE, ORANGE, GREEN, RED, INK)[i % 5]
                label = f"{bank} ({generation})" if generation else bank
                axis.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
        finish(axis, "step", f"{found['probe']} (%)", legend=bool(axis.lines))
        return svg(figure)


def probes_with_intervals(entries: Sequence[Mapping[str, Any]], names: Sequence[str] = ("knn", "ridge", "logistic")) -> str:
    """The probes of one bank with their 95 % intervals; `entries` are lines of the evaluator's history."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3.6))
        for name, colour in zip(names, (BLUE, GREEN, ORANGE), strict=False):
            rows = [e for e in entries if name in e and f"{name}_low" in e]
            if rows:
                y = np.array([[100 * e[key] for key in (name, f"{name}_low", f"{name}_high")] for e in rows]).T
                axis.errorbar(
                    [e["step"] for e in rows], y[0], yerr=[y[0] - y[1], y[2] - y[0]], fmt="o-", color=colour, capsize=3, label=name
                )
        finish(axis, "step", "%", legend=bool(axis.lines))
        return svg(figure)


def drift(state: Mapping[str, Any]) -> str:
    """Distance over threshold of each source's windows: above 1 is drift; `state` is drift/state.json."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3.2))
        for i, (name, source) in enumerate(sorted(state["sources"].items())):
            rows = [w for w in source["windows"] if "distance" in w]
            if rows:
                times = np.array([w["at"].removesuffix("Z") for w in rows], "datetime64[ms]")
                ratio = [w["distance"] / max(w["threshold"], 1e-12) for w in rows]
                axis.plot(times, ratio, "o-", color=(BLUE, ORANGE, GREEN, RED, SOFT)[i % 5], markersize=4, label=name)
        axis.axhline(1.0, color=RED, linestyle=":", linewidth=1.2, label="without drift at most")
        figure.autofmt_xdate()
        finish(axis, "", "Fréchet-64 / threshold")
        return svg(figure)
