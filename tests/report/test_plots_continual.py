"""Plots of what the evaluator found: every number that is there is drawn, whatever is missing."""

import pytest

from streamlearn.report import plots_continual as plots

CONTINUAL = {
    "probe": "knn",
    "generations": ["2026Q3", "2026Q4"],
    "banks": {"old": "2026Q3", "new": "2026Q4", "ood": ""},
    "matrix": [[0.412, 0.25], [0.39, None]],
    "untrained": [0.2, None],
    "by_snapshot": [{"step": 100, "scores": {"old": 0.4, "new": 0.2}}, {"step": 200, "scores": {"old": 0.41}}],
}
WINDOW = {"at": "2026-11-21T00:00:00.000Z", "images": 4096, "found": "reference"}
STATE = {"sources": {"web": {"windows": [WINDOW, WINDOW | {"found": "drift", "distance": 3.0, "threshold": 1.5}]}, "rare": {"windows": []}}}
ENTRIES = [{"step": s, "knn": 0.4, "knn_low": 0.39, "knn_high": 0.41} for s in (1, 2)] + [{"step": 3, "knn": 0.5}]


@pytest.mark.parametrize(
    "drawing",
    [
        lambda: plots.matrix(CONTINUAL), lambda: plots.generations(CONTINUAL), lambda: plots.drift(STATE), lambda: plots.probes_with_intervals(ENTRIES),
        lambda: plots.matrix(CONTINUAL | {"matrix": [[None, None], [None, None]], "untrained": [None, None]}),
        lambda: plots.generations(CONTINUAL | {"by_snapshot": []}), lambda: plots.drift({"sources": {}}), lambda: plots.probes_with_intervals([]),
    ],
)  # fmt: skip
def test_a_plot_is_inline_svg_that_asks_nobody_and_is_the_same_every_time(drawing):
    page = drawing()
    assert page.startswith("<svg") and '<image xlink:href="http' not in page and page == drawing()
