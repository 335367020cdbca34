"""`streamlearn health` is what a container's health check runs."""

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from streamlearn.cli.health import serve
from streamlearn.cli.healthcheck import health
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.status import Heartbeat


def speaking(home, role, **said):
    heart = Heartbeat(home, role)
    heart.beat(force=True, metrics_port=serve(0, CollectorRegistry(), heart), **said)
    return heart


def asked(*arguments):
    return CliRunner().invoke(health, [*arguments[1:], "--home", str(arguments[0])])


def test_a_role_that_is_well_is_healthy_and_one_that_waits_is_not_ready(tmp_path):
    speaking(tmp_path, "fetch", state="waiting", waiting="no store")
    assert asked(tmp_path, "fetch").exit_code == 0
    found = asked(tmp_path, "fetch", "--ready")
    assert found.exit_code == 1 and "no store" in found.output


def test_without_a_name_every_role_of_the_home_must_be_healthy(tmp_path):
    assert asked(tmp_path).exit_code == 1
    speaking(tmp_path, "train", state="learning")
    assert asked(tmp_path).exit_code == 0
    Heartbeat(tmp_path, "fetch").beat(force=True, state="fetching", metrics_port=1)  # of a process that was killed
    found = asked(tmp_path)
    assert found.exit_code == 1 and "train: good" in found.output and "fetch: not good: no answer on port 1" in found.output
    assert "refused; the last it said: fetching" in found.output and "train: good: learning\n" in found.output


def test_a_role_whose_loop_hangs_is_not_healthy(tmp_path, monkeypatch):
    speaking(tmp_path, "train", state="learning")
    monkeypatch.setattr("streamlearn.contract.status.SILENT_S", -1.0)
    found = asked(tmp_path, "train")
    assert found.exit_code == 1 and "train: not good: learning; its main loop has been silent for 0 s" in found.output


def test_a_proxy_of_the_environment_is_not_asked(tmp_path, monkeypatch):
    speaking(tmp_path, "train", state="learning")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert asked(tmp_path, "train").exit_code == 0


def test_a_role_that_never_spoke_is_named(tmp_path):
    found = asked(tmp_path, "train")
    assert isinstance(found.exception, ConfigError) and "train has not spoken" in str(found.exception)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.0.0.2"])
def test_metrics_answer_on_the_address_that_the_configuration_names(host, tmp_path):
    heart = Heartbeat(tmp_path, "train")
    heart.beat(force=True, metrics_port=serve(0, CollectorRegistry(), heart, host=host), metrics_host=host, state="learning")
    assert asked(tmp_path, "train").exit_code == 0


def test_an_address_that_is_not_of_this_machine_is_named_with_its_key(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics_host = '192\.0\.2\.1'"):
        serve(0, CollectorRegistry(), Heartbeat(tmp_path, "train"), host="192.0.2.1")
