"""`streamlearn health`: ask a role of this machine how it is, as a container's health check needs it: no curl, no torch, an exit code."""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from streamlearn.contract.errors import ConfigError
from streamlearn.contract.status import age_s, elsewhere, judged, read_status

EVERY = "0.0.0.0"  # metrics_host: all addresses of the machine


@click.command()
@click.argument("name", metavar="[ROLE]", required=False)
@click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The role's folder.")
@click.option("--ready", is_flag=True, help="Ask whether it makes progress (/readyz), not only whether it is alive (/healthz).")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Seconds for the answer.")
def health(name: str | None, home: Path, ready: bool, timeout_s: float) -> None:
    """Exit code 0 when ROLE is healthy, else 1, with what it says.  Without ROLE: every role that has spoken in this home."""
    said = read_status(home)
    if name is not None and name not in said:
        raise ConfigError(f"{home / 'status'}: the role {name} has not spoken yet; is --home its folder?")
    names = [name] if name is not None else sorted(said)
    what = "readyz" if ready else "healthz"
    answers = {each: look(said[each], what, timeout_s, asked=name is not None) for each in names}
    for each, (good, words) in answers.items():
        click.echo(f"{each}: {'good' if good else 'not good'}: {words}")
    if not answers:
        click.echo(f"{home / 'status'}: no role has spoken yet")
    sys.exit(0 if answers and all(good for good, _ in answers.values()) else 1)


def look(last: Mapping[str, Any], what: str, timeout_s: float, *, asked: bool) -> tuple[bool, str]:
    """(whether it is well, its words).  Of a role in another container or on another host, by its last heartbeat: what answers on its port
    here is another's.  One that is `asked` for by name is expected here: a container that has begun anew finds its predecessor's heartbeat."""
    if not asked and (host := elsewhere(last)):
        age = age_s(last)
        alive, ready = judged(last, age)
        return ready if what == "readyz" else alive, f"{last.get('state')}, seen {age:.0f} s ago on {host}"
    return ask(last, what, timeout_s)


def ask(last: Mapping[str, Any], what: str, timeout_s: float) -> tuple[bool, str]:
    """(whether the answer was 200, what it says in short or why there is none).  `last`: the role's last heartbeat."""
    host, port = last.get("metrics_host", EVERY), last.get("metrics_port")
    host = "127.0.0.1" if host == EVERY else host
    if not isinstance(port, int):
        return False, "it has not named its port"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the container's environment names
    try:
        with direct.open(f"http://{host}:{port}/{what}", timeout=timeout_s) as answer:
            return True, brief(answer.read())
    except urllib.error.HTTPError as e:
        return False, brief(e.read())
    except OSError as e:
        why = e.reason if isinstance(e, urllib.error.URLError) else e
        return (
            False,
            f"no answer on port {port}: {(isinstance(why, OSError) and why.strerror) or why}; the last it said: {last.get('state', 'nothing')}",
        )


def brief(body: bytes) -> str:
    """What matters of an answer (health.py): the state, what is waited for, and how long nothing was heard of the main loop."""
    try:
        said = json.loads(body)
        state, waiting, silent_s = said.get("state", "no state yet"), said.get("waiting"), said.get("silent_s", 0)
    except (ValueError, AttributeError):  # whoever has the port now
        return " ".join(body.decode(errors="replace").split())[:200]
    told = f"{state} for {said.get('waiting_s', 0):.0f} s: {waiting}" if waiting else str(state)
    told += f"; cannot be written: {said['unwritten']}" if said.get("unwritten") else ""
    return told if said.get("healthy") else f"{told}; its main loop has been silent for {silent_s:.0f} s"
