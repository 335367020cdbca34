"""`streamlearn probe`: what a person types, and what it answers when it cannot."""

import json

import pytest
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.contract.config import BankConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import OciLayout
from streamlearn.probes.claims import claim
from streamlearn.probes.measure import Measurer
from streamlearn.probes.turns import alone
from streamlearn.snapshots.publish import publish, results
from tests.probes.world import bank_file, config, evaluator, measure_all
from tests.snapshots.test_publish import export


@pytest.fixture
def home(tmp_path):
    bank_file(tmp_path)
    banks = (BankConfig(name="b", train=str(tmp_path / "bank.parquet"), generation="2026Q4"),)
    settings = config(tmp_path, banks=banks, low_shot_seeds=2)
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    for step in (1, 2):
        publish(OciLayout(tmp_path / "registry"), export(step, seed=step))
    measure_all(evaluator(tmp_path, settings=settings))
    return tmp_path


def run(home, *words):
    return CliRunner().invoke(cli, ["probe", *words, "--home", str(home)])


def test_a_snapshot_is_measured_thoroughly_once_by_command(home):
    first = run(home, "run", "candidate")
    found = json.loads(first.stdout)
    assert first.exit_code == 0 and found["step"] == 2 and {"logistic", "low_shot_10"} <= set(found) and "right" not in found
    assert "logistic sweep" in first.stderr and run(home, "run", "candidate").stderr == ""
    assert len(results(OciLayout(home / "registry"), OciLayout(home / "registry").tags()["candidate"].digest)) == 2


def test_what_another_evaluator_is_measuring_is_left_to_it(home):
    registry = OciLayout(home / "registry")
    digest = registry.tags()["candidate"].digest
    bank = results(registry, digest)[0]["bank_digest"]
    protocol = Measurer(config(home, low_shot_seeds=2).probe, home, alone()).protocol("thorough", 32)
    with claim(home, digest, bank, protocol):
        refused = run(home, "run", "candidate")
    assert isinstance(refused.exception, ConfigError) and "another evaluator" in str(refused.exception)


def test_a_release_is_fine_tuned_and_the_figure_recorded(home):
    words = ("finetune", "candidate", "--bank", "b", "--rule", "seer", "--steps", "2", "--batch", "8", "--px", "24")
    done = run(home, *words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 0 <= found["finetune_seer"] <= 1 and found["finetune_seer_low"] <= found["finetune_seer"]
    assert json.loads(run(home, *words).stdout) == found
    named = [r["protocol"] for r in results(OciLayout(home / "registry"), OciLayout(home / "registry").tags()["candidate"].digest)]
    assert "finetune-seer/1:2steps,b8,27-24px,seed0" in named and len(named) == 2


def test_two_snapshots_are_compared_and_the_matrix_is_shown(home):
    rows = json.loads(run(home, "compare", "0.1.0", "0.2.0", "--json").stdout)
    assert {r["probe"] for r in rows} == {"knn", "ridge"} and all(0 < r["p"] <= 1 for r in rows)
    assert "knn" in run(home, "compare", "0.1.0", "0.2.0").stdout
    whole = json.loads(run(home, "matrix", "--json").stdout)
    assert whole == json.loads((home / "continual.json").read_text())
    shown = run(home, "matrix", "--probe", "ridge").stdout
    assert "2026Q4" in shown and "forgetting: –" in shown
    assert "there are: knn, ridge" in str(run(home, "matrix", "--probe", "logistic").exception)


def test_drift_of_a_home_without_any_is_an_empty_table(home):
    assert run(home, "drift").exit_code == 0 and json.loads(run(home, "drift", "--json").stdout)["sources"] == {}


def test_an_unknown_bank_is_named_with_those_that_there_are(home):
    assert "there are: b; `streamlearn banks add`" in str(run(home, "run", "candidate", "--bank", "x").exception)
