"""Draining leaves nothing between the sources and a checkpoint, and takes nothing in meanwhile."""

import json
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from streamlearn.__main__ import cli
from streamlearn.cli.health import serve
from streamlearn.cli.roles import Home
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Config, ConnectorConfig
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, NewRecord, retry_topic
from streamlearn.contract.status import Heartbeat, read_status
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.operate import drain
from tests.conftest import REPO
from tests.ingest.dataset import crafted, put
from tests.ingest.server import Place, picture
from tests.operate.homes import running


def asked(*words):
    done = CliRunner().invoke(cli, [*map(str, words)])
    return done.exit_code, done.output, done.exception


def test_what_is_left_is_counted_by_where_it_waits(home):
    at = running(home)
    cursor = {f"{row.topic}/{row.partition}": row.end_offset for row in at.catalog.rows()}
    assert drain.left(at.log, at.catalog, cursor).nothing
    found = drain.left(at.log, at.catalog, {})
    assert (
        (found.candidates, found.due) == (0, 0) and found.images == 24 and found.shards == sum(r.num_samples > 0 for r in at.catalog.rows())
    )
    row = max(at.catalog.rows(), key=lambda r: r.num_samples)
    partly = cursor | {f"{row.topic}/{row.partition}": row.end_offset - 1}
    assert drain.left(at.log, at.catalog, partly).images >= row.num_samples  # of a shard that is partly learnt, all
    put(Place(home), crafted(0, 1, day="2026-11-22"))  # of refusals only: there is nothing in it to learn
    assert drain.left(at.log, at.catalog, {}).shards == found.shards
    late = dict(source="t", source_ref="x", discovered_at="2026-11-21T00:00:00Z")
    at.log.append([NewRecord(CANDIDATES, b"x", Candidate(url="http://x/1.jpg", **late).to_json(), 0)])
    for moment in (time.time() - 5, time.time() + 1000, time.time() + 2000):
        c = Candidate(url="http://x/2.jpg", not_before=moment, attempt=1, origin=f"candidates/0/{moment}", **late)
        at.log.append([NewRecord(retry_topic(0), b"x", c.to_json(), 0)])
    found = drain.left(at.log, at.catalog, cursor)
    assert (found.candidates, found.due, found.later) == (1, 1, 2) and not found.nothing


def test_only_what_ran_is_started_again(home):
    config = Config(connectors=tuple(ConnectorConfig.of(n, "folder", path=str(home)) for n in ("one", "two")))
    log = running(home).log
    log.ensure_topic(CONNECTOR_CONFIGS, 2)
    drain.book.aim(config, log, "two", drain.book.PAUSED)

    def targets():
        return {name: entry.target for name, entry in drain.book.entries(config, log).items()}

    assert drain.pause(config, log, home) == ["one"] and set(targets().values()) == {"PAUSED"}
    assert drain.pause(config, log, home) == ["one"]  # given again, it does not forget
    assert drain.end(config, log, home) == ["one"] and targets() == {"one": "RUNNING", "two": "PAUSED"}
    assert drain.end(config, log, home) == []


def test_without_a_learner_nothing_is_paused_and_out_of_time_it_says_what_is_left(home):
    (home / "status" / "train.json").unlink()
    code, _, error = asked("drain", "--home", home)
    assert code == 1 and "--learner URL" in str(error) and not (home / "drain.json").exists()
    heart = Heartbeat(home, "train")
    heart.beat(cursor={}, step=4, force=True)
    code, said, error = asked("drain", "--home", home, "--timeout", 0.1)
    assert code == 1 and "not empty after 0.1 s: 0 candidates and 0 due retries to fetch" in str(error) and "paused: none" in said
    past = json.loads((home / "status" / "train.json").read_text()) | {"at": "2026-11-01T00:00:00.000Z"}
    (home / "status" / "train.json").write_text(json.dumps(past))
    code, said, error = asked("drain", "--home", home, "--timeout", 0.1)
    assert code == 1 and "the learner has said nothing for" in said and "does it run?" in said
    heart.beat(cursor={f"{r.topic}/{r.partition}": r.end_offset for r in running(home).catalog.rows()}, force=True)
    code, said, _ = asked("drain", "--home", home)
    assert code == 0 and "nothing is left" in said and "may be stopped now" in said


class Learner(BaseHTTPRequestHandler):
    """Its /healthz: what it says each time it is asked, the last for ever; None: it does not answer."""

    words = ()

    def do_GET(self):
        said = self.words.pop(0) if len(self.words) > 1 else self.words[0]
        self.send_response(503 if said is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"role": "train"} | (said or {})).encode())

    def log_message(self, *_):
        pass


