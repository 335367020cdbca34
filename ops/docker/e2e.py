"""The compose file in real containers: python -m ops.docker.e2e.  What it shows, in this order, with podman and stand-ins (compose.standin.yml):

  1. up         each service once those it waits for are healthy, by their own health checks; everything healthy at last
  2. learning   fed by the demo's image world, until a snapshot is published; pulled and verified from the registry container, twice
  3. watched    every target of the real Prometheus is up
  4. alarmed    the learner is stopped: an alert fires, and the real Alertmanager delivers it to a webhook
  5. stopped    SIGTERM to everything but the S3 stand-in, which has no disk: exit code 0, each within its own grace
  6. again      up once more: the learner's step is larger, and `dataset verify --deep` finds nothing missing or double

Prints a line of JSON for each, and exits 1 at the first that fails, 3 with the reason where containers cannot be run here.
"""

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ops.docker.compose import environment, load
from ops.docker.rules import once, seconds

TOP = Path(__file__).resolve().parents[2]
FILES = ("docker-compose.yml", "ops/docker/compose.standin.yml")
IMAGES = ("localhost/streamlearn:dev", "localhost/streamlearn-standin:dev")
HOME = "/var/lib/streamlearn"
LEFT_OUT = {"kafka", "topics", "weed", "grafana"}  # no image of theirs can be had: said in compose.standin.yml
NO_DISK = {"s3"}  # moto keeps the bucket in memory
ROLES = ("demo", "connect", "fetch", "train", "evaluate", "refresh", "serve")
LONG_S = 900.0  # for anything to come about on a busy machine
REFERENCE = "streamlearn/manifests/candidate"


class Failed(Exception):
    """What was to be shown did not come about."""


def unable() -> str:
    """Why containers cannot be run here; empty: they can."""
    for program in ("podman", "podman-compose"):
        if shutil.which(program) is None:
            return f"no {program}"
    for image in IMAGES:
        if subprocess.run(["podman", "image", "exists", image], check=False).returncode:
            return f"no image {image}: build it from ops/docker ({'standin.' if 'standin' in image else ''}Dockerfile)"
    return "" if (TOP / "ops/docker/secrets/registry_password").exists() else "no secrets: run `make secrets`"


def run(*command: str, check: bool = True, timeout_s: float = LONG_S) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOP, timeout=timeout_s)
    if check and done.returncode:
        raise Failed(f"{' '.join(command)}: exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done


def wait(what: str, found: Callable[[], Any], *, within_s: float = LONG_S, every_s: float = 2.0) -> Any:
    end = time.monotonic() + within_s
    while True:
        if value := found():
            return value
        if time.monotonic() > end:
            raise Failed(f"not within {within_s:g} s: {what}")
        time.sleep(every_s)


def say(what: str, **values: Any) -> None:
    sys.stdout.write(json.dumps({"shown": what} | values) + "\n")
    sys.stdout.flush()


class Project:
    """The containers of one compose project."""

    def __init__(self) -> None:
        env = environment(TOP / ".env.example")
        self.whole = load([TOP / f for f in FILES], env)
        self.services: dict[str, dict[str, Any]] = {n: s for n, s in self.whole["services"].items() if n not in LEFT_OUT}
        self.port = {n: s["ports"][0].split(":")[1] for n, s in self.services.items() if s.get("ports")}
        profiles = [word for profile in ("core", "monitoring", "demo") for word in ("--profile", profile)]
        files = [word for file in FILES for word in ("-f", file)]
        self.compose = ("podman-compose", "--env-file", ".env.example", *files, *profiles)

    def order(self) -> list[str]:
        """Each after what it waits for."""
        done: list[str] = []
        while len(done) < len(self.services):
            for name, service in self.services.items():
                if name not in done and all(n in done or n in LEFT_OUT for n in service.get("depends_on", {})):
                    done.append(name)
        return done

    def container(self, name: str) -> str:
        return f"{self.whole['name']}_{name}_1"

    def up(self) -> dict[str, float]:
        """Seconds until each was healthy, or had ended well.  podman-compose does not wait for health, so that is done here."""
        took = {}
        for name in self.order():
            began = time.monotonic()
            run(*self.compose, "up", "-d", "--no-deps", "--no-recreate", name)
            self.wait_for(name)
            took[name] = round(time.monotonic() - began, 1)
        return took

    def wait_for(self, name: str) -> None:
        if once(self.services[name]):
            code = int(run("podman", "wait", self.container(name)).stdout.split()[-1])
            if code:
                raise Failed(f"{name}: ended with {code}: {self.log(name)}")
            return
        wait(f"{name} healthy", lambda: self.healthy(name) or self.gone(name))
        if self.gone(name):
            raise Failed(f"{name}: ended: {self.log(name)}")

    def healthy(self, name: str) -> bool:
        """By the service's own check, asked here: there is no systemd to run its timer."""
        return run("podman", "healthcheck", "run", self.container(name), check=False).returncode == 0

    def state(self, name: str) -> dict[str, Any]:
        return dict(json.loads(run("podman", "inspect", self.container(name)).stdout)[0]["State"])

    def gone(self, name: str) -> bool:
        return not self.state(name)["Running"]

    def log(self, name: str) -> str:
        done = run("podman", "logs", "--tail", "20", self.container(name), check=False)
        return done.stdout + done.stderr

    def stop(self, name: str) -> tuple[int, float, float]:
        """SIGTERM: (exit code, seconds it took, its grace).  After the grace podman kills, and the code is 137."""
        grace = seconds(self.services[name].get("stop_grace_period", "10s"))
        began = time.monotonic()
        run("podman", "stop", "--time", f"{grace:.0f}", self.container(name))
        return int(self.state(name)["ExitCode"]), round(time.monotonic() - began, 1), grace

    def ask(self, name: str, path: str, headers: dict[str, str] | None = None) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port[name]}{path}", headers=headers or {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return bytes(answer.read())

    def within(self, name: str, *command: str) -> str:
        return run("podman", "exec", self.container(name), "streamlearn", *command).stdout

    def step(self) -> int:
        status = json.loads(self.within("train", "status", "--home", HOME, "--json"))
        return int(status["train"].get("step") or 0)


