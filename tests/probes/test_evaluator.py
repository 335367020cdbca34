"""The evaluator: every (snapshot, bank, protocol) measured once, killed at every write, followed by its pictures; and what it says."""

import json
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prometheus_client import CollectorRegistry

from streamlearn.contract import durable
from streamlearn.contract.config import BankConfig
from streamlearn.contract.durable import read_lines
from streamlearn.contract.metrics import EvaluatorMetrics
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import Heartbeat, read_status
from streamlearn.probes.bank_book import BankBook
from streamlearn.probes.claims import claim
from streamlearn.probes.compare import compare
from streamlearn.probes.evaluator import run_evaluate
from streamlearn.probes.measure import Measurer, open_snapshot
from streamlearn.probes.statistics import unpacked
from streamlearn.probes.turns import Stopped, Turns
from streamlearn.snapshots.publish import publish, results
from tests.probes.world import Killed, bank_file, class_folders, config, evaluator, measure_all, shade
from tests.snapshots.test_package import large
from tests.snapshots.test_publish import export


@pytest.fixture
def home(tmp_path):
    bank_file(tmp_path)
    return tmp_path


def history(home):
    return [line["step"] for line in read_lines(home / "history" / "evaluate.jsonl")]


def test_a_snapshot_under_timm_s_names_is_measured_as_what_it_is(home):
    """Every size that timm has is published so; the networks of the other tests are too small for it."""
    registry = OciLayout(home / "registry")
    exported = large(3, size=64)
    _, digest = publish(registry, exported)
    snapshot = open_snapshot(registry, 3, digest)
    assert snapshot.trunk.state_dict().keys() == exported.weights.keys()
    assert all(torch.equal(snapshot.trunk.state_dict()[name], weight) for name, weight in exported.weights.items())
    role = evaluator(home)
    assert measure_all(role) == 1 and role.failed == {} and 0 <= results(registry, digest)[0]["knn"] <= 1


def test_every_snapshot_is_measured_once_and_the_result_lies_beside_it(home):
    registry = OciLayout(home / "registry")
    digests = [publish(registry, export(step, seed=step))[1] for step in (1, 2)]
    assert measure_all(evaluator(home)) == 2 and measure_all(evaluator(home)) == 0
    for digest in digests:
        (found,) = results(registry, digest)
        assert {
            "knn",
            "ridge",
            "raw_knn",
            "random_knn",
            "effective_rank",
            "rankme",
            "alpha_req",
            "uniformity",
            "alignment",
            "lidar",
            "alarms",
        } <= set(found)
        right = unpacked(found["right"]["knn"], found["images"])
        assert right.mean() == pytest.approx(found["knn"]) and found["knn_low"] <= found["knn"] <= found["knn_high"]
    assert history(home) == [1, 2]


def test_a_result_can_be_made_again_to_the_last_digit(home, tmp_path):
    publish(OciLayout(home / "registry"), export(1))
    measure_all(evaluator(home))
    other = tmp_path / "other"
    other.mkdir()
    bank_file(other)
    _, digest = publish(OciLayout(other / "registry"), export(1))
    measure_all(evaluator(other))
    assert results(OciLayout(other / "registry"), digest) == results(OciLayout(home / "registry"), digest)


def test_the_second_protocol_on_a_bank_needs_no_forward_pass(home):
    _, digest = publish(OciLayout(home / "registry"), export(1))
    measure_all(evaluator(home))
    role = evaluator(home, settings=config(home, thorough="newest", low_shot_seeds=2))
    assert measure_all(role) == 1 and (role.measurer.cache.hits, role.measurer.cache.misses) == (1, 0)
    each, thorough = sorted(results(role.registry, digest), key=lambda r: r["protocol"])
    assert {"logistic", "logistic_low", "logistic_C", "low_shot_1", "low_shot_10", "low_shot_1_deviation"} <= set(
        thorough
    ) and "knn" in each
    assert measure_all(evaluator(home, settings=config(home, thorough="all", low_shot_seeds=2))) == 0


def test_old_snapshots_are_not_opened_again_after_a_restart(home):
    registry = OciLayout(home / "registry")
    _, digest = publish(registry, export(1))
    measure_all(evaluator(home))
    weights = registry.manifest(digest)[1]["layers"][0]["digest"]
    (registry.root / "blobs" / "sha256" / weights[7:]).unlink()
    again = evaluator(home)
    assert measure_all(again) == 0 and again.failed == {}


def test_another_k_is_another_protocol(home):
    _, digest = publish(OciLayout(home / "registry"), export(1))
    for k in (5, 7, 5):
        measure_all(evaluator(home, settings=config(home, k=k)))
    assert (
        len({r["protocol"] for r in results(OciLayout(home / "registry"), digest)})
        == 2
        == len(results(OciLayout(home / "registry"), digest))
    )


