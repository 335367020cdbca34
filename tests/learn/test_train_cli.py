"""`streamlearn train`: what an operator says reaches the store, and what a learner did with it is shown."""

import json

import pytest
from click.testing import CliRunner

from streamlearn.cli.learner import drift, errors
from streamlearn.cli.train import train
from streamlearn.contract.config import Config
from streamlearn.contract.config_probe import BankConfig, ProbeConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.orders import Order, read_order, send
from streamlearn.contract.registry import OciLayout
from streamlearn.learn.inputs import Inputs, Sources, Window
from streamlearn.learn.state import fresh_state
from streamlearn.snapshots.publish import publish, record_result
from tests.learn.test_run import Shelf, learn
from tests.learn.world import small_config


@pytest.fixture
def home(tmp_path):
    (tmp_path / "config.json").write_text(Config().model_dump_json())
    return tmp_path


def said(home, *args):
    return CliRunner().invoke(train, ["lr", "--home", str(home), *args])


def test_an_order_lies_in_the_store_with_who_gave_it_and_why(home):
    assert "order 1: " in said(home, "--set", "0.05", "--reason", "too fast").output
    order = read_order(FolderStore(home / "store"), 1)
    assert (order.action, order.value, order.reason) == ("set", 0.05, "too fast") and "@" in order.by and order.at.endswith("Z")
    assert "order 2: " in said(home, "--hold").output


def test_two_orders_at_once_a_rate_that_is_none_and_a_home_that_is_none_are_refused(home, tmp_path):
    for args, why in ((("--hold", "--halve"), "one order at a time"), (("--set", "0"), "must be a number above 0")):
        found = said(home, *args)
        assert isinstance(found.exception, ConfigError) and why in str(found.exception)
    assert isinstance(said(tmp_path / "none").exception, ConfigError)
    assert FolderStore(home / "store").list("") == []


def test_it_shows_which_orders_are_in_force_since_when(home):
    store = FolderStore(home / "store")
    send(store, Order("halve", by="ann@desk"))
    assert json.loads(said(home, "--json").output)["orders"][0]["in_force_from"] is None
    state = fresh_state(small_config())
    inputs = Inputs(store, state, Sources())
    inputs.look()
    inputs.take(state)
    shown = json.loads(said(home, "--json").output)
    assert [(o["number"], o["order"]["by"], o["in_force_from"]) for o in shown["orders"]] == [(1, "ann@desk", 0)]
    assert "no learner has said anything" in said(home).output and "ann@desk" in said(home).output


def test_errors_are_those_of_the_bank_that_was_asked_for(tmp_path):
    registry = OciLayout(tmp_path / "registry")
    shelf = Shelf()
    learn(tmp_path / "run", 12, shelf)
    for step, (_, export) in sorted(shelf.exports.items()):
        _, digest = publish(registry, export)
        if step != 8:
            for bank, accuracy in (("birds", 0.7), ("cars", 0.2)):
                record_result(
                    registry, digest, {"bank": bank, "bank_digest": f"sha256:{bank}", "protocol": "p", "knn": 0.1, "ridge": accuracy}
                )
    assert errors(registry, "birds", 0) == [(4, pytest.approx(0.3)), (12, pytest.approx(0.3))]
    assert errors(registry, "birds", 4) == [(12, pytest.approx(0.3))] and errors(registry, "", 0) == []


def test_drift_is_what_the_watch_last_found_of_each_source(tmp_path):
    assert drift(tmp_path) == {}
    windows = [{"found": "reference"}, {"found": "drift", "distance": 2.0, "threshold": 1.0}]
    sources = {"web": {"windows": windows}, "new": {"windows": windows[:1]}, "quiet": {"windows": []}}
    (tmp_path / "drift").mkdir()
    (tmp_path / "drift" / "state.json").write_text(json.dumps({"schema": "streamlearn.drift/1", "version": 3, "sources": sources}))
    assert drift(tmp_path) == {"web": Window(2.0, 1.0)}
    (tmp_path / "drift" / "state.json").write_text("{")
    assert drift(tmp_path) == {}


def test_a_bank_that_is_not_configured_is_refused_and_auto_is_the_first():
    banks = ProbeConfig(banks=(BankConfig(name="birds", train="b"), BankConfig(name="cars", train="c")))

    def asked(probe):
        return Config.model_validate({"probe": banks, "train": {"plateau": {"probe": probe}}}).plateau_bank

    assert [asked(p) for p in ("auto", "cars", "none")] == ["birds", "cars", ""] and Config().plateau_bank == ""
    with pytest.raises(ValueError, match="no bank of .* has this name; there are: birds, cars"):
        asked("planes")
