"""What holds for every service by itself, and for its mounts, ports, secrets and dependencies.  Each rule yields findings as sentences."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ops.docker.compose import target
from ops.docker.make_secrets import contents

ROOT_REASON, OURS = "org.streamlearn.root", "streamlearn:"
WRITABLE = {"kafka"}  # its image writes its configuration at start
SHARED = {"learner-home", "demo-world"}  # volumes that more than one service may write
SECRET_NAME = re.compile(r"(PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL)[A-Z]*$")
CANNOT_FAIL = re.compile(r"\|\|\s*(true|:|exit 0)|kill -0 1\b|\$\$\?")
LEARNER_GRACE_S, ROLE_GRACE_S = 120, 30
UNITS = {"s": 1, "m": 60, "h": 3600}
Services = Mapping[str, Mapping[str, Any]]


def findings(project: Mapping[str, Any], top: Path) -> Iterator[str]:
    services = project["services"]
    for name, service in services.items():
        for rule in (_image, _hardened, _limits, _health, _grace, _environment):
            yield from (f"{name}: {line}" for line in rule(name, service))
    for whole in (_dependencies, _ports, _networks):
        yield from whole(project, services)
    yield from _mounts(project, services, top)
    yield from _secrets(project, services)


def once(service: Mapping[str, Any]) -> bool:
    """Ends by itself: an init, not a server."""
    return service.get("restart") == "no"


def _image(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    image = str(service.get("image", ""))
    tag = image.rpartition("/")[2].partition(":")[2]
    if not tag or tag.startswith("latest"):
        yield f"image {image!r}: name a tag, and not latest"


def _hardened(name: str, service: Mapping[str, Any]) -> Iterator[str]:
    user = str(service.get("user", ""))
    root = not user or user.partition(":")[0] in ("0", "root")
    if root and not service.get("labels", {}).get(ROOT_REASON):
        yield f"user {user!r}: runs as root; set user, or say why in the label {ROOT_REASON}"
    if service.get("cap_drop") != ["ALL"]:
        yield "cap_drop is not [ALL]"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "security_opt lacks no-new-privileges:true"
    if not service.get("read_only") and name not in WRITABLE:
        yield "read_only is not set: whoever breaks in can write to its programs"
    if service.get("privileged") or "host" in (service.get("network_mode"), service.get("pid"), service.get("ipc")):
        yield "shares the host"


def _limits(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    limits = service.get("deploy", {}).get("resources", {}).get("limits", {})
    yield from (f"deploy.resources.limits lacks {what}" for what in ("memory", "pids") if what not in limits)
    if "restart" not in service:
        yield 'restart: say unless-stopped, or "no" for what ends by itself'


def _health(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    test = service.get("healthcheck", {}).get("test")
    if once(service):
        return
    if not test:
        yield "no health check"
        return
    words = " ".join(test)
    if CANNOT_FAIL.search(words):
        yield f"its health check cannot fail: {words}"
    if test[0] not in ("CMD", "CMD-SHELL") or (test[0] == "CMD" and "CMD" in test[1:]):
        yield f"its health check is not [CMD, …] or [CMD-SHELL, …]: {words}"
    if OURS in str(service["image"]) and re.search(r"\b(curl|wget)\b", words):
        yield "its health check asks for curl or wget, which our image has not"


def _grace(name: str, service: Mapping[str, Any]) -> Iterator[str]:
    if OURS not in str(service["image"]) or once(service):
        return
    least, given = LEARNER_GRACE_S if name == "train" else ROLE_GRACE_S, seconds(str(service.get("stop_grace_period", "10s")))
    if given < least:
        yield f"stop_grace_period of {given:g} s is under {least} s: killed before its checkpoint or shard is whole"


def seconds(text: str) -> float:
    return sum(float(n) * UNITS[unit] for n, unit in re.findall(r"([\d.]+)([smh])", text))


def _environment(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    for key, value in service.get("environment", {}).items():
        if SECRET_NAME.search(key) and not str(value).startswith("/run/secrets/"):
            yield f"environment {key}: a secret in the environment is in every `inspect`; mount it as a file"


def _dependencies(_: Mapping[str, Any], services: Services) -> Iterator[str]:
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            if needed not in services:
                yield f"{name}: depends on {needed}, which is no service"
                continue
            condition, other = how["condition"], services[needed]
            if condition == "service_healthy" and "healthcheck" not in other:
                yield f"{name}: waits for {needed} to be healthy, which has no health check"
            if (condition == "service_completed_successfully") != once(other):
                yield f"{name}: waits for {needed} by {condition}, but it {'ends' if once(other) else 'does not end'} by itself"
            if alone := set(service.get("profiles", [])) - set(other.get("profiles", service.get("profiles", []))):
                yield f"{name}: in profile {', '.join(sorted(alone))} without {needed}, on which it depends"
    yield from _cycles(services)


def _cycles(services: Services) -> Iterator[str]:
    left = {name: {n for n in service.get("depends_on", {}) if n in services} for name, service in services.items()}
    while ready := [name for name, needs in left.items() if not needs]:
        for name in ready:
            del left[name]
        for needs in left.values():
            needs.difference_update(ready)
    if left:
        yield f"wait for each other: {', '.join(sorted(left))}"


def _ports(_: Mapping[str, Any], services: Services) -> Iterator[str]:
    taken: dict[str, str] = {}
    for name, service in services.items():
        for published in service.get("ports", []):
            address, _, rest = str(published).partition(":")
            port = rest.partition(":")[0]
            if address != "127.0.0.1" or not rest:
                yield f"{name}: port {published} is published to everybody; write 127.0.0.1:host:container"
            elif port in taken:
                yield f"{name}: port {port} is {taken[port]}'s already"
            taken.setdefault(port, name)


def _networks(project: Mapping[str, Any], services: Services) -> Iterator[str]:
    declared = project.get("networks") or {}
    used = {n for service in services.values() for n in service.get("networks", [])}
    yield from (f"network {n}: not declared" for n in sorted(used - set(declared)))
    yield from (f"network {n}: nobody is on it" for n in sorted(set(declared) - used))
    for name, service in services.items():
        mine = service.get("networks", [])
        if not mine and "network_mode" not in service:
            yield f"{name}: on no network of its own, so on the default one with everybody"
        if service.get("ports") and all((declared.get(n) or {}).get("internal") for n in mine):
            yield f"{name}: publishes a port, but all its networks are internal: the port leads nowhere"


def _mounts(project: Mapping[str, Any], services: Services, top: Path) -> Iterator[str]:
    declared, writers = project.get("volumes") or {}, dict[str, list[str]]()
    for name, service in services.items():
        for mount in service.get("volumes", []):
            source, read_only = (mount.split(":")[0] if ":" in mount else ""), mount.endswith(":ro")
            if not target(mount).startswith("/"):
                yield f"{name}: mount {mount} does not land on an absolute path"
            if "docker.sock" in mount:
                yield f"{name}: mount {mount} gives the host away"
            if source.startswith(("./", "../", "/")):
                if not (top / source).exists():
                    yield f"{name}: mount {mount}: {source} is not there"
                if not read_only:
                    yield f"{name}: mount {mount}: a file of the host without :ro"
            elif source:
                writers.setdefault(source, []).extend([] if read_only or once(service) else [name])
    yield from (f"volume {v}: not declared" for v in sorted(set(writers) - set(declared)))
    standin = "hook" in services  # its roles share the embedded log, and so one home: the others' are left over
    yield from (f"volume {v}: nobody mounts it" for v in sorted(set(declared) - set(writers)) if not standin)
    for volume, names in writers.items():
        if len(names) > 1 and volume not in SHARED:
            yield f"volume {volume}: written by {', '.join(names)}"


def _secrets(project: Mapping[str, Any], services: Services) -> Iterator[str]:
    declared = project.get("secrets") or {}
    made = {file for group in contents().values() for file in group}
    for secret, how in declared.items():
        if Path(how["file"]).name not in made:
            yield f"secret {secret}: {how['file']} is not made by `make secrets`"
    granted = {name: set(service.get("secrets", [])) for name, service in services.items()}
    everywhere = set().union(*granted.values())
    yield from (f"secret {s}: not declared" for s in sorted(everywhere - set(declared)))
    yield from (f"secret {s}: nobody has it" for s in sorted(set(declared) - everywhere))
    for name, service in services.items():
        told = " ".join([*map(str, service.get("command") or []), *map(str, service.get("environment", {}).values())])
        for secret in sorted(set(re.findall(r"/run/secrets/(\w+)", told)) - granted[name]):
            yield f"{name}: reads the secret {secret}, which it is not given"
