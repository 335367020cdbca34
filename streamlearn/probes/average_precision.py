"""Average precision of multi-label banks, as PASCAL VOC defines it.  Shapes: M test images, C classes.

What is labelled -1 (VOC: `difficult`) counts neither as right nor as wrong: it is left out of the ranking of its class.
Images of equal score enter the curve together, so the figure does not depend on their order; the development kit leaves that to its sort.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streamlearn.probes.statistics import Floats

Curve = tuple[Floats, Floats]  # recall, precision, at each distinct score from the highest down
RECALLS = np.arange(11) / 10


def curve(scores_M: Floats, labels_M: NDArray[np.int8]) -> Curve:
    """Of one class.  Empty if there is no positive."""
    judged = labels_M >= 0
    scores, truth = scores_M[judged], labels_M[judged] == 1
    if not truth.any():
        return np.empty(0), np.empty(0)
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(truth[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of each run of equal scores
    at = np.flatnonzero(last)
    return hits[at] / hits[-1], hits[at] / (at + 1)


def all_points(recall: Floats, precision: Floats) -> float:
    """Area under the curve made monotone (VOC 2010 and later).  NaN without positives."""
    if not len(recall):
        return math.nan
    best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or beyond
    return float((np.diff(recall, prepend=0.0) * best).sum())


def eleven_points(recall: Floats, precision: Floats) -> float:
    """Mean of the best precision at recall >= 0, 0.1, ... 1 (VOC 2007, as reported for SEER's and SwAV's VOC07 figures).  NaN without positives."""
    if not len(recall):
        return math.nan
    # a recall of 3/10 must reach the mark 0.3, whose nearest float is a shade higher
    return float(np.mean([precision[recall >= t - 1e-12].max(initial=0.0) for t in RECALLS]))


def mean_ap(scores_MC: Floats, labels_MC: NDArray[np.int8], rule: Callable[[Floats, Floats], float] = all_points) -> float:
    """Mean over the classes that have a positive."""
    found = [rule(*curve(scores_MC[:, c], labels_MC[:, c])) for c in range(scores_MC.shape[1])]
    found = [x for x in found if not math.isnan(x)]
    return sum(found) / len(found) if found else math.nan


def mean_ap_interval(scores_MC: Floats, labels_MC: NDArray[np.int8], *, seed: int, rounds: int = 200) -> tuple[float, float]:
    """95 % bootstrap interval over images."""
    g = np.random.default_rng(seed)
    drawn = (g.integers(0, len(scores_MC), len(scores_MC)) for _ in range(rounds))
    low, high = np.quantile([mean_ap(scores_MC[i], labels_MC[i]) for i in drawn], [0.025, 0.975])
    return float(low), float(high)
