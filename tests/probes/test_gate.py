"""The gate, on answers whose p-values are known; and the evaluator that heeds it."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.__main__ import cli
from streamlearn.contract.config_snapshots import GateConfig
from streamlearn.contract.registry import OciLayout
from streamlearn.probes.gate import judge
from streamlearn.probes.statistics import holm, packed, unpaired, wilson
from streamlearn.snapshots.promote import pin, promote, rollback, unpin
from streamlearn.snapshots.publish import record_result
from tests.snapshots.channels import snapshot

BY = dict(by="ann", why="because")
WIDE = GateConfig(margin=1.0)  # so that only significance speaks


@pytest.fixture
def registry(tmp_path):
    return OciLayout(tmp_path / "registry")


def answers(images=1000, right=500, lost=0, gained=0):
    """The first `right` images, less the first `lost`, and `gained` others."""
    hit = np.zeros(images, bool)
    hit[lost : right + gained] = True
    return hit


def measured(registry, digest, bank="b", *, bank_digest="", protocol="each/2:x", alarms=(), step=0, **right):
    """Record it; `right`: probe -> which test images were right."""
    found = {
        "bank": bank,
        "bank_digest": bank_digest or f"sha256:{bank}",
        "protocol": protocol,
        "alarms": list(alarms),
        "step": step,
        "effective_rank": 2.5,
    }
    found["images"] = len(next(iter(right.values())))
    for probe, hit in right.items():
        low, high = wilson(int(hit.sum()), len(hit))
        found |= {probe: float(hit.mean()), f"{probe}_low": low, f"{probe}_high": high}
    found["right"] = {probe: packed(hit) for probe, hit in right.items()}
    record_result(registry, digest, found)


def pair(registry, held, new, **more):
    """A holder of `stable` and a candidate, with their answers by k-NN on one bank."""
    a, b = snapshot(registry, 1), snapshot(registry, 2)
    promote(registry, "stable", a, **BY)
    measured(registry, a, knn=held)
    measured(registry, b, knn=new, **more)
    return a, b


def test_no_significant_loss_passes_and_a_significant_one_does_not(registry):
    """9 lost and 1 gained of 10: p = 2 (1 + 10) / 2^10 = 0.0215.  8 and 2: 2 (1 + 10 + 45) / 2^10 = 0.109."""
    a, b = pair(registry, answers(), answers(lost=9, gained=1))
    verdict = judge(registry, b, "stable", WIDE)
    assert verdict.outcome == "refused" and "significantly worse: b knn 0.5000 -> 0.4920" in verdict.why and verdict.against == a
    (figure,) = verdict.figures
    assert figure.p == figure.adjusted == pytest.approx(22 / 1024) and figure.difference == pytest.approx(-0.008)
    c = snapshot(registry, 3)
    measured(registry, c, knn=answers(lost=8, gained=2))
    verdict = judge(registry, c, "stable", WIDE)
    assert verdict.outcome == "promoted" and verdict.figures[0].p == pytest.approx(112 / 1024) and "-0.0060" in verdict.why
    assert judge(registry, c, "stable", GateConfig(margin=1.0, alpha=0.2)).outcome == "refused"


def test_a_significant_gain_on_one_bank_does_not_pay_for_a_loss_on_an_old_one(registry):
    _, b = pair(registry, answers(), answers(gained=300))
    measured(registry, registry.find("stable").digest, "old", knn=answers())
    measured(registry, b, "old", knn=answers(lost=60))
    verdict = judge(registry, b, "stable", WIDE)
    assert verdict.outcome == "refused" and len(verdict.reasons) == 1 and "worse: old knn" in verdict.why and len(verdict.figures) == 2


def test_over_many_banks_holm_asks_for_more(registry):
    """p = 0.0215 on one of ten banks is what chance gives: 10 x 0.0215 > 0.05; p = 2 / 2^14 is not."""
    a, b = pair(registry, answers(), answers(lost=9, gained=1))
    for i in range(9):
        for digest in (a, b):
            measured(registry, digest, f"b{i}", knn=answers())
    verdict = judge(registry, b, "stable", WIDE)
    assert verdict.outcome == "promoted" and min(f.adjusted for f in verdict.figures) == pytest.approx(220 / 1024)
    c = snapshot(registry, 3)
    measured(registry, c, knn=answers(lost=14))
    for i in range(9):
        measured(registry, c, f"b{i}", knn=answers())
    verdict = judge(registry, c, "stable", WIDE)
    assert verdict.outcome == "refused" and min(f.adjusted for f in verdict.figures) == pytest.approx(20 / 2**14)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps):
    adjusted = holm(ps)
    for alpha in (0.01, 0.05, 0.3):
        rejected, order = set(), sorted(range(len(ps)), key=lambda i: ps[i])
        for rank, i in enumerate(order):
            if ps[i] * (len(ps) - rank) >= alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p < alpha} == rejected
    assert all(q >= p for p, q in zip(ps, adjusted, strict=True)) and holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_bank_too_small_to_rule_a_loss_out_lets_nothing_pass(registry):
    """3 lost of 40: p = 0.25, but -0.075 +- 0.082 may be -0.157."""
    _, b = pair(registry, answers(40, 20), answers(40, 20, lost=3))
    verdict = judge(registry, b, "stable")
    assert verdict.outcome == "refused" and "a loss of 0.05 is not ruled out" in verdict.why and verdict.figures[0].p == 0.25
    assert verdict.figures[0].low == pytest.approx(-0.075 - 1.96 * math.sqrt(3 - 9 / 40) / 40, abs=1e-4)
    assert judge(registry, b, "stable", GateConfig(margin=0.2)).outcome == "promoted"


def test_a_bank_of_the_holder_that_is_not_measured_yet_is_waited_for(registry):
    a, b = pair(registry, answers(), answers(gained=50))
    measured(registry, a, "old", knn=answers())
    verdict = judge(registry, b, "stable")
    assert verdict.outcome == "waiting" and "not measured on old" in verdict.why and len(verdict.figures) == 1
    assert judge(registry, b, "stable", banks=["b", "old"]).outcome == "waiting"
    assert judge(registry, b, "stable", banks=["b"]).outcome == "promoted"  # `old` can be measured no more
    measured(registry, b, "old", protocol="each/2:other", knn=answers())
    assert judge(registry, b, "stable").outcome == "waiting"  # by another protocol: not comparable
    measured(registry, b, "old", knn=answers())
    assert judge(registry, b, "stable").outcome == "promoted"


def test_a_bank_that_has_changed_is_compared_as_it_is_now(registry):
    a, _ = pair(registry, answers(), answers(gained=50))
    measured(registry, a, "b", bank_digest="sha256:new", knn=answers())
    c = snapshot(registry, 3)
    measured(registry, c, "b", bank_digest="sha256:new", knn=answers(gained=9))
    assert judge(registry, c, "stable", banks=["b"]).outcome == "promoted"


def test_alarms_first_holders_and_earlier_steps(registry):
    zero, one = snapshot(registry, 1), snapshot(registry, 2)
    assert judge(registry, one, "stable").reasons == ("not measured on any bank yet",)
    measured(registry, one, alarms=["effective_rank"], knn=answers())
    verdict = judge(registry, one, "stable")
    assert verdict.outcome == "refused" and verdict.reasons == ("collapse alarms on b: effective_rank 2.5",)
    two = snapshot(registry, 3)
    measured(registry, two, knn=answers())
    verdict = judge(registry, two, "stable")
    assert verdict.outcome == "promoted" and "first holder" in verdict.why and verdict.against == ""
    promote(registry, "stable", two, **BY)
    measured(registry, zero, knn=answers(gained=100))
    assert "step 1 is not later" in judge(registry, zero, "stable").why and "already" in judge(registry, two, "stable").why
    assert judge(registry, "0.3.0", "best").outcome == "promoted"


def test_what_was_rolled_back_from_is_not_promoted_again_and_a_pinned_channel_waits(registry):
    _, b = pair(registry, answers(), answers(gained=50))
    promote(registry, "stable", b, **BY)
    rollback(registry, "stable", by="bob", why="strange features")
    for channel in ("stable", "best"):
        verdict = judge(registry, b, channel)
        assert verdict.outcome == "refused" and "by bob: strange features" in verdict.why
    c = snapshot(registry, 3)
    measured(registry, c, knn=answers(gained=50))
    pin(registry, "stable", **BY)
    assert (verdict := judge(registry, c, "stable")).outcome == "waiting" and verdict.why == "stable is pinned by ann"
    unpin(registry, "stable", **BY)
    assert judge(registry, c, "stable").outcome == "promoted"


def test_best_is_whose_figure_is_highest(registry):
    a, b, c = (snapshot(registry, step) for step in (1, 2, 3))
    promote(registry, "best", b, **BY)
    for digest, knn, ridge in ((a, 1, 0), (b, 0, 0), (c, -5, 30)):
        measured(registry, digest, "b", knn=answers(lost=max(0, -knn), gained=max(0, knn)), ridge=answers(gained=ridge))
        measured(registry, digest, "other", knn=answers(gained=8 * (digest == c)))
    assert judge(registry, a, "best").outcome == "promoted"  # an earlier step, +0.0005
    assert judge(registry, a, "best", GateConfig(best_significant=True)).outcome == "refused"
    assert judge(registry, c, "best").outcome == "promoted"  # (-5 + 8) / 2 of 1,000
    for rule, outcome in ((GateConfig(best_bank="b"), "refused"), (GateConfig(best_bank="other"), "promoted")):
        assert judge(registry, c, "best", rule).outcome == outcome
    significant = judge(registry, c, "best", GateConfig(best_bank="b", best_probe="ridge", best_significant=True))
    assert significant.outcome == "promoted" and significant.figures[0].p == pytest.approx(2 / 2**30)
    assert judge(registry, c, "best", GateConfig(best_probe="logistic")).outcome == "waiting"


def test_a_multi_label_bank_has_no_answers_and_is_judged_by_its_intervals(registry):
    a, b = snapshot(registry, 1), snapshot(registry, 2)
    promote(registry, "stable", a, **BY)
    for digest, at in ((a, 0.5), (b, 0.4)):
        record_result(
            registry,
            digest,
            {
                "bank": "voc",
                "bank_digest": "sha256:v",
                "protocol": "each/2:x",
                "alarms": [],
                "knn": at,
                "knn_low": at - 0.03,
                "knn_high": at + 0.03,
                "images": 9,
            },
        )
    verdict = judge(registry, b, "stable", WIDE)
    half = math.hypot(0.03, 0.03)
    assert (
        verdict.outcome == "refused"
        and verdict.figures[0].low == pytest.approx(-0.1 - half)
        and verdict.figures[0].p == pytest.approx(math.erfc(0.1 / half * 1.96 / math.sqrt(2)), rel=1e-3)
    )
    assert unpaired(0.5, 0.5, (0.4, 0.6), (0.4, 0.6))[2] == 1 and unpaired(0.4, 0.5, (0.4, 0.4), (0.5, 0.5)) == pytest.approx((0.1, 0.1, 0))


def test_by_hand_the_gate_speaks_first_and_force_goes_past_it(registry, tmp_path):
    a, b = pair(registry, answers(), answers(lost=40))
    home, run = ["--home", str(tmp_path)], CliRunner()
    said = run.invoke(cli, ["snapshots", "promote", "0.2.0", *home])
    assert said.exit_code == 1 and "the gate: refused" in said.output and registry.find("stable").digest == a
    done = run.invoke(
        cli, ["snapshots", "promote", "0.2.0", "--force", "--by", "bob", "--why", "a test", "--json", *home], catch_exceptions=False
    )
    assert done.exit_code == 0 and registry.find("stable").digest == b and json.loads(done.output)["verdict"]["outcome"] == "refused"
    assert run.invoke(cli, ["snapshots", "rollback", "--why", "enough", *home]).exit_code == 0 and registry.find("stable").digest == a
    two, one, _ = json.loads(run.invoke(cli, ["snapshots", "history", "--json", *home]).output)
    assert (two["kind"], one["kind"], one["by"], one["why"], one["forced"]) == ("rollback", "promote", "bob", "a test", True)
    assert one["verdict"]["figures"][0]["p"] == pytest.approx(2 / 2**40)
    for command in ("pin", "unpin"):
        assert run.invoke(cli, ["snapshots", command, *home]).exit_code == 0
    assert "unpin" in run.invoke(cli, ["snapshots", "history", "--channel", "stable", *home]).output
    c = snapshot(registry, 3)
    measured(registry, c, knn=answers())
    dry = run.invoke(cli, ["snapshots", "promote", "0.3.0", "--dry-run", *home])
    assert dry.exit_code == 0 and "the gate: promoted" in dry.output and registry.find("stable").digest == a
