"""What the services say of each other: addresses in the roles' configuration, scrape targets, data sources, and the networks between them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ops.docker.compose import read, target
from streamlearn.cli.roles import ROLES
from streamlearn.contract.config import Config
from streamlearn.contract.config_file import load

NEEDS = {  # role -> what it talks to
    "connect": {"log"},
    "fetch": {"log", "store"},
    "train": {"log", "store", "registry"},
    "evaluate": {"store", "registry"},
    "refresh": {"log", "store"},
    "serve": {"registry"},
}
SECRETS = {"store": "s3_credentials", "registry": "registry_password"}
STORES = {"kafka": 0, "s3": 9327, "registry": 5001, "prometheus": 9090, "alertmanager": 9093, "grafana": 3000}  # metrics ports; 0: none
BEHIND = {"weed", "registry", "prometheus", "alertmanager", "grafana"}  # what a fetcher that was taken over must not reach ...
MAY_SEE = {"prometheus"}  # ... but who scrapes it, which has no admin port
Services = Mapping[str, Mapping[str, Any]]


def findings(project: Mapping[str, Any], top: Path, file: Path, env: Mapping[str, str]) -> Iterator[str]:
    services, config = project["services"], load(file, env={})
    yield from _addresses(services, config)
    yield from _granted(services, config)
    yield from _agreed(project, services, config, env)
    yield from _fetcher(project, services)
    yield from _published(services, config, top)
    yield from _scraped(services, config, top)
    yield from _grafana(services, top)


def _addresses(services: Services, config: Config) -> Iterator[str]:
    """Every role reaches what it talks to."""
    addresses = {
        "log": [s.partition(":")[::2] for s in config.log.kafka.servers],
        "store": [_host(config.store.endpoint_url)],
        "registry": [_host(config.snapshots.registry)],
    }
    for role, needs in NEEDS.items():
        for what in sorted(needs):
            for host, _ in addresses[what]:
                if host not in services:
                    yield f"{role}: its {what} is {host}, which is no service"
                elif not reach(services, role, host):
                    yield f"{role}: shares no network with {host}, its {what}"


def _host(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.hostname or "", str(parts.port or "")


def reach(services: Services, one: str, other: str) -> bool:
    return bool(set(services[one].get("networks", [])) & set(services[other].get("networks", [])))


def _granted(services: Services, config: Config) -> Iterator[str]:
    """Every role has the secrets of what it talks to, and no others."""
    for role, needs in NEEDS.items():
        wanted = {SECRETS[what] for what in needs if what in SECRETS} | ({"serve_tokens"} if role == "serve" else set())
        given = set(services[role].get("secrets", []))
        yield from (f"{role}: lacks the secret {s}" for s in sorted(wanted - given))
        yield from (f"{role}: has the secret {s}, which it does not need" for s in sorted(given - wanted))
    named = {config.snapshots.password_file, config.serve.tokens_file, config.log.kafka.sasl_password_file} - {""}
    every = {s for service in services.values() for s in service.get("secrets", [])}
    yield from (f"{path}: no service has this secret" for path in sorted(named) if Path(path).name not in every)


def _agreed(project: Mapping[str, Any], services: Services, config: Config, env: Mapping[str, str]) -> Iterator[str]:
    """Numbers that stand in two places."""
    topics = services["topics"]["environment"]
    if int(topics["PARTITIONS"]) != config.log.partitions:
        yield f"log.partitions = {config.log.partitions}, but topics makes {topics['PARTITIONS']} (PARTITIONS)"
    if int(topics["RETRIES"]) != len(config.fetch.retry_delays_s):
        yield f"fetch.retry_delays_s has {len(config.fetch.retry_delays_s)} delays, but topics makes {topics['RETRIES']} retry topics"
    longest = max(config.fetch.retry_delays_s, default=0.0)
    if int(topics["KEEP_MS"]) <= longest * 1000:
        yield f"KEEP_MS = {topics['KEEP_MS']} is not over the longest of fetch.retry_delays_s, {longest:g} s: what is to be tried again is deleted"
    subnet = project["networks"]["world"]["ipam"]["config"][0]["subnet"]
    if set(config.fetch.allow_networks) - {subnet}:
        yield f"fetch.allow_networks = {list(config.fetch.allow_networks)} is more than the demo's network {subnet}"
    if config.demo.enabled and subnet not in config.fetch.allow_networks:
        yield f"fetch.allow_networks lacks the demo's network {subnet}"
    if config.metrics_host != "0.0.0.0":
        yield f"metrics_host = {config.metrics_host!r}: nobody but its own container could ask"


def _fetcher(project: Mapping[str, Any], services: Services) -> Iterator[str]:
    """Who reads what strangers send reaches nothing but what it must."""
    for other in sorted(BEHIND - MAY_SEE):
        if other in services and reach(services, "fetch", other):
            yield f"fetch: shares a network with {other}"
    for name in ("kafka", "weed", "s3"):
        loose = [n for n in services[name]["networks"] if not (project["networks"].get(n) or {}).get("internal")]
        yield from (f"{name}: on the network {n}, which is not internal" for n in loose)


def _published(services: Services, config: Config, top: Path) -> Iterator[str]:
    """A published port is one that the service listens to: its health check, its command or a file it reads names it."""
    for name, service in services.items():
        said = " ".join(map(str, [*service.get("command", []), *service.get("healthcheck", {}).get("test", [])]))
        for mount in service.get("volumes", []):
            source = top / mount.split(":")[0]
            said += source.read_text() if source.is_file() else ""
        for published in service.get("ports", []):
            port = str(published).rpartition(":")[2]
            if not re.search(rf"\b{port}\b", said) and not (name == "serve" and int(port) == config.serve.port):
                yield f"{name}: publishes {port}, which nothing in its command, health check or files names"


def metrics_ports(config: Config) -> dict[str, int]:
    """Service -> where its /metrics is."""
    return {role: config.metrics_port + i for i, role in enumerate(ROLES)} | STORES


def _scraped(services: Services, config: Config, top: Path) -> Iterator[str]:
    file = top / "ops/prometheus/prometheus.yml"
    if not file.exists():
        yield "ops/prometheus/prometheus.yml: not there"
        return
    found, ports = read(file), metrics_ports(config)
    seen = set()
    for job, host, port in targets(found):
        seen.add(host)
        if host == "localhost" or host not in services:
            if host != "localhost":
                yield f"prometheus: job {job} asks {host}, which is no service"
            continue
        if ports.get(host) != port:
            yield f"prometheus: job {job} asks {host}:{port}, whose metrics are on {ports.get(host) or 'no port'}"
        if host != "prometheus" and not reach(services, "prometheus", host):
            yield f"prometheus: shares no network with {host}, which it is to scrape"
    yield from (f"prometheus: nobody scrapes {role}" for role in sorted(set(NEEDS) - seen))
    mounted = [target(v) for v in services["prometheus"]["volumes"]]
    for pattern in found.get("rule_files", []):
        absolute = pattern if pattern.startswith("/") else f"/etc/prometheus/{pattern}"
        if not any(absolute.startswith(f"{m.rstrip('/')}/") for m in mounted if m != "/prometheus"):
            yield f"prometheus: rule_files {pattern} is not mounted"


def targets(found: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(job, host, port), also of Alertmanager and of names that are looked up."""
    jobs = [*found.get("scrape_configs", []), *found.get("alerting", {}).get("alertmanagers", [])]
    for job in jobs:
        name = job.get("job_name", "alerting")
        for block in job.get("static_configs", []):
            for each in block["targets"]:
                host, _, port = each.partition(":")
                yield name, host, int(port)
        for block in job.get("dns_sd_configs", []):
            for each in block["names"]:
                yield name, each.removeprefix("tasks."), int(block.get("port", 0))


def _grafana(services: Services, top: Path) -> Iterator[str]:
    """Its data sources are services that it reaches; its dashboards lie where it is told to look."""
    mounts = {target(m): m.split(":")[0] for m in services["grafana"]["volumes"]}
    provisioning = top / "ops/grafana/provisioning"
    for file in sorted((provisioning / "datasources").glob("*.y*ml")):
        for source in read(file)["datasources"]:
            host, port = _host(source["url"])
            if host not in services or not reach(services, "grafana", host) or port != str(STORES.get(host, "")):
                yield f"grafana: its data source {source['url']} is not a service and port that it reaches"
    for file in sorted((provisioning / "dashboards").glob("*.y*ml")):
        for provider in read(file)["providers"]:
            folder = mounts.get(provider["options"]["path"])
            if folder is None or not list((top / folder).glob("*.json")):
                yield f"grafana: no dashboards are mounted at {provider['options']['path']}"
