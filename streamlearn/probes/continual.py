"""Is it getting better without forgetting?  Numbers on the matrix A[i,j]: the accuracy of snapshot i on the bank of generation j.

Rows are the generations' last snapshots in the order of learning, columns the generations in the same order.  A snapshot belongs to the
generation that its annotation names, else to the quarter of the last image it learnt from.

    in_domain         mean of A[i,i]
    backward          mean of A[i,j], j < i                        TiC-CLIP (arXiv:2310.16226): how the newest model does on the past
    forward           mean of A[i,j], j > i                        TiC-CLIP: how stale a model becomes
    forgetting        mean over j < n of max_{k <= n} A[k,j] - A[n,j]       Chaudhry et al. 2018; 0 is best
    backward_transfer mean over j < n of A[n,j] - A[j,j]           Lopez-Paz & Ranzato (arXiv:1706.08840), equation 3; under 0: forgets
    forward_transfer  mean over j > 0 of A[j-1,j] - b_j            ibid., equation 4; b_j: the untrained network on j

n is the last row.  What has no entry (a generation not reached yet, a bank not measured) is left out of every mean; a mean of nothing is None.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamlearn.probes.statistics import BOOTSTRAPS, Floats, unpacked

SCHEMA = "streamlearn.continual/1"
MEASURES = ("in_domain", "backward", "forward", "forgetting", "backward_transfer", "forward_transfer")
EMA = 0.98  # of the prequential loss, per recorded point


def quarter(when: str) -> str:
    """2026Q4, as `streamlearn dataset cut` names it by default; empty for no time."""
    return f"{when[:4]}Q{(int(when[5:7]) + 2) // 3}" if len(when) >= 7 else ""


def transfer(A: Floats, untrained: Floats | None = None) -> dict[str, float | None]:
    """All of the above; `A` (n,n) with NaN where there is no entry, `untrained` (n,)."""
    n = len(A)
    if n == 0:
        return dict.fromkeys(MEASURES)
    row, column = np.indices(A.shape)
    best = _best(A)
    before = np.full(n, np.nan)
    if untrained is not None and n > 1:
        before[1:] = A[np.arange(n - 1), np.arange(1, n)] - untrained[1:]
    return {
        "in_domain": _mean(np.diag(A)),
        "backward": _mean(A[column < row]),
        "forward": _mean(A[column > row]),
        "forgetting": _mean((best - A[-1])[:-1]),
        "backward_transfer": _mean((A[-1] - np.diag(A))[:-1]),
        "forward_transfer": _mean(before),
    }


def _best(A: Floats) -> Floats:
    """(n,) the best that any row did on each column; NaN for an empty one."""
    return np.where(np.isnan(A).all(0), np.nan, np.nanmax(np.where(np.isnan(A), -np.inf, A), axis=0))


def _mean(values: Floats) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


@dataclass(frozen=True)
class Row:
    """One snapshot's results on all banks, of one protocol."""

    step: int
    digest: str
    generation: str
    results: Mapping[str, Mapping[str, Any]]  # bank -> what was recorded


def matrix(rows: Sequence[Row], banks: Mapping[str, str], probe: str, *, seed: int = 0) -> dict[str, Any]:
    """The whole, as JSON (docs/probes.md has the schema).  `banks`: name -> generation, in the order of the configuration."""
    order = list(dict.fromkeys(g for g in banks.values() if g))
    last = {row.generation: row for row in sorted(rows, key=lambda r: r.step)}
    chosen = [last.get(g) for g in order]
    A = np.array([[_cell(row, banks, g, probe) for g in order] for row in chosen], dtype=float).reshape(len(order), len(order))
    base = np.array([_column(chosen, banks, g, f"random_{probe}") for g in order])
    reached = max((i for i, row in enumerate(chosen) if row), default=-1) + 1
    numbers = transfer(A[:reached, :reached], base[:reached]) | {"forward": _mean(A[np.triu_indices(len(order), 1)])}
    return {
        "schema": SCHEMA,
        "probe": probe,
        "generations": order,
        "banks": dict(banks),
        "snapshots": [{"step": row.step, "digest": row.digest} if row else None for row in chosen],
        "matrix": [[_plain(x) for x in line] for line in A],
        "untrained": [_plain(x) for x in base],
        "measures": numbers,
        "intervals": intervals(chosen[:reached], [[b for b, g in banks.items() if g == want] for want in order], probe, seed=seed),
        "by_snapshot": [
            {"step": row.step, "digest": row.digest, "generation": row.generation}
            | {"scores": {b: _plain(float(row.results[b][probe])) for b in banks if b in row.results and probe in row.results[b]}}
            for row in sorted(rows, key=lambda r: r.step)
        ],
    }


def intervals(rows: Sequence[Row | None], columns: Sequence[Sequence[str]], probe: str, *, seed: int) -> dict[str, list[float]]:
    """95 % bootstrap intervals of the measures over test images, drawn together for all snapshots: paired.

    Only where every cell has its answers (single-label banks); else there is nothing honest to give.
    """
    answers: dict[str, list[Any]] = {}
    for bank in (b for banks in columns[: len(rows)] for b in banks):
        for row in rows:
            found = row.results.get(bank) if row else None
            if found is None or probe not in found.get("right", {}):
                return {}
            answers.setdefault(bank, []).append(unpacked(found["right"][probe], found["images"]))
        if len({len(x) for x in answers[bank]}) > 1:
            return {}
    if not answers or not rows:
        return {}
    g, drawn = np.random.default_rng(seed), []
    for _ in range(BOOTSTRAPS):
        means = {}
        for bank, right in answers.items():
            at = g.integers(0, len(right[0]), len(right[0]))
            means[bank] = [float(r[at].mean()) for r in right]
        A = np.array(
            [[np.mean([means[b][i] for b in banks]) if banks else np.nan for banks in columns[: len(rows)]] for i in range(len(rows))]
        )
        drawn.append(transfer(A))
    out = {}
    for name in MEASURES:
        values = [d[name] for d in drawn if d[name] is not None]
        if values:
            low, high = np.quantile(np.array(values, dtype=float), [0.025, 0.975])
            out[name] = [round(float(low), 6), round(float(high), 6)]
    return out


def _cell(row: Row | None, banks: Mapping[str, str], generation: str, probe: str) -> float:
    if row is None:
        return math.nan
    values = [float(row.results[b][probe]) for b, g in banks.items() if g == generation and b in row.results and probe in row.results[b]]
    return sum(values) / len(values) if values else math.nan


def _column(rows: Sequence[Row | None], banks: Mapping[str, str], generation: str, name: str) -> float:
    found = [_cell(row, banks, generation, name) for row in rows]
    return next((x for x in found if not math.isnan(x)), math.nan)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


def prequential(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Of the learner's history: the loss on fresh images before they were learnt (test-then-train), with its exponential average.

    A learner that was killed takes some steps again: the last line of a step counts.
    """
    by_step = {
        int(line["step"]): float(line["loss"]) for line in lines if line.get("loss") is not None and "lr" in line and "event" not in line
    }
    total = weight = 0.0
    found = []
    for step in sorted(by_step):
        total, weight = EMA * total + (1 - EMA) * by_step[step], EMA * weight + (1 - EMA)
        found.append({"step": step, "loss": round(by_step[step], 6), "average": round(total / weight, 6)})
    return found