def pulled(project: Project) -> dict[str, Any] | None:
    """The published snapshot: by the published port of the registry, digest checked; and by our own client, from inside."""
    password = (TOP / "ops/docker/secrets/registry_password").read_text().strip()
    login = base64.b64encode(f"streamlearn:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Accept": "application/vnd.oci.image.manifest.v1+json"}
    try:
        manifest = project.ask("registry", f"/v2/{REFERENCE}", headers)
    except urllib.error.HTTPError as e:
        if e.code == 404:
            return None  # not yet
        raise
    weights = next(layer for layer in json.loads(manifest)["layers"] if layer["mediaType"].endswith("weight.v1.raw"))
    blob = project.ask("registry", f"/v2/streamlearn/blobs/{weights['digest']}", headers)
    if f"sha256:{hashlib.sha256(blob).hexdigest()}" != weights["digest"]:
        raise Failed(f"{weights['digest']}: the registry sent other bytes")
    told = project.within("evaluate", "snapshots", "pull", "candidate", f"/tmp/pulled-{time.time_ns()}", "--home", HOME)
    return {"manifest": f"sha256:{hashlib.sha256(manifest).hexdigest()}", "weights_bytes": len(blob), "by_our_client": told.strip()[-120:]}


def targets(project: Project) -> dict[str, str]:
    """Every target that Prometheus has, and its health; but for those of servers that are not run."""
    found = json.loads(project.ask("prometheus", "/api/v1/targets"))["data"]["activeTargets"]
    hosts = {t["labels"]["instance"]: t["health"] for t in found}
    return {host: health for host, health in hosts.items() if host.partition(":")[0] not in LEFT_OUT}


def alerts(project: Project) -> list[dict[str, Any]]:
    """What the webhook has heard: it prints each message."""
    lines = run("podman", "logs", project.container("hook")).stdout.splitlines()
    return [alert for line in lines if line.startswith("{") for alert in json.loads(line)["alerts"]]


def show(project: Project) -> None:
    say("up and healthy", seconds=project.up())
    snapshot = wait("a snapshot in the registry", lambda: pulled(project), every_s=5)
    say("learning, published, pulled", step=project.step(), **snapshot)
    up = wait("all targets up", lambda: (t := targets(project)) and set(t.values()) == {"up"} and t)
    say("watched", targets=sorted(up))
    before, (code, took, grace) = project.step(), project.stop("train")
    if code:
        raise Failed(f"train: exit code {code} after {took} s of {grace}")
    fired = wait("an alert of the learner at the webhook", lambda: [a for a in alerts(project) if a["labels"].get("job") == "train"])
    say("alarmed", alert=fired[0]["labels"], status=fired[0]["status"], learner_stopped_in_s=took)
    run("podman", "start", project.container("train"))
    project.wait_for("train")
    ended = {n: project.stop(n) for n in reversed(project.order()) if not once(project.services[n]) and n not in NO_DISK}
    if wrong := {n: e for n, e in ended.items() if e[0] or e[1] > e[2]}:
        raise Failed(f"(exit code, seconds, grace) of {wrong}: {[project.log(n) for n in wrong]}")
    say("stopped", step=before, exit_code_seconds_grace=ended)
    again(project, before)


def again(project: Project, before: int) -> None:
    """Start what was stopped."""
    for name in project.order():
        run("podman", "start", project.container(name))
        project.wait_for(name)
    after = wait(f"a step beyond {before}", lambda: (s := project.step()) > before and s)
    found = json.loads(project.within("fetch", "dataset", "verify", "--deep", "--json", "--home", HOME))
    say("again", step_before=before, step_after=after, verified=found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the containers up, and their volumes")
    parser.add_argument("--again", type=int, metavar="STEP", help="only 6, of containers that were stopped and kept, from this step")
    given = parser.parse_args(arguments)
    if why := unable():
        sys.stdout.write(f"not run: {why}\n")
        return 3
    project = Project()
    try:
        show(project) if given.again is None else again(project, given.again)
    except Failed as e:
        sys.stdout.write(f"FAILED: {e}\n")
        return 1
    finally:
        if not given.keep:
            run(*project.compose, "down", "--volumes", check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
