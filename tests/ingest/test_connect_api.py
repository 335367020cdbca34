"""The REST API in Connect's shape, over real HTTP, of the real role."""

import pytest
from prometheus_client import CollectorRegistry

from ingest.api import serve
from ingest.connectors import plugins
from streamlearn.contract.config import ConnectConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import ConnectMetrics
from tests.ingest import steps
from tests.ingest.connecting import Role, until, urls
from tests.ingest.steps import expected


@pytest.fixture(autouse=True)
def steps_class(monkeypatch):
    monkeypatch.setitem(plugins.BUILT_IN, "steps", "tests.ingest.steps:Steps")
    steps.OPEN.clear()


FLAT = {"connector.class": "steps", "steps": "5", "poll.interval.ms": "50"}
IN_FILE = {"name": "fixed", "class": "steps", "steps": 2, "poll_s": 0.05}


@pytest.fixture
def role(tmp_path):
    with Role(tmp_path, connectors=(IN_FILE,)) as role:
        yield role


def test_a_connectors_life(role):
    status, made = role.call("POST", "/connectors", {"name": "c", "config": FLAT})
    info = {"name": "c", "config": {"name": "c"} | FLAT, "tasks": [{"connector": "c", "task": 0}], "type": "source"}
    assert (status, made) == (201, info)
    assert role.call("GET", "/connectors") == (200, ["c", "fixed"])
    assert role.call("GET", "/connectors/c") == (200, info) and role.call("GET", "/connectors/c/config") == (200, info["config"])
    assert role.call("GET", "/connectors/c/tasks") == (200, [{"id": info["tasks"][0], "config": info["config"]}])
    assert role.call("GET", "/connectors/c/topics") == (200, {"c": {"topics": ["candidates", "dead-letters"]}})
    role.reaches("c", "RUNNING")
    worker = f"127.0.0.1:{role.port}"
    status = {
        "name": "c",
        "connector": {"state": "RUNNING", "worker_id": worker},
        "tasks": [{"id": 0, "state": "RUNNING", "worker_id": worker}],
        "type": "source",
    }
    assert role.call("GET", "/connectors/c/status") == (200, status)
    assert role.call("GET", "/connectors/c/tasks/0/status") == (200, status["tasks"][0])
    expanded = role.call("GET", "/connectors?expand=status&expand=info")[1]
    assert expanded["c"] == {"status": status, "info": info} and set(expanded) == {"c", "fixed"}
    until(lambda: len(urls(role.log, "c")) == 5)
    assert role.call("PUT", "/connectors/c/config", FLAT | {"steps": "7"})[0] == 200
    until(lambda: urls(role.log, "c") == expected("c", 7))
    assert role.call("POST", "/connectors/c/restart") == (204, None)
    assert role.call("DELETE", "/connectors/c") == (204, None) and role.call("GET", "/connectors/c/status")[0] == 404
    until(lambda: len(steps.OPEN) == 1)


def test_offsets_are_told_and_only_a_stopped_connector_forgets_them(role):
    until(lambda: len(urls(role.log, "fixed")) == 2)
    told = {"offsets": [{"partition": {"connector": "fixed"}, "offset": {"step": 2}}]}
    until(lambda: role.call("GET", "/connectors/fixed/offsets") == (200, told))
    status, error = role.call("DELETE", "/connectors/fixed/offsets")
    assert status == 409 and error["error_code"] == 409 and "is not stopped" in error["message"]
    role.call("PUT", "/connectors/fixed/stop")
    role.reaches("fixed", "STOPPED")
    assert role.call("DELETE", "/connectors/fixed/offsets")[0] == 200
    assert role.call("GET", "/connectors/fixed/offsets") == (200, {"offsets": []})
    role.call("PUT", "/connectors/fixed/resume")
    until(lambda: len(urls(role.log, "fixed")) == 4)  # from the beginning, once more
    assert urls(role.log, "fixed") == sorted(2 * expected("fixed", 2))


def test_a_connector_can_be_made_paused_and_be_changed_key_by_key(role):
    assert role.call("POST", "/connectors", {"name": "c", "config": FLAT, "initial_state": "PAUSED"})[0] == 201
    role.reaches("c", "PAUSED")
    status, changed = role.call("PATCH", "/connectors/c/config", {"steps": "7", "poll.interval.ms": None, "pause_s": "0.001"})
    assert status == 200 and changed["config"] == {"name": "c", "connector.class": "steps", "steps": "7", "pause_s": "0.001"}
    role.reaches("c", "PAUSED")  # still
    assert urls(role.log, "c") == [] and role.call("PUT", "/connectors/c/resume")[0] == 202
    until(lambda: urls(role.log, "c") == expected("c", 7))


