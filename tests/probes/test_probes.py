"""Probes equal independent references; label-free numbers their formulas; banks complain by name."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prometheus_client import CollectorRegistry
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from streamlearn.contract.config import BankConfig, Config, ProbeConfig
from streamlearn.contract.durable import read_lines
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import EvaluatorMetrics
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import Heartbeat, read_status
from streamlearn.probes.banks import load_bank
from streamlearn.probes.evaluator import Evaluator, run_evaluate
from streamlearn.probes.features import raw_pixels
from streamlearn.probes.knn import accuracy, knn
from streamlearn.probes.label_free import effective_rank, participation_ratio, rankme
from streamlearn.probes.linear import _fit, ridge
from streamlearn.snapshots.publish import publish, results
from tests.ingest.server import picture
from tests.snapshots.test_publish import export


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
    ours = _fit(torch.from_numpy(X), torch.from_numpy(Y), torch.from_numpy(T), 0.1)
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


def orthogonal(n, r, seed=0):
    """n centred rows whose covariance has r equal eigenvalues."""
    x = np.random.default_rng(seed).standard_normal((n, r))
    q, _ = np.linalg.qr(x - x.mean(0))
    return torch.from_numpy(q)


@pytest.mark.parametrize("r", [1, 3, 10])
def test_ranks_of_known_data(r):
    z = orthogonal(200, r) @ torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0][:r])
    assert effective_rank(z) == pytest.approx(r, rel=1e-9) and participation_ratio(z) == pytest.approx(r, rel=1e-9)
    assert rankme(z) == pytest.approx(r, rel=1e-3)


def test_a_collapsed_network_is_seen():
    z = torch.ones(100, 8) + 1e-6 * torch.randn(100, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 8)
    assert effective_rank(z) < 1.1 and rankme(z) < 1.01


def bank_file(folder, count=60, classes=3):
    images = [picture(i, size=(20, 20)) for i in range(count)]
    pq.write_table(pa.table({"jpeg": images, "label": [i % classes for i in range(count)]}), folder / "bank.parquet")
    return str(folder / "bank.parquet")


def test_a_bank_is_split_the_same_way_every_time(tmp_path):
    config = BankConfig(name="b", train=bank_file(tmp_path))
    one, two = load_bank(config, 16), load_bank(config, 16)
    assert one.digest == two.digest and one.train.images_NSSC.shape[1:] == (16, 16, 3)
    assert len(one.train.labels) + len(one.test.labels) == 60 and load_bank(config, 20).digest != one.digest


def test_a_bank_of_folders_is_read_by_class(tmp_path):
    for i in range(40):
        path = tmp_path / "bank" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i) if i != 7 else b"\xff\xd8\xff broken")
    bank = load_bank(BankConfig(name="b", train=str(tmp_path / "bank")), 16)
    assert bank.classes == ("class0", "class1") and len(bank.train.labels) + len(bank.test.labels) == 39


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"label_column": "y"}, "no column 'y'; there are jpeg, label"),
        ({"train": "nowhere.txt"}, "neither a folder"),
        ({"train": "nowhere.parquet"}, "nowhere.parquet: not a readable parquet"),
    ],
)
def test_a_bad_bank_is_named_with_the_remedy(tmp_path, change, complaint):
    with pytest.raises(ConfigError, match=f"probe bank b: .*{complaint}"):
        load_bank(BankConfig(name="b", **{"train": bank_file(tmp_path)} | change), 16)


def test_one_class_is_no_bank(tmp_path):
    with pytest.raises(ConfigError, match="1 classes"):
        load_bank(BankConfig(name="b", train=bank_file(tmp_path, classes=1)), 16)


class Killed(BaseException): ...


def evaluator(home, registry=None):
    config = Config(probe=ProbeConfig(banks=(BankConfig(name="b", train=str(home / "bank.parquet")),), poll_s=0.05))
    registry = registry or OciLayout(home / "registry")
    return Evaluator(config, registry, EvaluatorMetrics(CollectorRegistry()), Heartbeat(home, "evaluate", period_s=0)), config


def test_every_snapshot_is_measured_once_and_the_result_lies_beside_it(tmp_path):
    bank_file(tmp_path)
    registry = OciLayout(tmp_path / "registry")
    digests = [publish(registry, export(step, seed=step))[1] for step in (1, 2)]
    role, _ = evaluator(tmp_path)
    assert [role.measure_next() for _ in range(3)] == [True, True, False]
    again, _ = evaluator(tmp_path)
    while again.measure_next():
        pass
    for digest in digests:
        found = results(registry, digest)
        assert len(found) == 1 and {"knn", "ridge", "raw_knn", "random_knn", "effective_rank", "rankme"} <= set(found[0])
    assert [line["step"] for line in read_lines(tmp_path / "history" / "evaluate.jsonl")] == [1, 2]


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_its_commit_point_nothing_is_recorded_twice(tmp_path, when):
    bank_file(tmp_path)

    class DyingLayout(OciLayout):
        def attach(self, *args):
            if when == "after":
                super().attach(*args)
            raise Killed

    _, digest = publish(OciLayout(tmp_path / "registry"), export(1))
    role, _ = evaluator(tmp_path, DyingLayout(tmp_path / "registry"))
    with pytest.raises(Killed):
        role.measure_next()
    again, _ = evaluator(tmp_path)
    while again.measure_next():
        pass
    assert len(results(OciLayout(tmp_path / "registry"), digest)) == 1


def test_a_damaged_snapshot_is_named_and_the_others_are_measured(tmp_path):
    bank_file(tmp_path)
    registry = OciLayout(tmp_path / "registry")
    (_, bad), (_, good) = publish(registry, export(1)), publish(registry, export(2, seed=2))
    blob = registry.root / "blobs" / "sha256" / registry.manifest(bad)[1]["layers"][0]["digest"][7:]
    blob.write_bytes(blob.read_bytes()[:-10])
    _, config = evaluator(tmp_path)
    stop = threading.Event()
    args = (config, registry, EvaluatorMetrics(CollectorRegistry()), Heartbeat(tmp_path, "evaluate", period_s=0), stop)
    thread = threading.Thread(target=run_evaluate, args=args, daemon=True)
    thread.start()
    for _ in range(1200):
        if results(registry, good) and read_status(tmp_path).get("evaluate", {}).get("failed"):
            break
        threading.Event().wait(0.1)
    stop.set()
    thread.join(60)
    assert len(results(registry, good)) == 1 and results(registry, bad) == []
    assert "damaged" in read_status(tmp_path)["evaluate"]["failed"][bad]
