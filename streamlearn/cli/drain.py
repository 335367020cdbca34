"""`streamlearn drain`: stop intake, let everything that is there be learnt, and end."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from streamlearn.cli.dataset import open_home
from streamlearn.contract.errors import ConfigError, Retryable, StreamlearnError
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, SOURCE_STATE
from streamlearn.contract.object_store import POINTER, ObjectStore
from streamlearn.contract.status import read_status
from streamlearn.operate import drain as act
from streamlearn.operate.doctor import runs
from streamlearn.view import overview

LOOK_S, TELL_S = 1.0, 10.0  # between looks, and between lines
SILENT_S = 60.0  # a heartbeat older than this is told
STILL = 3  # looks in a row that find nothing left: a batch that a connector was in the middle of comes in after the order


class NotEmpty(StreamlearnError):
    """The time is up."""


@click.command()
@click.option(
    "--timeout", "seconds", type=click.FloatRange(0, min_open=True), help="Give up after so many seconds; the intake stays paused."
)
@click.option("--learner", metavar="URL", help="The learner's /healthz, where it has another home: asked for its cursor.")
@click.option("--stay", is_flag=True, help="Leave the loop running, once nothing is left.")
@click.option("--end", "ending", is_flag=True, help="Start the connectors again that were paused.")
@click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")
def drain(*, seconds: float | None, learner: str | None, stay: bool, ending: bool, home: Path) -> None:
    """Stop intake, let the fetchers and the learner finish what is there, checkpoint, and end the loop of --home, for maintenance.

    Where the roles are processes of their own (containers), nothing is ended: it says when they can be.
    """
    home = home.resolve()
    adapters, log = open_home(home)
    config = adapters.config
    for topic in (CANDIDATES, CONNECTOR_CONFIGS, SOURCE_STATE):
        log.ensure_topic(topic, config.log.partitions)
    if ending:
        click.echo(f"started again: {', '.join(act.end(config, log, home)) or 'none'}")
        return
    cursor_of(home, learner)  # before anything is paused
    click.echo(f"paused: {', '.join(act.pause(config, log, home)) or 'none'}; `streamlearn drain --end --home {home}` starts them again")
    catalog, began, told, still = adapters.catalog(log.log_id), time.monotonic(), -TELL_S, 0
    while still < STILL:
        cursor = _heard(home, learner)
        found = act.left(log, catalog, cursor or {})
        still = still + 1 if found.nothing and cursor is not None else 0
        waited, says = time.monotonic() - began, f"{found}{'' if cursor is not None else '; the learner has not said how far it is'}"
        if waited - told >= TELL_S:
            told = waited
            click.echo(f"{waited:.0f} s: {says}{'' if learner else silence(home)}")
        if seconds is not None and waited >= seconds and not still:
            raise NotEmpty(f"not empty after {seconds:g} s: {says}; give it again to go on, or `--end` to take in again")
        time.sleep(LOOK_S)
    click.echo(f"nothing is left: {found}")
    if stay or not runs(home):
        ours = "" if runs(home) else "no loop runs in this home; where roles run elsewhere, "
        click.echo(f"{ours}the roles may be stopped now: SIGTERM, and the learner checkpoints")
        return
    _finish(home, adapters.store())


def _heard(home: Path, learner: str | None) -> Mapping[str, int] | None:
    """As cursor_of, of a learner that may be started again meanwhile: it is waited for like all that is not done yet."""
    try:
        return cursor_of(home, learner)
    except (ConfigError, Retryable):
        return None


def cursor_of(home: Path, learner: str | None) -> Mapping[str, int] | None:
    """How far the learner says it is; None: it starts, and has not said yet.  Raises ConfigError where there is none, Retryable."""
    said: dict[str, Any]
    if learner:
        if not learner.startswith(("http://", "https://")):
            raise ConfigError(f"--learner {learner}: write http://host:port")
        try:
            with urllib.request.urlopen(learner.rstrip("/").removesuffix("/healthz") + "/healthz", timeout=30) as answer:
                said = json.load(answer)
        except (OSError, ValueError) as e:
            raise Retryable(f"{learner}: the learner does not answer: {e}; see whether it runs") from e
    else:
        said = read_status(home).get("train", {})
    if said.get("role") != "train":
        raise ConfigError(
            f"{learner or home}: no learner has said how far it is; start the loop, or name the learner's address: --learner URL"
        )
    found: Mapping[str, int] | None = said.get("cursor")
    return found


def silence(home: Path) -> str:
    """What to say of a home whose learner has been silent for long: nothing goes on there, so nothing would ever be left."""
    age_s = overview(home)["roles"].get("train", {}).get("age_s", 0.0)
    return f" (the learner has said nothing for {age_s:.0f} s: does it run?)" if age_s > SILENT_S and not runs(home) else ""


def _finish(home: Path, store: ObjectStore) -> None:
    """SIGTERM to the supervisor, whose roles end in good order."""
    os.kill(int((home / ".lock").read_text()), signal.SIGTERM)
    while runs(home):
        time.sleep(0.2)
    step, newest = read_status(home)["train"]["step"], json.loads(store.get(POINTER))["checkpoints"][0]["step"]
    if newest != step:
        raise NotEmpty(
            f"the loop has ended at step {step}, but its newest checkpoint is of step {newest}; see {home / 'logs' / 'train.log'}"
        )
    click.echo(f"ended, with a checkpoint of step {step}")