def test_restarts_close_and_open_whoever_is_asked_of(role):
    """In each way of asking; a connector that has not failed is left alone where only failed ones are meant."""
    until(lambda: len(urls(role.log, "fixed")) == 2)
    for path, code, again in [
        ("restart", 204, True),
        ("tasks/0/restart", 204, True),
        ("restart?includeTasks=true", 202, True),
        ("restart?includeTasks=true&onlyFailed=true", 202, False),
    ]:
        before = steps.OPEN[0]
        status, body = role.call("POST", f"/connectors/fixed/{path}")
        assert status == code and (body["tasks"][0]["state"] in ("RUNNING", "UNASSIGNED") if code == 202 else body is None)
        if again:
            until(lambda before=before: steps.OPEN and steps.OPEN[0] is not before)
        role.reaches("fixed", "RUNNING")
    assert len(steps.OPEN) == 1 and steps.OPEN[0] is before and urls(role.log, "fixed") == expected("fixed", 2)


def test_offsets_are_set_only_where_nobody_has_them(role):
    until(lambda: len(urls(role.log, "fixed")) == 2)
    to = {"offsets": [{"partition": {"connector": "fixed"}, "offset": {"step": 1}}]}
    assert role.call("PATCH", "/connectors/fixed/offsets", to)[0] == 409
    role.call("PUT", "/connectors/fixed/stop")
    role.reaches("fixed", "STOPPED")
    assert role.call("GET", "/connectors/fixed/tasks/0/status")[0] == 404  # it has none now
    for wrong in ({}, {"offsets": []}, {"offsets": [{"partition": {"connector": "other"}, "offset": {}}]}, {"offsets": [{"offset": 1}]}):
        status, error = role.call("PATCH", "/connectors/fixed/offsets", wrong)
        assert status == 400 and "an offset is" in error["message"]
    assert role.call("PATCH", "/connectors/fixed/offsets", to)[0] == 200 and role.call("GET", "/connectors/fixed/offsets") == (200, to)
    role.call("PUT", "/connectors/fixed/resume")
    until(lambda: urls(role.log, "fixed") == sorted([*expected("fixed", 2), "http://fixed/1.jpg"]))


def test_offsets_are_not_forgotten_under_a_thread_that_still_writes_them(role, tmp_path):
    (tmp_path / "trouble").write_text("slow")
    slow = FLAT | {"trouble": str(tmp_path / "trouble"), "at": "2"}
    role.call("POST", "/connectors", {"name": "c", "config": slow})
    until(lambda: len(urls(role.log, "c")) == 2)
    role.call("PUT", "/connectors/c/stop")
    assert role.call("DELETE", "/connectors/c/offsets")[0] == 409
    assert role.state("c") == "RUNNING"  # it is to stop, and has not yet
    (tmp_path / "trouble").unlink()
    role.reaches("c", "STOPPED")
    assert role.call("DELETE", "/connectors/c/offsets")[0] == 200


def test_deleting_keeps_the_cursor(role):
    role.call("POST", "/connectors", {"name": "c", "config": FLAT})
    until(lambda: len(urls(role.log, "c")) == 5)
    role.call("DELETE", "/connectors/c")
    role.call("POST", "/connectors", {"name": "c", "config": FLAT | {"steps": "8"}})
    until(lambda: len(urls(role.log, "c")) >= 8)
    assert urls(role.log, "c") == expected("c", 8)