def test_killed_at_any_write_nothing_is_recorded_twice_or_lost(home, monkeypatch):
    _, digest = publish(OciLayout(home / "registry"), export(1))
    staged, append = durable._staged, durable.append_line
    measure_all(evaluator(home))
    expected = results(OciLayout(home / "registry"), digest)
    deaths = 0
    for nth, when in ((n, w) for n in range(1, 100) for w in ("before", "after")):
        root = home / f"{nth}{when}"
        root.mkdir()
        bank_file(root)
        if nth > 3:  # the two writes of features and baseline have been died at by then, and the baseline is slow to make
            shutil.copytree(home / "baselines", root / "baselines")
        publish(OciLayout(root / "registry"), export(1))
        left = [nth]

        def dying(write, path, *rest, left=left, when=when):
            left[0] -= 1
            if left[0] == 0 and when == "before":
                raise Killed
            write(path, *rest)
            if left[0] == 0:
                raise Killed

        with monkeypatch.context() as m:
            m.setattr(durable, "_staged", lambda *a, d=dying: d(staged, *a))
            m.setattr(durable, "append_line", lambda *a, d=dying: d(append, *a))
            try:
                measure_all(evaluator(root))
            except Killed:
                deaths += 1
        again = evaluator(root)
        measure_all(again)
        again.overview.write(again.banks.configs())
        assert results(OciLayout(root / "registry"), digest) == expected
        assert json.loads((root / "continual.json").read_text())["probes"]["knn"]["by_snapshot"][0]["scores"] == {
            "b": round(expected[0]["knn"], 6)
        }
        assert history(root) in ([1], [])
        if left[0] > 0:
            break
    assert deaths >= 12  # baseline, features, three blobs and the index, history, continual.json


def test_of_two_evaluators_of_a_home_one_measures(home):
    registry = OciLayout(home / "registry")
    _, digest = publish(registry, export(1))
    role = evaluator(home)
    bank = role.banks.get(role.banks.configs()[0], 32)
    with claim(home, digest, bank.digest, role.measurer.protocol("each", 32)) as ours:
        assert ours and role.measure_next() is False and results(registry, digest) == []
    roles = [evaluator(home) for _ in range(3)]
    threads = [threading.Thread(target=measure_all, args=(r,)) for r in roles]
    [t.start() for t in threads]
    [t.join(120) for t in threads]
    measure_all(role)
    assert len(results(registry, digest)) == 1 and history(home) == [1]


def role_in_a_thread(home, settings):
    stop = threading.Event()
    metrics = EvaluatorMetrics(CollectorRegistry())
    args = (settings, OciLayout(home / "registry"), metrics, Heartbeat(home, "evaluate", period_s=0), stop)
    thread = threading.Thread(target=run_evaluate, args=args, kwargs={"home": home}, daemon=True)
    thread.start()
    return stop, thread, metrics


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        threading.Event().wait(0.1)
    raise AssertionError("never came")


def test_a_damaged_snapshot_is_named_and_the_others_are_measured(home):
    registry = OciLayout(home / "registry")
    (_, bad), (_, good) = publish(registry, export(1)), publish(registry, export(2, seed=2))
    blob = registry.root / "blobs" / "sha256" / registry.manifest(bad)[1]["layers"][0]["digest"][7:]
    blob.write_bytes(blob.read_bytes()[:-10])
    stop, thread, _ = role_in_a_thread(home, config(home))
    wait_for(lambda: results(registry, good) and read_status(home).get("evaluate", {}).get("failed"))
    stop.set()
    thread.join(60)
    assert len(results(registry, good)) == 1 and results(registry, bad) == []
    assert "damaged" in read_status(home)["evaluate"]["failed"][bad]


def test_weights_that_have_diverged_are_named_and_the_next_snapshot_is_measured(home):
    registry = OciLayout(home / "registry")
    weights = dict(export(1).weights)
    weights["stem.conv.weight"] = torch.full_like(weights["stem.conv.weight"], float("nan"))
    _, bad = publish(registry, export(1, weights=weights))
    publish(registry, export(2, seed=2))
    role = evaluator(home)
    measure_all(role)
    assert "not finite" in role.failed[bad] and history(home) == [2]


def test_a_registered_bank_is_measured_without_a_restart_and_refused_once_it_changes(home):
    registry = OciLayout(home / "registry")
    _, first = publish(registry, export(1))
    role = evaluator(home)
    measure_all(role)
    root = class_folders(home / "folders")
    BankBook(home).add(BankConfig(name="folders", train=str(root)))
    assert measure_all(role) == 1 and {r["bank"] for r in results(registry, first)} == {"b", "folders"}
    (root / "class0" / "000.jpg").write_bytes(b"other")
    _, second = publish(registry, export(2, seed=2))
    again = evaluator(home)
    measure_all(again)
    assert {r["bank"] for r in results(registry, second)} == {"b"} and "banks verify folders" in again.banks.refused["folders"]
    assert again.metrics.refused_banks._value.get() == 1


