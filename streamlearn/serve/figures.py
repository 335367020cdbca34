"""What was measured, as the page shows it: figures of the rows, curves over the steps.

Curves are drawn once for what they show, one at a time (matplotlib has one state for all), from at most POINTS snapshots: more cannot be seen.
"""

import html
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from streamlearn.report import plots
from streamlearn.serve.look import percent, section, table
from streamlearn.serve.shelf import Shelf

POINTS = 200
BANKS = 3  # columns of the list, and curves
WANTED = ("knn", "ridge", "random_knn", "raw_knn", "random_ridge", "raw_ridge")  # of a curve
COLUMNS = (
    ("knn", "k-NN"),
    ("ridge", "ridge"),
    ("logistic", "logistic"),
    ("random_knn", "untrained, k-NN"),
    ("raw_knn", "raw pixels, k-NN"),
)
Result = Mapping[str, Any]


def bank_of(result: Result) -> str:
    return str(result.get("bank", "–"))[:60]


def is_curve(result: Result) -> bool:
    return all(percent(result.get(key)) != "–" for key in WANTED)


def by_bank(results: Sequence[Result]) -> dict[str, Result]:
    """The measurement that is shown of each bank."""
    return {bank_of(r): r for r in sorted(results, key=lambda r: str(r.get("protocol"))) if percent(r.get("knn")) != "–"}


def measured(results: Sequence[Result]) -> str:
    """All measurements of one snapshot."""
    if not results:
        return section("Measured", "<p>Nothing yet: the evaluator measures every snapshot after it is published.</p>")
    rows = [
        [html.escape(bank_of(r)), *(percent(r.get(key)) for key, _ in COLUMNS), html.escape(str(r.get("protocol", "–"))[:60])]
        for r in sorted(results, key=lambda r: (bank_of(r), str(r.get("protocol"))))
    ]
    note = "Frozen features on labelled banks that were not learnt from, beside an untrained network and raw pixels."
    return section("Measured", table(["bank", *(title for _, title in COLUMNS), "protocol"], rows), note)


class Curves:
    """Drawings by what they show; only the last ones are kept."""

    def __init__(self, shelf: Shelf):
        self.shelf = shelf
        self._lock = threading.Lock()
        self._drawn: tuple[object, str] | None = None

    def of(self, versions: Sequence[tuple[int, str]]) -> str:
        """Sections with the curve of each bank.  `versions`: (step, digest), by step."""
        some = versions[:: max(1, -(-len(versions) // POINTS))]
        some = some if not versions or some[-1] == versions[-1] else [*some, versions[-1]]
        lines: dict[str, list[Result]] = {}
        for step, digest in some:
            for bank, result in by_bank(self.shelf.results(digest)).items():
                if is_curve(result):
                    lines.setdefault(bank, []).append({key: result[key] for key in WANTED} | {"step": step})
        most = sorted(lines, key=lambda bank: (-len(lines[bank]), bank))[:BANKS]
        if not most:
            return section("Is it getting better?", "<p>Nothing has been measured yet.</p>")
        shown = {bank: lines[bank] for bank in most}
        with self._lock:
            if self._drawn is None or self._drawn[0] != shown:
                self._drawn = (shown, "".join(_curve(bank, entries) for bank, entries in shown.items()))
            return self._drawn[1]


def _curve(bank: str, entries: Sequence[Result]) -> str:
    note = "Frozen features of the published snapshots on labelled images that were not learnt from."
    return section(f"Is it getting better? {html.escape(bank)}", f"<div class=wide>{plots.probes([dict(e) for e in entries])}</div>", note)
