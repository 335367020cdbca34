"""Probes equal independent references."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from streamlearn.contract.config_probe import BankConfig
from streamlearn.probes.banks import load_bank
from streamlearn.probes.features import raw_pixels
from streamlearn.probes.knn import accuracy, knn, knn_scores
from streamlearn.probes.linear import _fits, held_out, ridge, ridge_scores
from streamlearn.probes.logistic import SWEEP, draws, fit, low_shot, sweep


def blobs(n, classes=4, width=12, spread=1.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + spread * torch.randn(n, width, generator=g), labels


def test_knn_equals_scikit_learns_with_the_same_weights():
    (bank, labels), (test, truth) = blobs(400), blobs(150, seed=1)

    def unit(x):
        return torch.nn.functional.normalize(x, dim=1).double().numpy()

    theirs = KNeighborsClassifier(20, metric="euclidean", algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07))
    theirs.fit(unit(bank), labels.numpy())
    ours = knn(bank, labels, test)
    assert (ours.numpy() == theirs.predict(unit(test))).mean() == 1.0 and accuracy(ours, truth) > 0.7


def test_ridge_equals_scikit_learns():
    (bank, labels), (test, _) = blobs(300), blobs(100, seed=1)
    X, T = bank.double().numpy(), test.double().numpy()
    mean, std = X.mean(0), X.std(0, ddof=1) + 1e-6
    X, T = (X - mean) / std, (T - mean) / std
    Y = np.eye(4)[labels.numpy()]
    theirs = Ridge(alpha=0.1 * len(X)).fit(X, Y).predict(T).argmax(1)
    ours = _fits(torch.from_numpy(X), torch.from_numpy(Y), torch.from_numpy(T), (0.1,))[0].argmax(1)
    assert (ours.numpy() == theirs).all() and accuracy(ridge(bank, labels, test), blobs(100, seed=1)[1]) > 0.7


def test_raw_pixels_of_real_images_by_knn_equal_a_numpy_reference(data_dir):
    path = str(data_dir / "cifar10-test.parquet")
    bank = load_bank(BankConfig(name="c", train=path, max_train=600, max_test=200), 32)
    a, b = raw_pixels(bank.train, 32).double().numpy(), raw_pixels(bank.test, 32).double().numpy()
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = []
    for row in b @ a.T:
        near = np.argsort(-row)[:20]
        expected.append(np.bincount(bank.train.labels.numpy()[near], weights=np.exp(row[near] / 0.07), minlength=10).argmax())
    ours = knn(raw_pixels(bank.train, 32), bank.train.labels, raw_pixels(bank.test, 32)).numpy()
    assert (ours == np.array(expected)).mean() > 0.99 and len(bank.classes) == 10


def hits(scores, truth):
    return float((scores.argmax(1) == truth).double().mean())


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_the_logistic_fit_equals_scikit_learns_at_the_same_C(C):
    (bank, labels), (test, _) = blobs(300), blobs(80, seed=1)
    X, T = (torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (bank, test))
    theirs = LogisticRegression(C=C, max_iter=10_000, tol=1e-10).fit(X, labels.numpy()).decision_function(T)
    ours = fit(bank, labels, 4, C, tolerance=1e-10).scores(test).numpy()
    # a softmax is free up to a constant a row: theirs is centred by its penalty, ours by its start at 0
    assert np.allclose(ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=2e-4 * np.abs(theirs).max())


def test_a_class_of_a_multi_label_bank_is_fitted_on_the_images_in_which_it_is_judged():
    (bank, classes), (test, _) = blobs(300), blobs(80, seed=1)
    labels = torch.stack([classes == 0, classes >= 2], 1).to(torch.int8)
    labels[5:60, 1] = -1
    judged = labels[:, 1] >= 0
    X, T = (torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (bank, test))
    ours = fit(bank, labels, 2, 1.0, tolerance=1e-10).scores(test).numpy()
    for c, use in ((0, judged | True), (1, judged)):
        theirs = LogisticRegression(C=1.0, max_iter=10_000, tol=1e-10).fit(X[use.numpy()], labels[use, c].numpy()).decision_function(T)
        assert np.allclose(ours[:, c], theirs, atol=2e-4 * np.abs(theirs).max())


def test_ridge_of_many_labels_leaves_out_what_is_not_judged():
    (bank, classes), (test, _) = blobs(300), blobs(80, seed=1)
    labels = torch.stack([classes == 0, classes >= 2], 1).to(torch.int8)
    labels[5:60, 1] = -1
    ours = ridge_scores(bank, labels, test, lambdas=(0.1,)).numpy()
    X, T = bank.double().numpy(), test.double().numpy()
    mean, std = X.mean(0), X.std(0, ddof=1) + 1e-6
    X, T = (X - mean) / std, (T - mean) / std
    for c in (0, 1):
        use = labels[:, c].numpy() >= 0
        theirs = Ridge(alpha=0.1 * use.sum()).fit(X[use], labels[use, c].double().numpy()).predict(T)
        assert np.allclose(ours[:, c], theirs, atol=1e-9)


def test_knn_of_many_labels_votes_among_the_neighbours_that_are_judged():
    bank = torch.eye(3)
    labels = torch.tensor([[1, 0], [0, -1], [1, -1]], dtype=torch.int8)
    test = torch.tensor([[1.0, 0.5, 0.0]])
    unit = torch.nn.functional.normalize(test.double(), dim=1)[0]
    votes = (unit / 0.07).exp()
    expected = torch.tensor([(votes[0] + votes[2]) / votes.sum(), 0.0])
    assert torch.allclose(knn_scores(bank, labels, test, k=3)[0].double(), expected.double(), atol=1e-6)
    only = knn_scores(bank[1:], labels[1:], test, k=2)[0]
    assert float(only[1]) == 0.5  # nobody is judged


def test_the_sweep_takes_the_best_C_on_held_out_images_and_is_the_same_every_time():
    (bank, labels), (test, truth) = blobs(400, spread=2.0), blobs(300, spread=2.0, seed=1)
    grid = SWEEP[::8]
    scores, C = sweep(bank, labels, test, grid=grid)
    held = held_out(labels)
    grades = [hits(fit(bank[~held], labels[~held], 4, c).scores(bank[held]), labels[held]) for c in grid]
    assert grades[grid.index(C)] == max(grades) and len(SWEEP) == 45 and SWEEP[0] == 1e-6 and SWEEP[-1] == pytest.approx(1e5)
    assert torch.equal(scores, sweep(bank, labels, test, grid=grid)[0]) and hits(scores, truth) > 0.5


def test_one_percent_of_the_labels_is_one_of_each_class_and_more_labels_are_better_and_surer():
    (bank, labels), (test, truth) = blobs(400, spread=2.0), blobs(300, spread=2.0, seed=1)
    for some in draws(labels, 0.01, range(5)):
        assert sorted(labels[some].tolist()) == [0, 1, 2, 3]
    one = low_shot(bank, labels, test, truth, share=0.01, seeds=5)
    ten = low_shot(bank, labels, test, truth, share=0.10, seeds=5)
    assert ten["mean"] > one["mean"] and ten["deviation"] < one["deviation"] and (one["images"], ten["images"]) == (4, 40)
    assert low_shot(bank, labels, test, truth, share=0.01, seeds=5) == one
    few = next(draws(labels, 0.01, [0]))
    model = LogisticRegression(C=1 / (0.0025 * 4), max_iter=10_000, tol=1e-8)
    unit = [torch.nn.functional.normalize(x.double(), dim=1).numpy() for x in (bank[few], test)]
    theirs = (model.fit(unit[0], labels[few].numpy()).predict(unit[1]) == truth.numpy()).mean()
    assert low_shot(bank, labels, test, truth, share=0.01, seeds=1)["mean"] == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize("images", [20, 60])
def test_ridge_is_the_same_with_fewer_images_than_features_and_with_more(images):
    g = np.random.default_rng(0)
    X, T, Y = g.standard_normal((images, 40)), g.standard_normal((10, 40)), np.eye(3)[g.integers(0, 3, images)]
    for lam, ours in zip((0.01, 1.0), _fits(*map(torch.from_numpy, (X, Y, T)), (0.01, 1.0)), strict=True):
        assert np.allclose(ours.numpy(), Ridge(alpha=lam * images).fit(X, Y).predict(T), atol=1e-9)


@pytest.mark.parametrize("order", ["in turns", "by class", "shuffled"])
def test_what_is_held_out_has_every_class_whatever_the_order(order):
    labels = {
        "in turns": torch.arange(500) % 10,
        "by class": torch.arange(500) // 50,
        "shuffled": (torch.arange(500) % 10)[torch.randperm(500, generator=torch.Generator().manual_seed(0))],
    }[order]
    assert torch.bincount(labels[held_out(labels)]).tolist() == [5] * 10
    few = torch.tensor([0, 1, 1, 2, 2, 2])
    assert sorted(few[held_out(few)].tolist()) == [1, 2]  # an only image is kept to be learnt from
    assert int(held_out(torch.zeros(40, 3, dtype=torch.int8)).sum()) == 4


def test_the_probes_do_not_depend_on_the_order_of_the_bank():
    """Classes in turns, ten of them: holding out every tenth image once meant holding out one class."""
    (bank, labels), (test, truth) = blobs(600, classes=10, spread=1.5), blobs(300, classes=10, spread=1.5, seed=1)
    order = labels.argsort(stable=True)
    assert torch.equal(ridge(bank, labels, test), ridge(bank[order], labels[order], test))
    one, other = (sweep(b, y, test, grid=SWEEP[::8]) for b, y in ((bank, labels), (bank[order], labels[order])))
    assert one[1] == other[1] and hits(one[0], truth) == pytest.approx(hits(other[0], truth), abs=0.01) and hits(one[0], truth) > 0.7
