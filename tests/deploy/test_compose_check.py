"""`make compose-check` finds what is wrong with the deployment; ours has nothing wrong with it."""

import importlib.util
import shutil

import pytest

from ops.docker.check import findings
from ops.docker.compose import Missing, interpolated, merged
from tests.conftest import REPO, missing

FILES = ("docker-compose.yml", ".env.example", "constraints.txt")
STANDIN, GPU, TOPICS, DEMO = (f"ops/docker/{n}" for n in ("compose.standin.yml", "compose.gpu.yml", "topics.sh", "demo.toml"))
PROMETHEUS = "ops/prometheus/prometheus.yml"


@pytest.fixture
def top(tmp_path):
    """A copy of what is checked, to be damaged."""
    for name in FILES:
        shutil.copy(REPO / name, tmp_path / name)
    shutil.copytree(REPO / "ops", tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__", "secrets"))
    return tmp_path


def test_ours_is_whole():
    assert list(findings(REPO, schema=False)) == []


def test_ours_is_what_compose_and_hadolint_take(top):
    if importlib.util.find_spec("check_jsonschema") is None:
        missing("check-jsonschema is not installed")
    assert list(findings(REPO)) == []
    change(top, "docker-compose.yml", "stop_grace_period: 300s", "stop_grace_perid: 300s")
    change(top, "ops/docker/Dockerfile", "WORKDIR /src\n", "WORKDIR src\n")
    found = "\n".join(findings(top))
    assert "stop_grace_perid" in found and "DL3000" in found


def change(top, file, old, new):
    text = (top / file).read_text()
    assert old in text, f"{file} has no {old!r} to damage"
    (top / file).write_text(text.replace(old, new, 1))


def health(role):
    """Its health check, as it stands in the file."""
    return f"    healthcheck:\n      <<: *health\n      test: [CMD, streamlearn, health, {role}, --home, /var/lib/streamlearn]\n"


KAFKAS = """    healthcheck:
      <<: *health
      test: [CMD-SHELL, "/opt/kafka/bin/kafka-broker-api-versions.sh --bootstrap-server localhost:9092 >/dev/null"]
"""
COMPOSE = "docker-compose.yml"
FAULTS = [
    (COMPOSE, "image: apache/kafka:4.3.1", "image: apache/kafka", "kafka: image 'apache/kafka'|topics: image 'apache/kafka'"),
    (COMPOSE, "image: registry:3.1.1", "image: registry:latest", "registry: image 'registry:latest'"),
    (COMPOSE, 'user: "472:472"', 'user: "0:0"', "grafana: user '0:0': runs as root"),
    (COMPOSE, 'labels: {org.streamlearn.root: "gives each volume to its server, without a network, and ends"}', "labels: {}", "owners: user '0:0'"),
    (COMPOSE, "  cap_drop: [ALL]\n", "", "train: cap_drop is not"),
    (COMPOSE, "  read_only: true\n", "", "fetch: read_only is not set"),
    (COMPOSE, 'limits: {memory: 512m, cpus: "2", pids: 256}', 'limits: {memory: 512m, cpus: "2"}', "registry: deploy.resources.limits lacks pids"),
    (COMPOSE, "stop_grace_period: 300s", "stop_grace_period: 10s", "train: stop_grace_period of 10 s is under 120 s"),
    (COMPOSE, "127.0.0.1:${GRAFANA_PORT:-3000}:3000", "${GRAFANA_PORT:-3000}:3000", "grafana: port 3000:3000 is published to everybody"),
    (COMPOSE, "${GRAFANA_PORT:-3000}:3000", "${PROMETHEUS_PORT:-9090}:3000", "grafana: port 9090 is prometheus's already"),
    (COMPOSE, "${SERVE_PORT:-5640}:5640", "${SERVE_PORT:-5640}:5641", "serve: publishes 5641, which nothing"),
    (COMPOSE, "test: [CMD, streamlearn, health, train,", "test: [CMD, curl, health, train,", "train: its health check asks for curl"),
    (COMPOSE, "localhost:9092 >/dev/null", "localhost:9092 || true", "kafka: its health check cannot fail"),
    (COMPOSE, "./ops/docker/registry.yml:/etc", "./ops/docker/registri.yml:/etc", "registry: mount ./ops/docker/registri.yml"),
    (COMPOSE, "registry.yml:/etc/distribution/config.yml:ro", "registry.yml:/etc/distribution/config.yml", "a file of the host without :ro"),
    (COMPOSE, "serve-home:/var/lib/streamlearn", "refresh-home:/var/lib/streamlearn", "volume refresh-home: written by refresh, serve"),
    (COMPOSE, "secrets: [registry_htpasswd]", "secrets: [registry_htpasswords]", "secret registry_htpasswords: not declared"),
    (COMPOSE, "secrets: [registry_password, serve_tokens]", "secrets: [registry_password]", "serve: lacks the secret serve_tokens"),
    (COMPOSE, "secrets: [s3_identities]", "secrets: []", "s3: reads the secret s3_identities, which it is not given"),
    (COMPOSE, "GF_SECURITY_ADMIN_PASSWORD__FILE: /run/secrets/grafana_admin_password", "GF_SECURITY_ADMIN_PASSWORD: admin", "grafana: environment GF_"),
    (COMPOSE, "networks: [bus, store, web, world, scrape]", "networks: [bus, store, web, world, scrape, vault]", "fetch: shares a network with weed"),
    (COMPOSE, "networks: [bus, store, web, world, scrape]", "networks: [bus, web, world, scrape]", "fetch: shares no network with s3, its store"),
    (COMPOSE, "  vault: {internal: true}", "  vault: {}", "weed: on the network vault, which is not internal"),
    (COMPOSE, "networks: [models, front, scrape]", "networks: [models, scrape]", "serve: publishes a port, but all its networks are internal"),
    (COMPOSE, "kafka: {condition: service_healthy}", "kafka: {condition: service_completed_successfully}", "topics: waits for kafka by service_completed"),
    (COMPOSE, "depends_on: {weed: {condition: service_healthy}}", "depends_on: {bucket: {condition: service_completed_successfully}}", "wait for each other"),
    (COMPOSE, "profiles: [core, monitoring, demo]", "profiles: [core]", "prometheus: in profile monitoring without owners"),
    (GPU, "profiles: [core, gpu]", "profiles: [gpu]", "train: in profile core without gpu-check"),
    (DEMO, "partitions = 6", "partitions = 3", "log.partitions = 3, but topics makes 6"),
    (DEMO, 'allow_networks = ["172.31.250.0/24"]', 'allow_networks = ["172.16.0.0/12"]', "is more than the demo's network"),
    (DEMO, 'servers = ["kafka:9092"]', 'servers = ["kafka-1:9092"]', "its log is kafka-1, which is no service"),
    (DEMO, 'metrics_host = "0.0.0.0"', 'metrics_host = "127.0.0.1"', "nobody but its own container could ask"),
    (DEMO, "metrics_port = 9100", "metrics_port = 9200", "whose metrics are on 9203"),
    (DEMO, "retry_delays_s = [30.0, 300.0, 3600.0]", "retry_delays_s = [30.0, 300.0]", "has 2 delays, but topics makes 3"),
    (".env.example", "KEEP_MS=1209600000", "KEEP_MS=60000", "what is to be tried again is deleted"),
    (PROMETHEUS, "train:9103", "train:9102", "job train asks train:9102, whose metrics are on 9103"),
    (PROMETHEUS, "train:9103", "learner:9103", "asks learner, which is no service"),
    (PROMETHEUS, "rule_files: [rules/", "rule_files: [/alerts/", "is not mounted"),
    ("ops/grafana/provisioning/datasources/prometheus.yml", "prometheus:9090", "prometheus:9091", "data source http://prometheus:9091"),
    (COMPOSE, "dashboards:/var/lib/grafana/dashboards:ro", "dashboards:/var/lib/dashboards:ro", "no dashboards are mounted at"),
    (COMPOSE, "127.0.0.1:${GRAFANA_PORT:-3000}:3000", "0.0.0.0:${GRAFANA_PORT:-3000}:3000", "port 0.0.0.0:3000:3000 is published to everybody"),
    (COMPOSE, '  security_opt: ["no-new-privileges:true"]\n', "", "train: security_opt lacks no-new-privileges:true"),
    (COMPOSE, "shm_size: 2gb", "privileged: true", "train: shares the host"),
    (COMPOSE, "shm_size: 2gb", "network_mode: host", "train: shares the host"),
    (COMPOSE, "shm_size: 2gb", "pid: host", "train: shares the host"),
    (COMPOSE, "limits: {memory: 2g, cpus: \"2\", pids: 512}", "limits: {pids: 512}", "kafka: deploy.resources.limits lacks memory"),
    (COMPOSE, "  restart: unless-stopped\n", "", "serve: restart: say unless-stopped"),
    (COMPOSE, health("fetch"), "", "fetch: no health check"),
    (COMPOSE, health("serve"), "    healthcheck: {disable: true}\n", "serve: no health check"),
    (COMPOSE, "test: [CMD, streamlearn, health, train,", "test: [streamlearn, health, train,", "train: its health check is not [CMD, …]"),
    (COMPOSE, "test: [CMD, streamlearn, health, train,", "test: [CMD, CMD, streamlearn, health, train,", "train: its health check is not [CMD, …]"),
    (COMPOSE, "    stop_grace_period: 300s", "    # stop_grace_period: 300s", "train: stop_grace_period of 10 s is under 120 s"),
    (COMPOSE, "    stop_grace_period: 30s\n", "", "serve: stop_grace_period of 10 s is under 30 s"),
    (COMPOSE, "depends_on: {s3: {condition", "depends_on: {minio: {condition", "bucket: depends on minio, which is no service"),
    (COMPOSE, "networks: [watch]\n    ports", "networks: [watch, wide]\n    ports", "network wide: not declared"),
    (COMPOSE, "  front: {} # published ports", "  front: {}\n  spare: {}", "network spare: nobody is on it"),
    (COMPOSE, "    networks: [world, scrape]\n", "", "demo: on no network of its own"),
    (COMPOSE, '"weed-data:/data"', '"weed-data:data"', "weed: mount weed-data:data does not land on an absolute path"),
    (COMPOSE, '"weed-data:/data"', '"weed-data:/data", "/var/run/docker.sock:/var/run/docker.sock:ro"', "gives the host away"),
    (COMPOSE, "  serve-home: {}\n", "", "volume serve-home: not declared"),
    (COMPOSE, "  serve-home: {}\n", "  serve-home: {}\n  spare: {}\n", "volume spare: nobody mounts it"),
    (COMPOSE, "secrets/serve_tokens}", "secrets/serve_token}", "secret serve_tokens: ./ops/docker/secrets/serve_token is not made by"),
    (COMPOSE, "secrets: [grafana_admin_password]", "secrets: []", "secret grafana_admin_password: nobody has it|grafana: reads the secret"),
    (COMPOSE, "secrets: [registry_password, serve_tokens]", "secrets: [registry_password, serve_tokens, s3_credentials]", "serve: has the secret s3_credentials, which it"),
    (COMPOSE, KAFKAS, "", "topics: waits for kafka to be healthy, which has no health check"),
    (DEMO, "/run/secrets/serve_tokens", "/run/secrets/tokens", "/run/secrets/tokens: no service has this secret"),
    (COMPOSE, "networks: [scrape, vitals, watch]", "networks: [vitals, watch]", "prometheus: shares no network with train, which it is to scrape"),
    (DEMO, 'allow_networks = ["172.31.250.0/24"]', "allow_networks = []", "fetch.allow_networks lacks the demo's network"),
    (PROMETHEUS, "train:9103", "demo:9100", "prometheus: nobody scrapes train"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new", "said"), FAULTS, ids=[f[3][:50] for f in FAULTS])
def test_a_fault_is_found_and_named(top, file, old, new, said):
    change(top, file, old, new)
    found = list(findings(top, schema=False))
    assert any(part in line for line in found for part in said.split("|")), found


def test_variables_are_filled_in_as_compose_does():
    assert interpolated(["${A:-x}/$A", "$$A", "${B:-}"], {"A": "1"}) == ["1/1", "$A", ""]
    with pytest.raises(Missing, match="C: say it"):
        interpolated("${C:?say it}", {})
    with pytest.raises(Missing, match="D: not set"):
        interpolated("${D}", {})


def test_files_are_merged_as_compose_does():
    below = {"a": {"ports": ["1"], "volumes": ["v:/x", "w:/y:ro"], "command": ["one"], "environment": {"A": "1"}}}
    above = {"a": {"ports": ["2"], "volumes": ["u:/x"], "command": ["two"], "environment": {"B": "2"}}}
    assert merged(below, above)["a"] == {
        "ports": ["1", "2"], "volumes": ["w:/y:ro", "u:/x"], "command": ["two"], "environment": {"A": "1", "B": "2"},
    }  # fmt: skip
