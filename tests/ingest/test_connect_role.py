"""The role `connect`: every connector on its own, orders that survive, states that are true."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ingest.connectors import book
from ingest.connectors.worker import Worker
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.errors import ConfigError, NotFound, Retryable
from streamlearn.contract.event_log import CONNECTOR_CONFIGS, DEAD_LETTERS, NewRecord
from tests.conftest import REPO
from tests.ingest import steps
from tests.ingest.connecting import Role, make_log, records, until, urls
from tests.ingest.steps import config, expected, installed


@pytest.fixture(autouse=True)
def steps_class(monkeypatch):
    installed(monkeypatch)


@pytest.mark.parametrize(("trouble", "state"), [("bug", "FAILED"), ("mend", "FAILED"), ("later", "RUNNING"), ("slow", "RUNNING")])
def test_one_that_fails_or_hangs_stops_no_other(tmp_path, trouble, state):
    (tmp_path / "trouble").write_text(trouble)
    sick = config("sick", 9, trouble=str(tmp_path / "trouble"), at=2)
    with Role(tmp_path, connectors=(config("early"), sick, config("late"))) as role:
        until(lambda: len(urls(role.log, "late")) == 5 and len(urls(role.log, "early")) == 5)
        until(lambda: role.beat()["connectors"]["sick"]["state"] == state)
        until(lambda: len(urls(role.log, "sick")) == 2)
        until(lambda: role.metric("connect_connectors", state=state))
        if trouble == "bug":
            until(lambda: "RuntimeError: a bug" in role.beat()["connectors"]["sick"].get("trace", ""))
            assert role.metric("connect_connectors", state="RUNNING") == 2 and role.metric("connect_failures_total") >= 1
        if trouble == "later":
            until(lambda: role.beat()["connectors"]["sick"].get("retrying") == "not now")
        (tmp_path / "trouble").unlink()
        if trouble == "mend":
            time.sleep(0.5)  # what the user must mend is not tried again unasked
            assert role.state("sick") == "FAILED" and role.call("POST", "/connectors/sick/restart?onlyFailed=true")[0] == 202
        until(lambda: urls(role.log, "sick") == expected("sick", 9))
        role.reaches("sick", "RUNNING")
        assert "trace" not in role.call("GET", "/connectors/sick/status")[1]["connector"]
    assert role.error is None and steps.OPEN == []


def test_a_pause_stops_discovery_and_resume_goes_on_with_nothing_missed_or_twice(tmp_path):
    with Role(tmp_path, connectors=(config("c", 300),)) as role:
        for target in (5, 60, 150):
            until(lambda target=target: len(urls(role.log)) >= target)
            assert role.call("PUT", "/connectors/c/pause") == (202, None)
            role.reaches("c", "PAUSED")
            before = urls(role.log)
            time.sleep(0.4)
            assert urls(role.log) == before and len(before) < 300 and len(steps.OPEN) == 1  # it keeps what it holds
            assert role.call("PUT", "/connectors/c/resume")[0] == 202
        until(lambda: len(urls(role.log)) >= 300)
        role.reaches("c", "RUNNING")
    assert urls(role.log) == expected("c", 300)


def test_one_that_is_stopped_lets_go_and_goes_on_at_its_cursor(tmp_path):
    with Role(tmp_path, connectors=(config("c", 100),)) as role:
        until(lambda: len(urls(role.log)) >= 5)
        assert role.call("PUT", "/connectors/c/stop")[0] == 204
        role.reaches("c", "STOPPED")
        assert steps.OPEN == [] and role.call("GET", "/connectors/c/status")[1]["tasks"] == []
        role.call("PUT", "/connectors/c/resume")
        until(lambda: len(urls(role.log)) >= 100)
        counted = role.beat()["connectors"]["c"]["candidates"]
    assert urls(role.log) == expected("c", 100) and counted <= 100


def test_orders_survive_the_role_and_whoever_gave_them(tmp_path):
    """Answered, then killed before it was obeyed: the next role obeys."""
    log = make_log(tmp_path)
    none = Config()
    book.put(none, log, ConnectorConfig.model_validate(config("made", 7)))
    book.put(none, log, ConnectorConfig.model_validate(config("paused", 7)))
    book.aim(none, log, "paused", "PAUSED")
    with Role(tmp_path, log=log) as role:
        until(lambda: urls(log, "made") == expected("made", 7))
        role.reaches("paused", "PAUSED")
        assert urls(log, "paused") == []
        role.call("DELETE", "/connectors/made")
    with Role(tmp_path, log=log) as role:
        role.reaches("paused", "PAUSED")
        assert role.call("GET", "/connectors")[1] == ["paused"] and urls(log, "paused") == []
        book.put(none, log, ConnectorConfig.model_validate(config("made", 9)))  # under the same name: on from its cursor
        until(lambda: len(urls(log, "made")) >= 9)
    assert urls(log, "made") == expected("made", 9)


PROGRAM = """
import sys, threading
from pathlib import Path
from ingest.connectors import plugins
plugins.BUILT_IN["steps"] = "tests.ingest.steps:Steps"
from tests.ingest.connecting import Role
with Role(Path(sys.argv[1])) as role:
    print(role.port, flush=True)
    threading.Event().wait()
