"""Fréchet-64: the formula, its false alarms and detections, and the watch over sources, killed at every step."""

import json
import threading

import numpy as np
import pytest
import scipy.linalg
import torch
from prometheus_client import CollectorRegistry

from streamlearn.contract import durable
from streamlearn.contract.catalog import Advance, DeltaCatalog, ShardRow
from streamlearn.contract.config import ConnectorConfig
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.metrics import EvaluatorMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.shards import STORED, Outcome, ShardWriter, shard_key, sidecar_key, write_sidecar
from streamlearn.probes.drift import Moments, Reference, frechet
from streamlearn.probes.drift_watch import DriftWatch, read_state
from streamlearn.probes.turns import Stopped, alone, turns_of
from streamlearn.snapshots.publish import publish
from tests.probes.world import Killed, config, shade
from tests.snapshots.test_publish import export


def points(n, d=8, shift=0.0, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    return scale * torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + shift


def test_the_distance_equals_the_formula_with_scipys_matrix_root():
    one, other = points(300), points(200, shift=0.3, scale=1.4, seed=1)
    a, b = (np.cov(x.numpy().T) for x in (one, other))
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(scipy.linalg.sqrtm(a @ b)))
    assert frechet(Moments.of(one), Moments.of(other)) == pytest.approx(float(expected), rel=1e-9)
    assert frechet(Moments.of(one), Moments.of(one)) == pytest.approx(0.0, abs=1e-9)


