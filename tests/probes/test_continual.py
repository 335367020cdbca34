"""The matrix and its numbers, by hand and by loops; the prequential loss of a learner that was killed."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from streamlearn.probes.continual import MEASURES, Row, matrix, prequential, quarter, transfer
from streamlearn.probes.statistics import packed

A = np.array([[0.6, 0.3, 0.1], [0.5, 0.7, 0.2], [0.55, 0.65, 0.8]])


def test_forgetting_and_transfer_by_hand():
    found = transfer(A, np.array([0.1, 0.2, 0.15]))
    assert found == pytest.approx(
        {
            "in_domain": (0.6 + 0.7 + 0.8) / 3,
            "backward": (0.5 + 0.55 + 0.65) / 3,
            "forward": (0.3 + 0.1 + 0.2) / 3,
            "forgetting": ((0.6 - 0.55) + (0.7 - 0.65)) / 2,
            "backward_transfer": ((0.55 - 0.6) + (0.65 - 0.7)) / 2,
            "forward_transfer": ((0.3 - 0.2) + (0.2 - 0.15)) / 2,
        }
    )


@given(st.integers(1, 5).flatmap(lambda n: arrays(float, (n, n), elements=st.one_of(st.floats(0, 1), st.just(math.nan)))))
def test_every_measure_equals_a_loop_whatever_is_missing(a):
    n = len(a)

    def mean(values):
        values = [v for v in values if not math.isnan(v)]
        return sum(values) / len(values) if values else None

    def top(j):
        return max((a[k, j] for k in range(n) if not math.isnan(a[k, j])), default=math.nan)

    found = transfer(a)
    expected = {
        "in_domain": mean([a[i, i] for i in range(n)]),
        "backward": mean([a[i, j] for i in range(n) for j in range(i)]),
        "forward": mean([a[i, j] for i in range(n) for j in range(i + 1, n)]),
        "forgetting": mean([top(j) - a[n - 1, j] for j in range(n - 1)]),
        "backward_transfer": mean([a[n - 1, j] - a[j, j] for j in range(n - 1)]),
        "forward_transfer": None,
    }
    for name in MEASURES:
        assert found[name] == (None if expected[name] is None else pytest.approx(expected[name], abs=1e-12)), name
    assert found["forgetting"] is None or found["forgetting"] >= 0


def test_nothing_learnt_is_nothing_said():
    assert set(transfer(np.empty((0, 0))).values()) == {None}


def result(right, random=0.1):
    right = np.array(right, bool)
    return {"knn": float(right.mean()), "random_knn": random, "right": {"knn": packed(right)}, "images": len(right)}


def world():
    g = np.random.default_rng(0)
    banks = {"old": "2026Q3", "new": "2026Q4", "ood": ""}
    chances = {100: (0.5, 0.2), 200: (0.7, 0.3), 300: (0.4, 0.8)}
    rows = []
    for step, (old, new) in chances.items():
        results = {"old": result(g.random(400) < old), "new": result(g.random(400) < new), "ood": result(g.random(50) < 0.5)}
        rows.append(Row(step, f"sha256:{step}", "2026Q3" if step < 300 else "2026Q4", results))
    return rows, banks


def test_a_generations_row_is_its_last_snapshot_and_banks_without_one_are_no_column():
    rows, banks = world()
    found = matrix(list(reversed(rows)), banks, "knn")
    assert found["generations"] == ["2026Q3", "2026Q4"] and [s["step"] for s in found["snapshots"]] == [200, 300]
    assert found["matrix"][0][0] == rows[1].results["old"]["knn"] and found["matrix"][1][1] == rows[2].results["new"]["knn"]
    assert found["untrained"] == [0.1, 0.1] and found["by_snapshot"][0]["scores"]["ood"] == rows[0].results["ood"]["knn"]
    forgot = rows[1].results["old"]["knn"] - rows[2].results["old"]["knn"]
    assert found["measures"]["forgetting"] == pytest.approx(forgot, abs=1e-6) and found["measures"]["backward_transfer"] == pytest.approx(
        -forgot, abs=1e-6
    )
    assert found["measures"]["forward_transfer"] == pytest.approx(rows[1].results["new"]["knn"] - 0.1, abs=1e-6)
    assert json.loads(json.dumps(found)) == found


def test_intervals_hold_their_measures_are_paired_and_can_be_made_again():
    rows, banks = world()
    found = matrix(rows, banks, "knn", seed=1)
    for name, (low, high) in found["intervals"].items():
        assert low <= found["measures"][name] <= high, name
    assert found == matrix(rows, banks, "knn", seed=1) != matrix(rows, banks, "knn", seed=2)
    same = result(np.random.default_rng(5).random(400) < 0.5)
    twins = [Row(i, str(i), g, {"old": same, "new": same}) for i, g in enumerate(("2026Q3", "2026Q4"))]
    low, high = matrix(twins, {"old": "2026Q3", "new": "2026Q4"}, "knn")["intervals"]["backward_transfer"]
    assert low == high == 0.0  # on the same images the same answers: there is no doubt


def test_a_generation_that_is_not_reached_is_still_foreseen():
    rows, banks = world()
    found = matrix(rows[:2], banks, "knn")
    assert found["snapshots"][1] is None and found["matrix"][1] == [None, None]
    assert found["measures"]["forward"] == rows[1].results["new"]["knn"] and found["measures"]["backward"] is None


def test_a_bank_without_answers_has_no_interval():
    rows, banks = world()
    del rows[1].results["old"]["right"]
    assert matrix(rows, banks, "knn")["intervals"] == {}


def test_quarters_are_named_as_a_cut_names_them():
    assert [quarter(f"2026-{m:02d}-15T00:00:00Z") for m in (1, 3, 4, 9, 10, 12)] == [
        "2026Q1",
        "2026Q1",
        "2026Q2",
        "2026Q3",
        "2026Q4",
        "2026Q4",
    ]
    assert quarter("") == ""


def test_the_last_line_of_a_step_counts_and_the_average_has_no_lag_at_the_start():
    lines = [{"step": 10, "loss": 9.0, "lr": 1}, {"step": 20, "loss": 5.0, "lr": 1}, {"event": "halved", "step": 15, "lr": 1}]
    lines += [{"step": 10, "loss": 4.0, "lr": 1}, {"step": 30, "loss": None, "lr": 1}]
    found = prequential(lines)
    assert [(p["step"], p["loss"]) for p in found] == [(10, 4.0), (20, 5.0)]
    assert found[0]["average"] == 4.0 and found[1]["average"] == pytest.approx(
        (0.98 * 0.02 * 4 + 0.02 * 5) / (0.98 * 0.02 + 0.02), abs=1e-5
    )
