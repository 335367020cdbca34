"""The evaluator promotes by itself: what is measured, once, where the gate lets it pass; and says what it did not."""

import pytest
import torch

from streamlearn.contract.config import BankConfig
from streamlearn.contract.config_snapshots import GateConfig, SnapshotsConfig
from streamlearn.contract.durable import read_lines
from streamlearn.contract.errors import Retryable
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import read_status
from streamlearn.probes.banks import load_bank
from streamlearn.probes.features import untrained
from streamlearn.probes.promoter import Promoter
from streamlearn.snapshots.history import history
from streamlearn.snapshots.promote import pin, promote, rollback, unpin
from streamlearn.snapshots.publish import publish, steps
from streamlearn.stream.views import normalised
from tests.probes.test_gate import answers, measured
from tests.probes.world import bank_file, config, evaluator, measure_all
from tests.snapshots.channels import snapshot
from tests.snapshots.test_publish import export

BY = dict(by="ann", why="because")


def settings(home, **more):
    return config(home).model_copy(update={"snapshots": SnapshotsConfig(**more)})


def hand(home, registry=None, **more):
    """A promoter without an evaluator about it; measured snapshots are handed to it."""
    role = evaluator(home, registry, settings=settings(home, **{"promote": "never"} | more))
    role.promoter = Promoter(SnapshotsConfig(**more), role.registry, role.metrics, role.heart, home)
    return role.promoter


def all_of(registry):
    return [(step, registry.find(f"0.{step}.0").digest) for step in steps(registry)]


def counted(promoter):
    labels = [(c, v) for c in ("stable", "best") for v in ("promoted", "refused", "waiting")]
    return {at: value for at in labels if (value := promoter.metrics.verdicts.labels(*at)._value.get())}


@pytest.fixture
def home(tmp_path):
    bank_file(tmp_path)
    return tmp_path


@pytest.fixture
def registry(home):
    return OciLayout(home / "registry")


def test_what_is_measured_and_sound_becomes_stable_and_what_has_collapsed_does_not(home, registry):
    made = [export(step, seed=step) for step in (1, 2)]
    dead = {k: torch.zeros_like(v) if k.startswith("s4") and k.endswith("weight") else v for k, v in made[0].weights.items()}
    _, sound = publish(registry, made[0])
    role = evaluator(home)
    assert measure_all(role) == 1 and registry.find("stable").digest == registry.find("best").digest == sound
    assert [(m.by, m.step) for m in history(registry)] == [("evaluate", 1)] * 2
    publish(registry, export(2, weights=dead))
    assert measure_all(role) == 1 and registry.find("stable").digest == sound and len(history(registry)) == 2
    gate = read_status(home)["evaluate"]["gate"]["stable"]
    assert (gate["tag"], gate["verdict"]) == ("0.2.0", "refused") and "collapse alarms on b" in gate["why"]
    assert counted(role.promoter) == {("stable", "promoted"): 1, ("best", "promoted"): 1, ("stable", "refused"): 1, ("best", "refused"): 1}
    assert role.metrics.channel_step.labels("stable")._value.get() == 1
    lines = [(x["channel"], x["step"], x["verdict"]) for x in read_lines(home / "history" / "gate.jsonl")]
    assert lines == [("stable", 1, "promoted"), ("best", 1, "promoted"), ("stable", 2, "refused"), ("best", 2, "refused")]
    again = evaluator(home)
    assert measure_all(again) == 0 and len(history(registry)) == 2


def test_never_means_by_hand_alone(home, registry):
    publish(registry, export(1))
    measure_all(evaluator(home, settings=settings(home, promote="never")))
    assert registry.names() == ["0.1.0", "candidate"]


@pytest.mark.slow
def test_on_real_images_a_better_snapshot_becomes_stable_and_a_damaged_one_is_refused(tmp_path, data_dir):
    """An untrained network with its BatchNorm at rest knows something of CIFAR-10; with noise on every weight, little more than chance."""
    train, test = (str(data_dir / f"cifar10-{part}.parquet") for part in ("train", "test"))
    bank = BankConfig(name="cifar", train=train, test=test, max_train=400, max_test=800)
    rules = config(tmp_path, banks=(bank,), view_images=0).model_copy(update={"snapshots": SnapshotsConfig()})
    images = normalised(load_bank(bank, 32).train.images_NSSC, (0.5,) * 3, (0.2,) * 3)
    sound = untrained("regnety-tiny", "cifar", images, 1).state_dict()
    g = torch.Generator().manual_seed(0)
    damaged = {k: w + 3 * w.std() * torch.randn(w.shape, generator=g) if w.ndim == 4 else w for k, w in sound.items()}
    registry, role = OciLayout(tmp_path / "registry"), evaluator(tmp_path, settings=rules)
    for step, weights in ((1, damaged), (2, sound), (3, damaged)):
        publish(registry, export(step, weights=weights))
        measure_all(role)
        assert [m.step for m in history(registry, "stable")] == [[1], [2, 1], [2, 1]][step - 1], role.promoter.told
    assert "significantly worse: cifar knn" in role.promoter.told["stable"]["why"]


