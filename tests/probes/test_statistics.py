"""Intervals and paired tests against scipy and closed forms; mean average precision against its definition and against scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_curve

from streamlearn.probes.average_precision import all_points, curve, eleven_points, mean_ap, mean_ap_interval
from streamlearn.probes.statistics import binomial_two_sided, bootstrap, mcnemar, packed, spread, unpacked, wilson


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (3, 10), (5000, 10_000), (9990, 10_000)])
def test_wilsons_interval_equals_scipys(right, total):
    theirs = binomtest(right, total).proportion_ci(0.95, "wilson")
    assert wilson(right, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_nothing_measured_could_be_anything():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 1), (3, 10), (5, 10), (120, 300), (480, 1000), (900, 2000), (2300, 5000)])
def test_the_binomial_test_is_exact(k, n):
    theirs = binomtest(k, n, 0.5).pvalue if n else 1.0
    assert binomial_two_sided(k, n) == pytest.approx(theirs, rel=1e-9)


def test_mcnemar_sees_what_two_intervals_do_not():
    g = np.random.default_rng(0)
    one = g.random(10_000) < 0.5
    other = one.copy()
    other[np.flatnonzero(~one)[:40]] = True
    other[np.flatnonzero(one)[:10]] = False
    found = mcnemar(one, other)
    assert (found.only_one, found.only_other, found.images) == (10, 40, 10_000) and found.difference == pytest.approx(0.003)
    assert found.p == pytest.approx(binomtest(10, 50).pvalue) and found.p < 0.001 and 0 < found.low < found.difference < found.high
    a, b = (wilson(int(x.sum()), 10_000) for x in (one, other))
    assert a[1] > b[0]  # the two intervals overlap
    assert mcnemar(one, one).p == 1.0


def test_answers_on_other_images_are_not_compared():
    with pytest.raises(ValueError, match="the same images"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_answers_survive_packing(right):
    assert unpacked(packed(np.array(right)), len(right)).tolist() == right


def test_a_bootstrap_is_as_wide_as_theory_says_and_the_same_for_the_same_seed():
    x = np.random.default_rng(0).standard_normal(2000)
    low, high = bootstrap(x, seed=3)
    assert (low, high) == bootstrap(x, seed=3) != bootstrap(x, seed=4)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(2000), rel=0.1)
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)


def by_definition(scores, labels, marks):
    """Precision at every threshold, by counting; best at recall >= r; mean over marks, or area."""
    keep = [i for i in range(len(labels)) if labels[i] >= 0]
    positives = sum(labels[i] == 1 for i in keep)
    points = []
    for t in sorted({scores[i] for i in keep}, reverse=True):
        chosen = [i for i in keep if scores[i] >= t]
        hits = sum(labels[i] == 1 for i in chosen)
        points.append((hits / positives, hits / len(chosen)))

    def best(r):
        return max((p for recall, p in points if recall >= r - 1e-12), default=0.0)

    if marks:
        return sum(best(r / 10) for r in range(11)) / 11
    recalls = sorted({0.0} | {r for r, _ in points})
    return sum((b - a) * best(b) for a, b in itertools.pairwise(recalls))


@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from([-1, 0, 0, 1])), min_size=1, max_size=25).filter(
        lambda x: any(y == 1 for _, y in x)
    )
)
def test_average_precision_equals_its_definition_with_ties_and_ignored_images(rows):
    scores, labels = np.array([s / 7 for s, _ in rows]), np.array([y for _, y in rows], np.int8)
    assert all_points(*curve(scores, labels)) == pytest.approx(by_definition(scores, labels, False), abs=1e-12)
    assert eleven_points(*curve(scores, labels)) == pytest.approx(by_definition(scores, labels, True), abs=1e-12)


def test_the_curve_is_scikit_learns_without_the_ignored_images():
    g = np.random.default_rng(0)
    scores, labels = np.round(g.random(300), 2), g.integers(-1, 2, 300).astype(np.int8)
    keep = labels >= 0
    precision, recall, _ = precision_recall_curve(labels[keep], scores[keep])
    ours = curve(scores, labels)
    assert np.allclose(ours[0], recall[:-1][::-1]) and np.allclose(ours[1], precision[:-1][::-1])


def test_average_precision_in_closed_form():
    labels = np.array([1, 1, 0, 0], np.int8)
    assert all_points(*curve(np.array([4.0, 3, 2, 1]), labels)) == 1.0 == eleven_points(*curve(np.array([4.0, 3, 2, 1]), labels))
    assert all_points(*curve(np.array([1.0, 2, 3, 4]), labels)) == pytest.approx(0.5)  # the last positive comes at 2 of 4
    assert all_points(*curve(np.ones(4), labels)) == 0.5  # no order at all
    assert math.isnan(all_points(*curve(np.ones(2), np.array([0, -1], np.int8))))


def test_a_difficult_image_at_the_top_costs_nothing_and_a_wrong_one_does():
    scores = np.array([9.0, 4, 3])
    assert mean_ap(scores[:, None], np.array([[-1], [1], [0]], np.int8)) == 1.0
    assert mean_ap(scores[:, None], np.array([[0], [1], [0]], np.int8)) == 0.5


def test_the_mean_is_over_classes_that_occur_and_its_interval_is_reproducible():
    g = np.random.default_rng(1)
    labels = (g.random((200, 3)) < [0.3, 0.5, 0.0]).astype(np.int8)
    scores = labels + g.standard_normal((200, 3))
    value = mean_ap(scores, labels)
    assert value == pytest.approx(np.mean([mean_ap(scores[:, [c]], labels[:, [c]]) for c in (0, 1)]))
    low, high = mean_ap_interval(scores, labels, seed=1)
    assert low < value < high and (low, high) == mean_ap_interval(scores, labels, seed=1)
