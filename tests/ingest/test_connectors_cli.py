"""`streamlearn connectors`: on a home, through its log, whether or not a loop runs."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from ingest.connectors import book
from streamlearn.__main__ import cli
from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError, NotFound
from streamlearn.contract.status import read_status
from tests.conftest import REPO
from tests.ingest.connecting import make_log, records, until, urls


@contextmanager
def loop(home):
    """The role itself, as `up` starts it."""
    argv = [sys.executable, "-m", "streamlearn", "role", "connect", "--home", str(home)]
    with (home / "connect.log").open("ab") as out:
        process = subprocess.Popen(argv, cwd=REPO, stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(REPO)})
    try:
        yield
        process.terminate()
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


def reaches(home, name, state):
    return until(lambda: (found := json.loads(run("status", name, "--json", home=home)))["state"] == state and found)


@pytest.fixture
def home(tmp_path):
    """A home in which a loop has run, with one connector of its file."""
    home = tmp_path / "home"
    (tmp_path / "u.txt").write_text("".join(f"http://x/{i}.jpg\n" for i in range(9)) + "nonsense\n")
    fixed = {"name": "fixed", "class": "urls", "path": str(tmp_path / "u.txt"), "poll_s": 0.05}
    durable.write(home / "config.json", Config.model_validate({"connectors": (fixed,)}).model_dump_json().encode())
    return home


def connector(folder, name="c", **more):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"name": name, "config": {"connector.class": "urls", "path": "u.txt", "poll.interval.ms": "50"} | more}))
    return path


def run(*words, home=None):
    argv = ["connectors", *map(str, words), *(["--home", str(home)] if home else [])]
    result = CliRunner().invoke(cli, argv, catch_exceptions=True)
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_connectors_life_without_a_loop_and_then_with_one(home, tmp_path):
    file = connector(tmp_path)
    assert json.loads(run("start", file, "--json", home=home)) == [{"name": "c", "action": "created"}]
    assert "unchanged" in run("start", file, home=home)
    assert "updated" in run("start", connector(tmp_path, follow="false"), home=home)
    run("pause", "c", home=home)
    rows = {row["name"]: row for row in json.loads(run("list", "--json", home=home))}
    assert (rows["c"]["target"], rows["c"]["state"], rows["c"]["from"]) == ("PAUSED", "UNASSIGNED", "log") and rows["fixed"][
        "from"
    ] == "file"
    log = make_log(home)
    with loop(home):
        reaches(home, "c", "PAUSED")
        assert urls(log, "c") == []
        run("resume", "c", home=home)
        until(lambda: len(urls(log, "c")) == 9)
        found = until(lambda: (f := reaches(home, "c", "RUNNING"))["candidates"] == 9 and f["cursor"] and f)
        assert (found["state"], found["candidates"], found["config"]["follow"]) == ("RUNNING", 9, "false")
        assert found["cursor"] == {"byte": (tmp_path / "u.txt").stat().st_size}
        assert "RUNNING" in run("list", home=home) and "class" in run("status", "c", home=home)
        run("restart", "c", home=home)
        run("delete", "c", home=home)
        until(lambda: "c" not in read_status(home)["connect"]["connectors"])
    assert reaches(home, "fixed", "UNASSIGNED")["candidates"] == 0  # nobody has it now
    assert json.loads(run("list", "--json", home=home))[0]["name"] == "fixed"
    assert "begins at {" in run("plan", file, home=home)  # its cursor stays


def test_a_stopped_connector_can_be_sent_back_and_a_running_one_cannot(home, tmp_path):
    file, log = connector(tmp_path), make_log(home)
    run("start", file, home=home)
    assert run("offsets", "c", home=home) == "null\n"
    with loop(home):
        until(lambda: json.loads(run("offsets", "c", home=home)) == {"byte": (tmp_path / "u.txt").stat().st_size})
        with pytest.raises(ConfigError, match="connector c is not stopped: `streamlearn connectors stop c`"):
            run("offsets", "c", "--reset", home=home)
        run("stop", "c", home=home)
        reaches(home, "c", "STOPPED")
        assert run("offsets", "c", "--set", '{"byte": 15}', home=home) == '{"byte": 15}\n'
        run("resume", "c", home=home)
        until(lambda: len(urls(log, "c")) == 17)  # all but the first, once more
        run("stop", "c", home=home)
        reaches(home, "c", "STOPPED")
    assert run("offsets", "c", "--reset", home=home) == "null\n"  # nobody has it either where no loop runs
    with loop(home):
        run("resume", "c", home=home)
        until(lambda: len(urls(log, "c")) == 26)
    for wrong, why in (("{", "not JSON"), ("[]", "a JSON object is wanted"), ("7", "a JSON object is wanted")):
        with pytest.raises(ConfigError, match=why):
            run("offsets", "c", "--set", wrong, home=home)


def test_a_failure_is_shown_with_its_reason(home, tmp_path):
    run("start", connector(tmp_path, path="nowhere.json"), home=home)
    with loop(home):
        reaches(home, "c", "FAILED")
        assert "a list of URLs is .txt" in run("list", home=home)
        result = CliRunner().invoke(cli, ["status", "--home", str(home)])
        assert "connector c FAILED: connector c: path =" in result.output.replace("\n", " ")


def test_a_plan_shows_the_first_candidates_and_writes_nothing(home, tmp_path):
    file = connector(tmp_path)
    found = json.loads(run("plan", file, "--json", "--first", 2, home=home))[0]
    assert found["action"] == "would be created" and found["cursor"] is None
    assert [c["url"] for c in found["candidates"]] == ["http://x/0.jpg", "http://x/1.jpg"] and found["refused"][0][1] == "nonsense"
    assert not (home / "log.sqlite").exists() and sorted(p.name for p in home.iterdir()) == ["config.json"]
    run("start", file, home=home)
    log = make_log(home)
    before = (log.table("connector-configs"), log.table("source-state"), records(log))
    text = run("plan", connector(tmp_path, follow="false"), home=home)
    assert "c: would be changed; begins at null" in text and "http://x/0.jpg  (byte 0)" in text and "refused: byte 135: nonsense" in text
    assert "unchanged" in run("plan", connector(tmp_path), home=home)
    assert "would be refused" in run("plan", connector(tmp_path, name="fixed"), home=home)
    assert (log.table("connector-configs"), log.table("source-state"), records(log)) == before
    assert "would be created" in run("plan", file, home=tmp_path / "nowhere") and not (tmp_path / "nowhere").exists()


def test_validate_reads_both_forms_and_says_what_is_wrong(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        "[[connectors]]\nname = 'a'\nclass = 'urls'\npath = 'u.txt'\n[[connectors]]\nname = 'b'\nclass = 'folder'\npath = 'x'\n"
    )
    assert run("validate", toml).count("good") == 2 and "good" in run("validate", connector(tmp_path))
    wrong = {
        connector(tmp_path, name="p", pth="x"): "p.json: connector p: pth: no such key; did you mean path?",
        connector(tmp_path, name="q", **{"tasks.max": "2"}): "q.json: connector q: tasks.max = 2",
        tmp_path / "none.json": "cannot be read",
    }
    for name, text, complaint in [
        ("l.json", "[]", "a connector is"),
        ("m.json", "{", "not JSON"),
        ("n.json", '{"name": "n", "config": {"name": "o", "connector.class": "urls"}}', "name is 'n' and, in its config, 'o'"),
        ("o.toml", "home = 'x'", "no connectors in it"),
        ("r.toml", "[[connectors]]\nname = 'a'\nclass = 'urls'\npath = 3", "r.toml: connector a: path = 3: input should be a valid string"),
        ("s.toml", "nonsense", "not TOML"),
    ]:
        (tmp_path / name).write_text(text)
        wrong[tmp_path / name] = complaint
    for path, complaint in wrong.items():
        with pytest.raises(ConfigError) as e:
            run("validate", path)
        assert complaint in str(e.value)


def test_orders_that_cannot_be_obeyed_are_refused(home, tmp_path):
    with pytest.raises(ConfigError, match="stands in the configuration file"):
        run("delete", "fixed", home=home)
    both = tmp_path / "both.toml"
    both.write_text("[[connectors]]\nname='new'\nclass='urls'\npath='u.txt'\n[[connectors]]\nname='fixed'\nclass='urls'\npath='u.txt'\n")
    with pytest.raises(ConfigError, match="stands in the configuration file"):
        run("start", both, home=home)
    assert [row["name"] for row in json.loads(run("list", "--json", home=home))] == ["fixed"]  # all or none of a file
    with pytest.raises(NotFound, match="connector nobody not found; there are fixed"):
        run("pause", "nobody", home=home)
    with pytest.raises(ConfigError, match="no loop has run here"):
        run("list", home=tmp_path / "nowhere")


def test_the_classes_are_listed(tmp_path):
    assert {"folder", "urls"} <= {row["class"] for row in json.loads(run("list", "--plugins", "--json"))}


def test_a_folder_that_was_named_at_run_time_may_be_fetched_from(home, tmp_path):
    (tmp_path / "pictures").mkdir()
    config, log = Config(), make_log(home)
    assert book.watched(config, log) == ()
    file = tmp_path / "pictures.json"
    file.write_text(json.dumps({"name": "pictures", "config": {"connector.class": "folder", "path": "pictures"}}))
    run("start", file, home=home)
    assert book.watched(config, log) == ((tmp_path / "pictures").resolve(),)
    run("delete", "pictures", home=home)
    assert book.watched(config, log) == ()