def test_a_learner_that_is_started_again_meanwhile_is_waited_for(home):
    """Between its end and its first word it has said nothing: no reason to give up, nor to call anything learnt."""
    learnt = {f"{r.topic}/{r.partition}": r.end_offset for r in running(home).catalog.rows()}
    words = [{"state": "starting"}, None, {"cursor": {}}, {"state": "starting"}, {"cursor": learnt}, None, {"cursor": learnt}]
    served = ThreadingHTTPServer(("127.0.0.1", 0), type("Restarted", (Learner,), {"words": words}))
    Thread(target=served.serve_forever, daemon=True).start()
    try:
        code, said, _ = asked("drain", "--home", home, "--learner", f"http://127.0.0.1:{served.server_port}")
    finally:
        served.shutdown()
        served.server_close()
    assert code == 0 and words == [{"cursor": learnt}] and "to learn; the learner has not said how far it is" in said


def test_a_learner_that_starts_and_says_nothing_is_told_of_once_the_time_is_up(home):
    Heartbeat(home, "train").beat(state="starting", force=True)
    code, _, error = asked("drain", "--home", home, "--timeout", 0.1)
    assert code == 1 and "(24 images) to learn; the learner has not said how far it is; give it again" in str(error)


def test_nothing_is_left_is_what_the_learner_says_and_not_what_it_does_not_say(tmp_path):
    (tmp_path / "config.json").write_text(Config(home=str(tmp_path)).model_dump_json())
    running(tmp_path)
    Heartbeat(tmp_path, "train").beat(state="starting", force=True)
    code, _, error = asked("drain", "--home", tmp_path, "--timeout", 5)
    assert code == 1 and "0 shards (0 images) to learn; the learner has not said" in str(error)


def test_a_role_that_is_no_learner_is_not_asked_how_far_it_is(home):
    heart = Heartbeat(home, "fetch")
    heart.beat(state="fetching", force=True)
    port = serve(0, CollectorRegistry(), heart)
    code, _, error = asked("drain", "--home", home, "--learner", f"http://127.0.0.1:{port}")
    assert code == 1 and "no learner has said how far it is" in str(error) and not (home / "drain.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_loop_is_drained_ended_with_a_checkpoint_and_goes_on_when_it_is_told_to(tmp_path):
    images, home = tmp_path / "images", tmp_path / "home"
    images.mkdir()
    for i in range(60):
        (images / f"{i}.jpg").write_bytes(picture(i, size=(40, 36)))
    up = [sys.executable, "-m", "streamlearn", "up", "--images", images, "--home", home]
    for setting in (
        "train.batch=16",
        "objective.prototypes=8",
        "shard.max_age_s=1",
        "stream.workers=1",
        "train.threads=1",
        "supervise.report_s=0",
    ):
        up += ["--set", setting]

    def said():
        return read_status(home).get("train", {})

    def until(done):
        deadline = time.monotonic() + 400
        while not done():
            assert time.monotonic() < deadline, read_status(home)
            time.sleep(0.2)

    loop = subprocess.Popen(up, cwd=REPO)
    try:
        until(lambda: "cursor" in said())
        command = [sys.executable, "-m", "streamlearn", "drain", "--home", home]
        draining = subprocess.Popen([*command, "--timeout", "400"], cwd=REPO, stdout=subprocess.PIPE, text=True)
        assert draining.stdout.readline().startswith("paused: images;")
        out, _ = draining.communicate(timeout=500)
        assert draining.returncode == 0 and "ended, with a checkpoint" in out, out
        assert loop.wait(60) == 0
        state = Checkpoints(Home(home).store(), keep=3).load()
        log = Home(home).log()
        told = sum(log.bounds(CANDIDATES, p)[1] for p in range(2))  # it may have been paused in the middle
        assert state["step"] == said()["step"] and state["stream"]["fresh"] == told
        (images / "late.jpg").write_bytes(picture(99, size=(40, 36)))
        loop = subprocess.Popen(up, cwd=REPO)
        until(lambda: read_status(home).get("connect", {}).get("connectors", {}).get("images", {}).get("state") == "PAUSED")
        subprocess.run([*command, "--end"], cwd=REPO, check=True)
        until(lambda: said().get("fresh") == 61)
        loop.send_signal(signal.SIGINT)
        assert loop.wait(120) == 0
    finally:
        loop.kill()
