"""What the role `connect` tells those who watch it: the requests to its API, and what it waits for."""

import urllib.error
import urllib.request

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from ingest.api import Api, routes
from streamlearn.contract import metrics
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import StoreFull
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, SqliteLog
from streamlearn.contract.metrics import ConnectMetrics, set_waiting
from tests.ingest.connecting import Role, free_port, make_log, until, urls
from tests.ingest.steps import config, expected, installed


@pytest.fixture(autouse=True)
def steps_class(monkeypatch):
    installed(monkeypatch)


class FullLog(SqliteLog):
    """A disk without room for candidates, or brokers of which some topic is out of reach, until told."""

    full = frozenset()

    def append(self, records):
        if self.full & {record.topic for record in records}:
            raise StoreFull("log.sqlite: database or disk is full", after_s=0.05)
        return super().append(records)

    def table(self, topic):
        if topic in self.full:
            raise StoreFull("log.sqlite: cannot be read", after_s=0.05)
        return super().table(topic)


def waited(role):
    return {on for on in metrics.WAITS_ON if role.metric("connect_waiting_seconds", on=on) > 0}


def test_requests_are_counted_by_path_and_status_and_timed(tmp_path):
    def counted(route, code):
        return role.metric("connect_requests_total", route=route, code=code)

    log = make_log(tmp_path, FullLog)
    with Role(tmp_path, log=log, connectors=(config("c"),)) as role:
        began = counted("/", "2xx")  # by which the test saw that it is up
        role.call("GET", "/")
        role.call("GET", "/connectors/c/status")
        role.call("GET", "/connectors/nobody/status")
        role.call("POST", "/connectors", {"name": 1})
        role.call("GET", "/no/such/path")
        role.call("DELETE", "/health")
        log.full = {CONNECTOR_CONFIGS}
        assert role.call("GET", "/connectors/c/config")[0] == 503
        until(lambda: counted("/connectors/{name}/config", "5xx") == 1)
        assert counted("/", "2xx") == began + 1 and counted("other", "4xx") == 2 and counted("/connectors", "4xx") == 1
        assert [counted("/connectors/{name}/status", code) for code in metrics.ANSWERED] == [1, 0, 1, 0]
        assert role.metric("connect_request_duration_seconds_count", route="/connectors/{name}/status") == 2
        assert role.metric("connect_request_duration_seconds_sum", route="/connectors/{name}/status") > 0


def push(port, body, token):
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/candidates", body, {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as e:
        return e.code
    except urllib.error.URLError:  # it does not listen yet
        return None


def test_pushes_are_counted_by_status_and_timed_until_they_are_durable(tmp_path):
    port = free_port()
    (tmp_path / "token").write_text("secret")
    source = ConnectorConfig.of("push", "webhook", port=port, token_file=str(tmp_path / "token"), settle_s=2.0, poll_s=0.05)
    log = make_log(tmp_path, FullLog)
    with Role(tmp_path, log=log, connectors=(source,)) as role:

        def counted():
            return [role.metric("connect_webhook_requests_total", code=code) for code in metrics.ANSWERED]

        assert counted() == [0, 0, 0, 0]
        until(lambda: push(port, b'{"url": "http://x/0.jpg"}', "wrong") == 401)
        assert [push(port, body, "secret") for body in (b'{"url": "http://x/1.jpg"}', b"{")] == [202, 400]
        log.full = {CANDIDATES}
        assert push(port, b'{"url": "http://x/2.jpg"}', "secret") == 503
        assert counted() == [1, 0, 2, 1]
        assert role.metric("connect_webhook_request_duration_seconds_count") == 4
        assert role.metric("connect_webhook_request_duration_seconds_sum") > 2
        log.full = frozenset()
    assert "http://x/1.jpg" in urls(log)


def test_whatever_is_asked_for_the_series_stay_those_that_were_made_in_advance(tmp_path):
    def series():
        return {(s.name, *sorted(s.labels.items())) for m in role.registry.collect() for s in m.samples}

    with Role(tmp_path, token="secret") as role:
        before = series()
        for name in ("a", "b", "%2e%2e", "c" * 200):
            for path in (f"/{name}", f"/connectors/{name}", f"/connectors/{name}/status", f"/connectors/{name}/tasks/{name}/status"):
                role.call("GET", path)
                role.call("PATCH", path, {"x": name})
        assert role.call("GET", "/connectors", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert series() == before
        assert role.metric("connect_requests_total", route="/connectors", code="4xx") == 1


def test_the_routes_that_are_counted_are_those_that_there_are():
    app = web.Application()
    app.add_routes(routes(Api(Config(), None, None)))
    assert set(metrics.API_ROUTES) == {resource.canonical for resource in app.router.resources()} | {"other"}


@pytest.mark.parametrize("topic", [CANDIDATES, CONNECTOR_CONFIGS])
def test_a_log_that_is_out_is_waited_for_and_said_and_nothing_is_missed_or_twice(tmp_path, topic):
    """Of what the connectors write, and of the orders they are under."""
    log = make_log(tmp_path, FullLog)
    log.full = {topic}
    with Role(tmp_path, log=log, connectors=(config("c"),)) as role:
        until(lambda: role.beat().get("state") == "waiting" and waited(role) == {"disk"})
        said = role.beat()
        assert "log.sqlite" in said["waiting"] and said["waiting_on"] == "disk" and said["waiting_since"]
        assert said["waiting_at"] == ["announce" if topic == CANDIDATES else "book"] and urls(log) == []
        until(lambda: role.beat()["waiting_s"] > said["waiting_s"])  # one wait, not one for each try
        assert role.beat()["waiting_since"] == said["waiting_since"]
        log.full = frozenset()
        until(lambda: urls(log) == expected("c", 5))
        until(lambda: role.beat()["state"] == "watching" and waited(role) == set())
    assert role.error is None and urls(log) == expected("c", 5)


def test_a_source_that_is_out_is_its_connectors_affair(tmp_path):
    (tmp_path / "trouble").write_text("later")
    with Role(tmp_path, connectors=(config("c", trouble=str(tmp_path / "trouble"), at=2),)) as role:
        until(lambda: role.beat().get("connectors", {}).get("c", {}).get("retrying") == "not now")
        assert role.beat()["state"] == "watching" and waited(role) == set()


def test_a_connector_that_is_paused_or_gone_waits_for_nothing(tmp_path):
    log = make_log(tmp_path, FullLog)
    log.full = {CANDIDATES}
    with Role(tmp_path, log=log, connectors=(config("c"), config("d"))) as role:
        until(lambda: waited(role) == {"disk"})
        role.call("PUT", "/connectors/c/pause")
        role.call("PUT", "/connectors/d/stop")
        until(lambda: role.beat()["state"] == "watching" and waited(role) == set())


def test_a_wait_for_something_that_has_no_word_is_shown_too():
    registry = CollectorRegistry()
    gauge = ConnectMetrics(registry).waiting
    set_waiting(gauge, "the moon", 7.0)
    assert [registry.get_sample_value("connect_waiting_seconds", {"on": on}) for on in metrics.WAITS_ON] == [0, 0, 0, 0, 7]
