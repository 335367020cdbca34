"""Neighbours: the true ones, of the same queries for every snapshot, in a small file that nothing can spoil for good."""

import json

import numpy as np
import pytest
import torch

from streamlearn.contract.config import BankConfig
from streamlearn.contract.registry import OciLayout
from streamlearn.probes import retrieval
from streamlearn.probes.banks import Bank, Split, load_bank
from streamlearn.probes.retrieval import COLUMNS, NEAR, QUERIES, add_column, kept, nearest, path_of, queries, read
from streamlearn.snapshots.publish import publish
from tests.conftest import small_disk
from tests.probes.world import bank_file, evaluator, measure_all, shade
from tests.snapshots.test_publish import export


@pytest.fixture
def bank(tmp_path):
    return load_bank(BankConfig(name="b", train=bank_file(tmp_path, image=lambda i, c: shade(c, i))), 20)


def features(bank, seed, width=8):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(len(split.labels), width, generator=g) for name, split in (("train", bank.train), ("test", bank.test))}


def labelled(bank):
    """Features that are the classes themselves: every neighbour is right."""
    return {name: torch.nn.functional.one_hot(split.labels, 3).float() for name, split in (("train", bank.train), ("test", bank.test))}


def add(home, bank, step, found=None):
    add_column(home, bank, found or features(bank, step), step=step, digest=f"sha256:{step:064x}")
    return read(path_of(home, "b"))


def test_the_nearest_are_those_of_a_loop(bank):
    found = features(bank, 1)
    one, other = (x.double().numpy() for x in (found["train"], found["test"]))
    for m, near in enumerate(nearest(found["train"], found["test"]).tolist()):
        cosine = [float(v @ other[m] / np.linalg.norm(v) / np.linalg.norm(other[m])) for v in one]
        assert near == sorted(range(len(one)), key=lambda i: -cosine[i])[:NEAR]


def test_marks_and_shares_say_which_are_of_the_same_class(tmp_path, bank):
    held = add(tmp_path, bank, 1, labelled(bank))
    (column,) = held["columns"]
    assert column["right"] == 1.0 and all(ok for row in column["near"] for _, ok in row)
    (column,) = add(tmp_path, bank, 1, features(bank, 5))["columns"]
    for query, row in zip(held["queries"], column["near"], strict=True):
        for index, ok in row:
            assert ok == int(bank.train.labels[index] == bank.test.labels[query["index"]])
            assert held["images"].get(str(index), {"name": ""})["name"] in ("", bank.classes[int(bank.train.labels[index])])
    every = [
        int(bank.train.labels[i]) == int(bank.test.labels[m])
        for m, row in enumerate(nearest(**_named(features(bank, 5))).tolist())
        for i in row
    ]
    assert column["right"] == pytest.approx(np.mean(every), abs=1e-6) and 0 < column["right"] < 1


def _named(found):
    return {"bank_ND": found["train"], "test_QD": found["test"]}


def test_the_queries_are_the_first_of_each_class_and_the_same_for_all_snapshots(tmp_path, bank):
    first = [int((bank.test.labels == c).nonzero()[0, 0]) for c in range(3)]
    assert queries(bank) == first
    asked = [add(tmp_path, bank, step)["queries"] for step in (1, 2, 3)]
    assert asked[0] == asked[1] == asked[2] and [q["index"] for q in asked[0]] == first


def test_a_multi_label_neighbour_is_right_if_it_has_a_class_in_common(tmp_path):
    images = np.zeros((12, 8, 8, 3), np.uint8)
    train, test = torch.zeros(12, 3, dtype=torch.int8), torch.zeros(12, 3, dtype=torch.int8)
    train[:6, 1] = test[:, 1] = 1
    train[:, 0], test[:, 0] = -1, 1  # not judged in one of the two: not in common
    train[:, 2], test[:, 2] = 1, -1
    many = Bank("b", "d", ("x", "y", "z"), Split(images, train), Split(images, test))
    same = {"train": torch.eye(12), "test": torch.eye(12)}
    held = add(tmp_path, many, 1, same)
    assert len(held["queries"]) == QUERIES
    for row in held["columns"][0]["near"]:
        assert [ok for _, ok in row] == [int(i < 6) for i, _ in row]


@pytest.mark.parametrize("steps", [list(range(150, 150 * 41, 150)), [1, 2, 3, 4, 5, 6], [10, 20]])
def test_the_first_and_the_newest_are_kept_and_few_between_them(steps):
    columns = []
    for step in steps:
        columns = kept([*columns, {"step": step}])
    found = [c["step"] for c in columns]
    assert found[0] == steps[0] and found[-1] == steps[-1] and len(found) == min(COLUMNS, len(steps)) and found == sorted(found)
    if len(steps) > 20:
        ratios = np.diff(np.log(found))
        assert ratios.max() < 4 * ratios.min(), "even on the logarithm"


def test_the_file_stays_small_however_many_snapshots_there_are(tmp_path, bank):
    for step in range(1, 40):
        held = add(tmp_path, bank, step)
    assert len(held["columns"]) == COLUMNS and len(held["images"]) <= (COLUMNS + 1) * NEAR * QUERIES
    shown = {str(i) for c in (held["pixels"], *held["columns"]) for row in c["near"] for i, _ in row}
    assert shown == set(held["images"]), "a picture that no column shows any more is gone"
    assert path_of(tmp_path, "b").stat().st_size < 400_000


@pytest.mark.parametrize("what", ["torn", "another bank's", "not ours"])
def test_a_file_that_is_torn_or_of_another_bank_is_begun_anew(tmp_path, bank, what):
    path = path_of(tmp_path, "b")
    add(tmp_path, bank, 1)
    data = json.loads(path.read_bytes())
    other = {"torn": path.read_bytes()[:500], "another bank's": json.dumps(data | {"bank_digest": "x"}).encode(), "not ours": b"[]"}
    path.write_bytes(other[what])
    held = add(tmp_path, bank, 2)
    assert [c["step"] for c in held["columns"]] == [2] and held["bank_digest"] == bank.digest


def test_a_full_disk_leaves_the_picture_as_it_is(tmp_path, bank):
    with small_disk(tmp_path / "small", "64k") as home:
        add(home, bank, 1)
        before = path_of(home, "b").read_bytes()
        (home / "filler").write_bytes(b"x" * (64 * 1024 - 4096 - (-(-len(before) // 4096)) * 4096))
        add(home, bank, 2)
        assert path_of(home, "b").read_bytes() == before


def test_the_evaluator_adds_a_column_from_the_features_at_hand(tmp_path):
    bank_file(tmp_path)
    registry = OciLayout(tmp_path / "registry")
    for step in (1, 2):
        publish(registry, export(step, seed=step))
    role = evaluator(tmp_path, registry)
    assert measure_all(role) == 2 and (role.measurer.cache.hits, role.measurer.cache.misses) == (0, 2)
    held = retrieval.read(path_of(tmp_path, "b"))
    assert [(c["step"], c["digest"]) for c in held["columns"]] == [(s, registry.find(f"0.{s}.0").digest) for s in (1, 2)]
