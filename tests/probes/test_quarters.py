"""A real stream in two quarters, small: bench/quarters.py has the figures."""

import pytest

from bench.quarters import QUARTERS, arguments, run
from streamlearn.probes.gate import PROMOTED, REFUSED


@pytest.mark.slow
def test_two_quarters_fill_the_matrix_and_a_damaged_snapshot_is_refused(tmp_path):
    # so few steps that the rank of the features is still high: a dozen later it is about 3, the alarm's limit, and nothing is promoted
    small = ["--images", "512", "--steps", "10", "--bank", "200", "--snapshots", "1", "--damage", "0.5", "--scratch", str(tmp_path)]
    whole, verdicts = run(arguments().parse_args(small))
    knn = whole["probes"]["knn"]
    assert knn["generations"] == list(QUARTERS) and knn["banks"] == {name.lower(): name for name in QUARTERS}
    assert all(0 < cell < 1 for row in [*knn["matrix"], knn["untrained"]] for cell in row)
    (old, _), (new, _) = knn["matrix"]
    assert knn["measures"]["forgetting"] == pytest.approx(max(0.0, old - new)) and knn["measures"]["backward_transfer"] == pytest.approx(
        new - old
    )
    assert [row["generation"] for row in knn["by_snapshot"]] == list(QUARTERS)
    assert [(name, step) for name, step, _ in verdicts] == [("2026Q3", 10), ("2026Q4", 20), ("damaged", 21)]
    assert verdicts[0][2].outcome == PROMOTED and verdicts[-1][2].outcome == REFUSED, verdicts[-1]