def test_the_newest_that_passes_is_taken_and_each_is_judged_once(home, registry):
    for step, lost in ((1, 0), (2, 0), (3, 60)):
        measured(registry, snapshot(registry, step), knn=answers(lost=lost))
    promote(registry, "stable", "0.1.0", **BY)
    promoter = hand(home)
    for _ in range(3):
        promoter.look(all_of(registry), ["b"])
    assert registry.find("stable").digest == registry.find("0.2.0").digest
    assert counted(promoter)["stable", "refused"] == 2 and counted(promoter)["stable", "promoted"] == 1  # 3 against each of the two holders


def test_a_rollback_stands_and_a_pin_holds_until_it_is_taken_back(home, registry, monkeypatch):
    monkeypatch.setattr("streamlearn.probes.promoter.AGAIN_S", 0.0)
    for step in (1, 2):
        measured(registry, snapshot(registry, step), knn=answers(gained=step))
    promote(registry, "stable", "0.1.0", **BY)
    promoter = hand(home)
    promoter.look(all_of(registry), ["b"])
    assert rollback(registry, "stable", **BY).step == 1
    pin(registry, "stable", **BY)
    promoter.look(all_of(registry), ["b"])
    hand(home).look(all_of(registry), ["b"])
    measured(registry, snapshot(registry, 3), knn=answers())
    for _ in range(2):
        promoter.look(all_of(registry), ["b"])
    assert registry.find("stable").digest == registry.find("0.1.0").digest
    assert promoter.told["stable"] == {"tag": "0.3.0", "verdict": "waiting", "why": "stable is pinned by ann"}
    assert counted(promoter)["stable", "waiting"] == 1  # told once
    unpin(registry, "stable", **BY)
    promoter.look(all_of(registry), ["b"])
    assert registry.find("stable").digest == registry.find("0.3.0").digest


def test_a_result_that_is_damaged_stops_no_other_snapshot(home, registry, caplog):
    for step in (1, 2, 3):
        measured(registry, snapshot(registry, step), knn=answers(), step=step)
    promote(registry, "stable", "0.1.0", **BY)
    promoter = hand(home)
    (result,) = registry.referrers(registry.find("0.3.0").digest)
    path = registry.path(registry.manifest(result.digest)[1]["layers"][0]["digest"])
    path.write_bytes(b"~" + path.read_bytes()[1:])
    promoter.look(all_of(registry), ["b"])
    assert registry.find("stable").digest == registry.find("0.2.0").digest
    told = {(line["step"], line["verdict"]): line["why"] for line in read_lines(home / "history" / "gate.jsonl")}
    assert told[3, "waiting"].startswith("not measured on any bank") and str(path) in caplog.text  # which file it is, stands in the log


def test_a_promoter_that_comes_second_says_so_and_judges_again(home, registry, caplog):
    for step in (1, 2, 3):
        measured(registry, snapshot(registry, step), knn=answers(gained=step))
    promote(registry, "stable", "0.1.0", **BY)

    class Overtaken(OciLayout):
        """Someone promotes 0.2.0 between the verdict and the lock."""

        def locked(self, name, how):
            if name == ".moves.lock" and registry.find("stable").digest == registry.find("0.1.0").digest:
                promote(registry, "stable", "0.2.0", **BY)
            return super().locked(name, how)

    promoter = hand(home, Overtaken(registry.root))
    promoter.look(all_of(registry), ["b"])
    assert registry.find("stable").digest == registry.find("0.2.0").digest and "someone else moved it" in caplog.text
    promoter.look(all_of(registry), ["b"])
    assert [(m.by, m.step) for m in history(registry, "stable")] == [("evaluate", 3), ("ann", 2), ("ann", 1)]


def test_a_registry_out_of_reach_is_the_role_s_to_wait_for_and_nothing_is_forgotten(home, registry):
    measured(registry, snapshot(registry, 1), knn=answers())

    class Away(OciLayout):
        away = True

        def find(self, tag):
            if self.away:
                raise Retryable("away")
            return super().find(tag)

    own = Away(registry.root)
    own.away = False
    promoter, own.away = hand(home, own), True
    with pytest.raises(Retryable):
        promoter.look(all_of(registry), ["b"])
    own.away = False
    promoter.look(all_of(registry), ["b"])
    assert registry.find("stable").digest == registry.find("0.1.0").digest


def test_old_versions_go_where_the_configuration_says_so(home, registry):
    for step in range(1, 6):
        publish(registry, export(step, seed=step))
    role = evaluator(home, settings=settings(home, keep=2, gate=GateConfig(margin=1.0)))
    measure_all(role)
    kept = steps(registry)
    held = {registry.manifest(name)[1]["annotations"]["org.streamlearn.step"] for name in ("stable", "best", "candidate")}
    assert {4, 5} | {int(step) for step in held} <= set(kept) and len(kept) < 5
    assert measure_all(evaluator(home, settings=settings(home, keep=2))) == 0
