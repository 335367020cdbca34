"""The cache gives back what was put, or nothing; within its budget; whatever kills it."""

import os

import pytest
import torch

from streamlearn.contract import durable
from streamlearn.probes.feature_cache import LITTER_S, FeatureCache
from tests.probes.world import Killed


def tensors(seed=0, n=100):
    return {"train": torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), "test": torch.ones(3, 8)}


def never():
    raise AssertionError("it was there")


def test_features_are_made_once_for_each_snapshot_bank_and_protocol(tmp_path):
    cache = FeatureCache(tmp_path, 2**20)
    first = cache.get("s", "b", "p", tensors)
    again = FeatureCache(tmp_path, 2**20).get("s", "b", "p", never)
    assert all(torch.equal(first[k], again[k]) for k in first)
    for key in (("t", "b", "p"), ("s", "c", "p"), ("s", "b", "q"), ("sb", "", "p")):
        assert torch.equal(cache.get(*key, lambda: tensors(1))["train"], tensors(1)["train"])
    assert (cache.hits, cache.misses) == (0, 5)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    cache = FeatureCache(tmp_path, 2**20)
    cache.get("s", "b", "p", tensors)
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"cut": bytes(data[:-10]), "flipped": bytes(data), "empty": b""}[damage])
    assert torch.equal(cache.get("s", "b", "p", tensors)["train"], tensors()["train"]) and cache.misses == 2
    assert cache.get("s", "b", "p", never)


def test_the_least_lately_used_makes_room(tmp_path):
    cache = FeatureCache(tmp_path, 14_000)  # three entries of about 3.5 kB, not five
    for i in range(3):
        cache.get(str(i), "b", "p", tensors)
        (newest,) = [p for p in tmp_path.glob("*.safetensors") if p == cache._path(str(i), "b", "p")]
        os.utime(newest, (i, i))
    cache.get("0", "b", "p", never)  # used just now
    cache.get("3", "b", "p", tensors)
    cache.get("4", "b", "p", tensors)
    kept = {i for i in range(5) if cache._path(str(i), "b", "p").exists()}
    assert kept == {0, 3, 4} and cache.bytes() <= 14_000


def test_what_is_larger_than_the_budget_is_not_kept(tmp_path):
    cache = FeatureCache(tmp_path, 1000)
    cache.get("s", "b", "p", tensors)
    assert cache.bytes() == 0 and torch.equal(cache.get("s", "b", "p", tensors)["train"], tensors()["train"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_its_commit_point_the_entry_is_whole_or_absent(tmp_path, monkeypatch, when):
    write = durable.write

    def dying(path, data):
        if when == "after":
            write(path, data)
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(durable, "write", dying)
        with pytest.raises(Killed):
            FeatureCache(tmp_path, 2**20).get("s", "b", "p", tensors)
    made = []
    found = FeatureCache(tmp_path, 2**20).get("s", "b", "p", lambda: made.append(1) or tensors())
    assert len(made) == (when == "before") and torch.equal(found["train"], tensors()["train"])


def test_unfinished_files_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path):
    old, young = tmp_path / ".a.safetensors.00.tmp", tmp_path / ".b.safetensors.00.tmp"
    old.write_bytes(b"x"), young.write_bytes(b"x")
    os.utime(old, (old.stat().st_mtime - LITTER_S - 1,) * 2)
    FeatureCache(tmp_path, 2**20)
    assert not old.exists() and young.exists()