WRONG = [
    ("POST", "/connectors", {"name": "fixed", "config": FLAT}, 409, "Connector fixed already exists"),
    ("PUT", "/connectors/fixed/config", FLAT, 409, "stands in the configuration file"),
    ("DELETE", "/connectors/fixed", None, 409, "stands in the configuration file"),
    ("POST", "/connectors", {"name": "c", "config": FLAT | {"stepz": "1"}}, 400, "stepz: no such key; did you mean steps?"),
    ("POST", "/connectors", {"name": "c", "config": {}}, 400, "connector.class: required"),
    ("POST", "/connectors", {"name": "c", "config": {"connector.class": "stepz"}}, 400, "did you mean steps?"),
    ("POST", "/connectors", {"name": "c", "config": FLAT | {"name": "d"}}, 400, "the config says name = 'd'"),
    ("POST", "/connectors", {"name": "c", "config": {"connector.class": "folder", "path": "images"}}, 400, "give the whole path"),
    ("POST", "/connectors", {"name": "c", "config": FLAT, "initial_state": "ASLEEP"}, 400, "one of RUNNING, PAUSED, STOPPED"),
    ("PATCH", "/connectors/fixed/config", {"steps": "9"}, 409, "stands in the configuration file"),
    ("PATCH", "/connectors/none/config", {"steps": "9"}, 404, "connector none not found"),
    ("GET", "/connectors/fixed/tasks/7/status", None, 404, "no status of task 7"),
    ("POST", "/connectors/fixed/tasks/7/restart", None, 404, "no status of task 7"),
    ("GET", "/connectors/none/topics", None, 404, "connector none not found"),
    ("GET", "/connector-plugins/none/config", None, 404, "no connector class none"),
    ("POST", "/connectors", {"name": "c"}, 422, "a connector is"),
    ("POST", "/connectors", {"name": 3, "config": FLAT}, 422, "a connector is"),
    ("POST", "/connectors", [], 422, "a JSON object is wanted, not list"),
    ("PUT", "/connectors/BAD%20NAME/config", FLAT, 400, "string should match pattern"),
    ("GET", "/connectors/none/status", None, 404, "connector none not found"),
    ("PUT", "/connectors/none/pause", None, 404, "connector none not found"),
    ("DELETE", "/connectors/none", None, 404, "connector none not found"),
    ("PUT", "/connector-plugins/none/config/validate", FLAT, 404, "no connector class none"),
    ("GET", "/nowhere", None, 404, "HTTP 404"),
    ("PATCH", "/connectors", None, 405, "HTTP 405"),
]


def test_errors_are_in_connects_words_and_nothing_is_written(role):
    before = role.log.table("connector-configs")
    for method, path, body, code, message in WRONG:
        status, error = role.call(method, path, body)
        assert (status, error["error_code"]) == (code, code) and message in error["message"], (method, path, error)
    assert role.call("POST", "/connectors", raw=b"{")[0] == 400
    assert role.call("POST", "/connectors", raw=b"x" * 300_000)[0] == 413
    assert role.call("POST", "/connectors", {"name": "c", "config": FLAT}, headers={"Content-Type": "text/plain"})[0] == 415
    assert role.log.table("connector-configs") == before


def test_plugins_are_told_and_validate(role):
    found = role.call("GET", "/connector-plugins")[1]
    assert {"folder", "urls", "steps"} <= {p["class"] for p in found} and all(p["type"] == "source" and p["version"] for p in found)
    status, answer = role.call("PUT", "/connector-plugins/steps/config/validate", FLAT | {"name": "c", "steps": "many"})
    assert status == 200 and answer["error_count"] == 1
    errors = [error for c in answer["configs"] for error in c["value"]["errors"]]
    assert len(errors) == 1 and errors[0].startswith("steps = 'many': input should be a valid integer")
    keys = {key["name"]: key for key in role.call("GET", "/connector-plugins/steps/config")[1]}
    assert keys["steps"]["required"] and keys["poll.interval.ms"]["default_value"] == "1000" and keys["words"]["type"] == "LIST"
    assert role.call("GET", "/")[1]["kafka_cluster_id"] == role.log.log_id and role.call("GET", "/health")[1]["status"] == "healthy"


def test_a_page_in_a_browser_cannot_give_orders_under_a_name_of_its_own(role):
    status, error = role.call("GET", "/connectors", headers={"Host": f"evil.example:{role.port}"})
    assert status == 403 and "only requests to localhost" in error["message"]
    assert role.call("GET", "/connectors", headers={"Host": f"localhost:{role.port}"})[0] == 200


def test_with_a_token_nothing_is_answered_without_it(tmp_path):
    with Role(tmp_path, token="secret") as role:
        assert role.call("GET", "/connectors") == (200, [])
        for wrong in ("Bearer wrong", "secret", "", "Bearer secreté"):
            status, error = role.call("GET", "/connectors", headers={"Authorization": wrong.encode().decode("latin-1")})
            assert status == 401 and error["error_code"] == 401
        assert role.call("POST", "/connectors", {"name": "c", "config": FLAT}, token="wrong")[0] == 401
        assert role.call("GET", "/nowhere", token="wrong")[0] == 401 and role.call("GET", "/connectors")[1] == []


class NoToken:
    token = ""


def test_without_a_token_only_this_machine_is_answered():
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="no token is asked of them: set the environment variable STREAMLEARN_REST_TOKEN"):
            serve(NoToken(), ConnectConfig(rest_port=1, rest_host=host), ConnectMetrics(CollectorRegistry()))


def test_a_port_that_is_taken_is_said(role, tmp_path):
    other = Role(tmp_path, log=role.log)
    other.config = other.config.model_copy(update={"connect": role.config.connect})
    other.thread.start()
    other.thread.join(60)
    assert isinstance(other.error, ConfigError) and f"connect.rest_port = {role.port}: cannot listen" in str(other.error)