"""


def test_killed_at_any_moment_after_the_answer_everything_is_there_once(tmp_path):
    log = make_log(tmp_path)
    client = Role(tmp_path, log=log)
    for i, delay_s in enumerate((0.0, 0.15, 0.4, 0.8)):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=REPO,
            env=os.environ | {"PYTHONPATH": str(REPO)},
        )
        try:
            client.port = int(process.stdout.readline())
            flat = {"connector.class": "steps", "steps": "40", "poll.interval.ms": "50"}
            assert client.call("POST", "/connectors", {"name": f"c{i}", "config": flat})[0] == 201
            time.sleep(delay_s)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    with Role(tmp_path, log=log) as role:
        until(lambda: all(len(urls(log, f"c{i}")) >= 40 for i in range(4)))
        assert role.call("GET", "/connectors")[1] == ["c0", "c1", "c2", "c3"]
    assert [urls(log, f"c{i}") for i in range(4)] == [expected(f"c{i}", 40) for i in range(4)]


def test_a_changed_connector_begins_when_its_predecessor_has_let_go(tmp_path):
    (tmp_path / "trouble").write_text("slow")
    with Role(tmp_path) as role:
        flat = {"connector.class": "steps", "steps": "9", "at": "3", "trouble": str(tmp_path / "trouble"), "poll.interval.ms": "50"}
        assert role.call("PUT", "/connectors/c/config", flat)[0] == 201
        until(lambda: len(urls(role.log)) == 3)
        assert role.call("PUT", "/connectors/c/config", flat | {"steps": "12"})[0] == 200
        time.sleep(0.8)
        assert len(steps.OPEN) == 1  # it hangs, and has the name still
        (tmp_path / "trouble").unlink()
        until(lambda: len(urls(role.log)) >= 12)
    assert urls(role.log) == expected("c", 12)


def test_a_connector_of_the_file_can_be_paused_but_not_changed(tmp_path):
    log, fixed = make_log(tmp_path), Config.model_validate({"connectors": (config("c", 5),)})
    with pytest.raises(ConfigError, match="stands in the configuration file"):
        book.put(fixed, log, ConnectorConfig.model_validate(config("c", 6)))
    with pytest.raises(ConfigError, match="stands in the configuration file"):
        book.delete(fixed, log, "c")
    book.aim(fixed, log, "c", "PAUSED")
    assert book.entries(fixed, log)["c"].target == "PAUSED" and book.entries(fixed, log)["c"].in_file
    assert book.entries(Config(), log) == {}  # once it is gone from the file, it is gone
    with pytest.raises(NotFound, match="connector d not found; there are c"):
        book.aim(fixed, log, "d", "PAUSED")


@pytest.mark.parametrize(
    "value",
    [
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b'{"target": "FLYING", "config": null, "restarts": 0}',
        b'{"config": {}, "target": "RUNNING", "restarts": 0}',
    ],
)
def test_garbage_in_the_book_is_left_out_and_said_once(tmp_path, caplog, value):
    log = make_log(tmp_path)
    log.append([NewRecord(CONNECTOR_CONFIGS, b"bad" + value[:9], value)])
    book.put(Config(), log, ConnectorConfig.model_validate(config("good")))
    assert [list(book.entries(Config(), log)) for _ in range(3)] == [["good"]] * 3
    assert caplog.text.count("cannot be read, left out") == 1


def test_none_tolerates_no_refused_entry_and_all_makes_it_a_dead_letter(tmp_path):
    (tmp_path / "u.txt").write_text("http://x/1.jpg\nnonsense\nhttp://x/2.jpg\n")
    own = {"class": "urls", "path": str(tmp_path / "u.txt"), "poll_s": 0.05}
    with Role(
        tmp_path, connectors=(own | {"name": "strict", "errors_tolerance": "none"}, own | {"name": "mild", "dead_letter_topic": "dlq"})
    ) as role:
        role.reaches("strict", "FAILED")
        until(lambda: len(urls(role.log, "mild")) == 2 and len(records(role.log, "dlq")) == 1)
        trace = role.call("GET", "/connectors/strict/status")[1]["tasks"][0]["trace"]
        assert "byte 15: 'nonsense': not an http or https URL" in trace and urls(role.log, "strict") == []
        (tmp_path / "u.txt").write_text("http://x/1.jpg\nhttp://x/2.jpg\n")
        role.call("POST", "/connectors/strict/restart")
        until(lambda: len(urls(role.log, "strict")) == 2)
    assert records(role.log, DEAD_LETTERS) == []


def test_a_library_that_hangs_ends_the_role(tmp_path):
    (tmp_path / "trouble").write_text("stuck")
    with Role(tmp_path, connectors=(config("c", trouble=str(tmp_path / "trouble")),)) as role:
        until(lambda: role.error)
    assert str(role.error) == "hangs"


def test_the_pauses_between_tries_grow_up_to_the_limit(monkeypatch):
    entry = book.Entry(ConnectorConfig.model_validate(config("c") | {"errors_retry_delay_max_s": 3.0}), "PAUSED")
    worker = Worker(entry, lambda _: None, lambda: None)
    try:
        assert [worker._later() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
        monkeypatch.setattr(worker, "_open", lambda _: (_ for _ in ()).throw(Retryable("busy", after_s=9.0)))
        assert worker._round() == 9.0  # as long as the source says, at least
    finally:
        worker.end()
        worker.join(60)


def test_a_topic_of_ours_takes_no_dead_letters():
    for topic in ("candidates", "source-state", "connector-configs", "shards", "retry.0"):
        with pytest.raises(ValueError, match="this topic holds other things"):
            ConnectorConfig.of("c", "urls", dead_letter_topic=topic)