def test_generations_of_two_quarters_make_a_matrix_and_its_metrics(tmp_path):
    banks = []
    for name, first in (("2026Q3", 0), ("2026Q4", 3)):
        path = bank_file(tmp_path, name=f"{name}.parquet", count=90, image=lambda i, c: shade(c, i), first=first)
        banks.append(BankConfig(name=f"bank-{name.lower()}", train=path, generation=name))
    settings = config(tmp_path, banks=tuple(banks))
    registry = OciLayout(tmp_path / "registry")
    for step, end in ((1, "2026-08-01T00:00:00Z"), (2, "2026-09-30T00:00:00Z"), (3, "2026-10-01T00:00:00Z")):
        publish(registry, export(step, seed=step, window=("2026-07-01T00:00:00Z", end)))
    role = evaluator(tmp_path, settings=settings)
    measure_all(role)
    whole = json.loads((tmp_path / "continual.json").read_text())
    found = whole["probes"]["knn"]
    assert whole["schema"] == "streamlearn.continual/1" and found["generations"] == ["2026Q3", "2026Q4"]
    assert [s["step"] for s in found["snapshots"]] == [2, 3] and all(x is not None for line in found["matrix"] for x in line)
    assert set(found["intervals"]) == {"in_domain", "backward", "forward", "forgetting", "backward_transfer"}
    told = {(s.labels["measure"], s.labels["probe"]): s.value for f in role.metrics.transfer.collect() for s in f.samples}
    assert told[("forgetting", "knn")] == found["measures"]["forgetting"] and ("forward_transfer", "ridge") in told


def test_two_snapshots_are_compared_image_by_image(home):
    registry = OciLayout(home / "registry")
    one, other = (publish(registry, export(step, seed=step))[1] for step in (1, 2))
    measure_all(evaluator(home))
    for row in compare(registry, one, other):
        a, b = (unpacked(r["right"][row["probe"]], r["images"]) for d in (one, other) for r in results(registry, d))
        assert row["difference"] == pytest.approx(b.mean() - a.mean()) and row["only_one"] == int((a & ~b).sum()) and 0 < row["p"] <= 1
    assert {row["probe"] for row in compare(registry, one, one)} == {"knn", "ridge"} and all(
        r["p"] == 1 for r in compare(registry, one, one)
    )


def test_a_multi_label_bank_is_measured_by_mean_average_precision(tmp_path):
    g = np.random.default_rng(0)
    labels = [[name for name, chance in (("a", 0.4), ("b", 0.5)) if g.random() < chance] for _ in range(80)]
    pq.write_table(pa.table({"jpeg": [shade(len(x), i) for i, x in enumerate(labels)], "label": labels}), tmp_path / "bank.parquet")
    registry = OciLayout(tmp_path / "registry")
    _, digest = publish(registry, export(1))
    measure_all(evaluator(tmp_path, settings=config(tmp_path, thorough="newest", low_shot_seeds=2)))
    each, thorough = sorted(results(registry, digest), key=lambda r: r["protocol"])
    assert each["metric"] == "map" and "right" not in each and each["knn_low"] <= each["knn"] <= each["knn_high"]
    assert 0 < each["knn_11"] <= 1 and 0 < thorough["logistic"] <= 1 and 0 < thorough["low_shot_10"] <= 1
    publish(registry, export(2, seed=2))
    measure_all(evaluator(tmp_path))
    assert all("p" not in row and "one_interval" in row for row in compare(registry, "0.1.0", "0.2.0"))


def test_the_metrics_have_closed_labels(home):
    publish(OciLayout(home / "registry"), export(1))
    BankBook(home).add(BankConfig(name="mine", train=str(class_folders(home / "folders"))))
    role = evaluator(home)
    measure_all(role)
    banks = {s.labels["bank"] for f in role.metrics.label_free.collect() for s in f.samples}
    assert banks == {"b", "other"}
    alarms = {s.labels["measure"] for f in role.metrics.alarm.collect() for s in f.samples}
    assert {"effective_rank", "code_entropy"} <= alarms and role.metrics.cache_bytes._value.get() > 0


def test_the_measurer_says_what_a_collapsed_network_is(home):
    weights = {k: torch.zeros_like(v) if k.startswith("s4") and k.endswith("weight") else v for k, v in export(1).weights.items()}
    _, digest = publish(OciLayout(home / "registry"), export(1, weights=weights))
    measure_all(evaluator(home))
    (found,) = results(OciLayout(home / "registry"), digest)
    assert {"effective_rank", "uniformity"} <= set(found["alarms"])
    assert Measurer(config(home).probe, home, evaluator(home).turns).protocol("each", 32) == found["protocol"]


def test_a_thorough_measurement_that_is_under_way_ends_when_the_role_is_told_to(home):
    """Minutes of fits: whoever waits for their end kills the role."""
    publish(OciLayout(home / "registry"), export(1))
    role = evaluator(home, settings=config(home, thorough="newest", low_shot_seeds=2))
    assert role.measure_next()  # `each`, which keeps the features
    looks = []

    def told_in_the_middle(_):
        looks.append(1)
        return len(looks) > 20

    role.measurer.turns = Turns(1.0, busy=lambda: False, wait=told_in_the_middle)
    with pytest.raises(Stopped):
        role.measure_next()
    assert len(looks) == 21