def test_the_distance_in_closed_form():
    eye = torch.eye(5, dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    assert frechet(Moments(zero, eye), Moments(zero + 2, 9 * eye)) == pytest.approx(5 * 4 + 5 * (3 - 1) ** 2)
    assert frechet(Moments(zero, 0 * eye), Moments(zero, eye)) == pytest.approx(5.0)


def test_the_reference_spans_its_principal_components():
    x = points(500, d=20)
    found = Reference(x, components=4)
    power, axes = np.linalg.eigh(np.cov(x.numpy().T))
    assert np.allclose(np.sort(found.moments.covariance_PP.diagonal().numpy())[::-1], power[::-1][:4])
    assert np.allclose(np.abs((found.axes_PD.numpy() * axes.T[::-1][:4]).sum(1)), 1)


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_asked_and_changes_are_found():
    reference = Reference(points(1024, d=24))
    limit = reference.threshold(1024, false_alarm=0.05, seed=0)
    assert limit == reference.threshold(1024, false_alarm=0.05, seed=0)
    same = [reference.distance(points(1024, d=24, seed=s)) > limit for s in range(1, 101)]
    assert sum(same) <= 14  # 5 in the mean; more than 14 of 100 happens once in 6,000 times
    assert (
        reference.distance(points(1024, d=24, shift=1.0, seed=3)) > limit
        and reference.distance(points(1024, d=24, scale=1.2, seed=3)) > limit
    )


class World:
    """A home whose sources store images: one shard a call."""

    def __init__(self, home):
        self.home, self.end = home, 0
        self.catalog, self.store = DeltaCatalog(str(home / "store" / "catalog"), log_id="x"), FolderStore(home / "store")
        self.registry = OciLayout(home / "registry")
        self.metrics = EvaluatorMetrics(CollectorRegistry())

    def seal(self, source, kind, count):
        staged, first = self.home / "staged.tar", self.end
        writer, outcomes = ShardWriter(staged), []
        for offset in range(first, first + count):
            data = shade(kind, offset)
            start = writer.add(offset, data, "png", {})
            outcomes.append(Outcome(offset=offset, outcome=STORED, source=source, ext="png", member_offset=start, member_size=len(data)))
        sha256, size = writer.close()
        key = shard_key("2026-11-21", "candidates", 0, first, first + count, sha256)
        self.store.put_file(key, staged)
        write_sidecar(self.home / "side.parquet", outcomes)
        self.store.put_file(sidecar_key(key), self.home / "side.parquet")
        self.end = first + count
        row = ShardRow(
            key=key, sha256=sha256, bytes=size, num_samples=count, topic="candidates", partition=0, first_offset=first, end_offset=self.end,
            first_fetched_at="2026-11-21T00:00:00Z", last_fetched_at="2026-11-21T00:00:00Z", day="2026-11-21",
        )  # fmt: skip
        self.catalog.commit([row], [Advance("candidates", 0, first, self.end)])
        return key

    def watch(self, turns=None, **more):
        settings = config(self.home, drift_window=256, **more).model_copy(
            update={"connectors": (ConnectorConfig.of("web", "urls", path="x"),)}
        )
        self.now = getattr(self, "now", 0.0)

        def clock():
            self.now += 1000  # every look is due
            return self.now

        return DriftWatch(
            settings, self.registry, self.catalog, self.store, home=self.home, metrics=self.metrics, turns=turns or alone(), clock=clock
        )

    def found(self, source="web"):
        return [w["found"] for w in read_state(self.home)["sources"][source]["windows"]]


def look_all(watch):
    return sum(1 for _ in iter(watch.look, False))


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    publish(made.registry, export(1))
    return made


def test_a_source_that_changes_is_told_from_one_that_does_not(world):
    watch = world.watch()
    for source, kinds in (("web", (0, 0, 3)), ("folder", (1, 1, 1))):
        for kind in kinds:
            world.seal(source, kind, 256)
            assert look_all(watch) == 1
    assert world.found("web") == ["reference", "same", "drift"] and world.found("folder") == ["reference", "same", "same"]
    window = read_state(world.home)["sources"]["web"]["windows"][2]
    assert window["distance"] > window["threshold"] > 0 and window["images"] == 256
    told = {
        (s.name, s.labels.get("source"), s.labels.get("found")): s.value
        for m in (world.metrics.drift, world.metrics.drift_windows)
        for f in m.collect()
        for s in f.samples
    }
    assert (
        told[("evaluator_drift_frechet", "web", None)] == window["distance"]
        and told[("evaluator_drift_windows_total", "other", "same")] == 2
    )


def test_only_the_newest_whole_window_is_measured_and_the_rest_is_counted(world):
    watch = world.watch()
    assert watch.look() is False
    world.seal("web", 0, 300)
    world.seal("web", 0, 100)
    world.seal("rare", 0, 20)
    assert look_all(watch) == 1 and world.found() == ["reference"]
    state = read_state(world.home)["sources"]
    assert state["web"]["passed_over"] == 144 and len(state["rare"]["waiting"]) == 20
    again = world.watch()  # a restart reads nothing twice
    assert look_all(again) == 0
    world.seal("rare", 0, 236)
    assert look_all(again) == 1 and world.found("rare") == ["reference"]


def test_between_two_windows_of_a_source_lies_its_period(world):
    watch = world.watch(drift_period_s=5000.0)
    world.seal("web", 0, 256)
    watch.look()
    world.seal("web", 0, 256)
    looks = 0
    while len(world.found()) < 2:
        watch.look()
        looks += 1
    assert looks > 1


def test_the_reference_keeps_its_snapshot_until_that_has_gone(world):
    watch = world.watch()
    world.seal("web", 0, 256)
    look_all(watch)
    first = read_state(world.home)["sources"]["web"]["snapshot"]["digest"]
    _, second = publish(world.registry, export(2, seed=5))
    world.seal("web", 0, 256)
    look_all(watch)
    assert read_state(world.home)["sources"]["web"]["snapshot"]["digest"] == first != second
    (world.registry.root / "blobs" / "sha256" / first[7:]).unlink()
    world.seal("web", 0, 256)
    look_all(watch)
    assert read_state(world.home)["sources"]["web"]["snapshot"]["digest"] == second and world.found() == ["reference", "same", "reference"]


def test_shards_that_are_gone_leave_a_window_that_is_passed_over(world):
    watch = world.watch()
    key = world.seal("web", 0, 256)
    world.store.delete(key)
    assert watch.look() is True and read_state(world.home)["sources"] == {}
    world.seal("web", 0, 256)
    assert look_all(watch) == 1 and world.found() == ["reference"]


def test_killed_at_any_write_each_window_is_there_once_with_the_same_figures(world, monkeypatch, tmp_path):
    world.seal("web", 0, 256)
    look_all(world.watch())
    world.seal("web", 3, 256)
    staged = durable._staged
    outcomes = set()
    before = (world.home / "drift" / "state.json").read_bytes()
    for when in ("before", "after"):
        (world.home / "drift" / "state.json").write_bytes(before)

        def dying(path, data, put, when=when):
            if when == "after":
                staged(path, data, put)
            raise Killed

        with monkeypatch.context() as m:
            m.setattr(durable, "_staged", dying)
            with pytest.raises(Killed):
                look_all(world.watch())
        look_all(world.watch())
        assert world.found() == ["reference", "drift"]
        outcomes.add(tuple((w["distance"], w["threshold"]) for w in read_state(world.home)["sources"]["web"]["windows"][1:]))
    assert len(outcomes) == 1


def test_a_lost_reference_begins_anew_and_a_damaged_state_is_named(world):
    watch = world.watch()
    world.seal("web", 0, 256)
    look_all(watch)
    next((world.home / "drift").glob("*.safetensors")).write_bytes(b"x")
    world.seal("web", 0, 256)
    look_all(world.watch())
    assert world.found() == ["reference", "reference"]
    (world.home / "drift" / "state.json").write_text(json.dumps({"schema": "else/9"}))
    with pytest.raises(Corrupt, match=r"drift/state\.json: schema 'else/9'.*delete it"):
        world.watch()


def test_a_role_that_is_asked_to_end_ends_between_two_batches(world):
    stop = threading.Event()
    stop.set()
    world.seal("web", 0, 256)
    with pytest.raises(Stopped):
        world.watch(turns_of(world.home, "cpu", "cpu", 0.5, stop)).look()
    assert read_state(world.home)["sources"] == {}
