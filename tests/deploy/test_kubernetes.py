"""The manifests for Kubernetes: what its schema takes, the same roles as docker-compose.yml, and nothing that a restricted namespace refuses."""

import importlib.util
import re
import shutil
import subprocess

import pytest
import yaml

from ops.docker.compose import load as compose
from ops.docker.rules import seconds
from streamlearn.cli.roles import ROLES
from streamlearn.contract.config_file import load
from tests.conftest import REPO, missing

TOP = REPO / "ops" / "kubernetes"
KUBERNETES = "1.31"  # the oldest that is kept up, or older
HOME, CONFIG, SECRETS = "/var/lib/streamlearn", "/etc/streamlearn", "/run/secrets"


@pytest.fixture
def top(tmp_path):
    """A copy, to be damaged."""
    shutil.copytree(TOP, tmp_path / "kubernetes")
    return tmp_path / "kubernetes"


def manifests(top):
    names = yaml.safe_load((top / "kustomization.yaml").read_text())["resources"]
    return [manifest for name in names for manifest in yaml.safe_load_all((top / name).read_text())]


def pods(top):
    return {m["metadata"]["name"]: m for m in manifests(top) if m["kind"] in ("StatefulSet", "Deployment")}


def containers(top):
    """Role -> (its pod's specification, its container)."""
    specs = (m["spec"]["template"]["spec"] for m in pods(top).values())
    return {c["name"]: (spec, c) for spec in specs for c in spec["containers"]}


def mounted(spec, container, path):
    name = next(m["name"] for m in container["volumeMounts"] if m["mountPath"] == path)
    return next((v for v in spec["volumes"] if v["name"] == name), {"claim": name})


def findings(top):
    ours, found = compose([REPO / "docker-compose.yml"], {})["services"], []
    config = load(top / "streamlearn.toml")
    roles = containers(top)
    if set(roles) != {role for role in ROLES if role in ours and role != "demo"}:
        found.append(f"other roles than in docker-compose.yml: {sorted(roles)}")
    for role, (spec, container) in sorted(roles.items()):
        found += [f"{role}: {line}" for line in of(role, spec, container, ours[role], config)] if role in ours else []
    return found


def of(role, spec, container, ours, config):
    port = {p["name"]: p["containerPort"] for p in container["ports"]}
    if container["args"] != ours["command"]:
        yield f"args {container['args']} are not those of docker-compose.yml"
    if port.get(f"prom-{role}") != config.metrics_port + ROLES.index(role):
        yield "its metrics are on another port"
    if spec["terminationGracePeriodSeconds"] < seconds(ours["stop_grace_period"]):
        yield "its grace is shorter than in docker-compose.yml"
    for probe, path in (("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        if container.get(probe, {}).get("httpGet") != {"path": path, "port": f"prom-{role}"}:
            yield f"{probe} does not ask {path}"
    if not spec["securityContext"].get("runAsNonRoot") or spec.get("automountServiceAccountToken", True):
        yield "its pod has more rights than it needs"
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    if container.get("securityContext") != wanted or "memory" not in container["resources"]["limits"]:
        yield "is not as hardened, or as limited, as in docker-compose.yml"
    secrets = {item["key"] for item in mounted(spec, container, SECRETS)["secret"]["items"]}
    if secrets - {"kafka_password"} != set(ours.get("secrets", [])) or ("kafka_password" in secrets) != ("bus" in ours["networks"]):
        yield f"has the secrets {sorted(secrets)}"


def test_they_are_what_kubernetes_takes(top):
    if importlib.util.find_spec("kubernetes_validate") is None:
        missing("kubernetes-validate is not installed")
    import kubernetes_validate

    for manifest in manifests(top):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    change(top, "replicas: 1", "replica: 1")
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        for manifest in manifests(top):
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def change(top, old, new, file="roles.yaml"):
    text = (top / file).read_text()
    assert old in text, f"{file} has no {old!r} to damage"
    (top / file).write_text(text.replace(old, new, 1))


def test_ours_are_whole():
    assert findings(TOP) == []


FAULTS = [
    ("args: [role, connect,", "args: [role, train,", "connect: args"),
    ("containerPort: 9102", "containerPort: 9103", "fetch: its metrics are on another port"),
    ("terminationGracePeriodSeconds: 300", "terminationGracePeriodSeconds: 30", "train: its grace is shorter"),
    ("path: /readyz", "path: /healthz", "connect: readinessProbe does not ask /readyz"),
    ("runAsNonRoot: true, ", "", "connect: its pod has more rights"),
    ("automountServiceAccountToken: false", "automountServiceAccountToken: true", "connect: its pod has more rights"),
    ("readOnlyRootFilesystem: true, ", "", "connect: is not as hardened"),
    ("{key: s3_credentials, path: s3_credentials}, ", "", "fetch: has the secrets ['kafka_password']"),
    ("- name: refresh\n", "- name: refreshed\n", "other roles than in docker-compose.yml"),
]


@pytest.mark.parametrize(("old", "new", "told"), FAULTS, ids=[told for _, _, told in FAULTS])
def test_what_is_wrong_is_found(top, old, new, told):
    change(top, old, new)
    assert [line for line in findings(top) if line.startswith(told)]


def test_there_are_never_two_of_what_must_be_one():
    kinds = {name: (m["kind"], m["spec"]["replicas"]) for name, m in pods(TOP).items()}
    assert kinds["connect"] == kinds["train"] == kinds["refresh"] == ("StatefulSet", 1)


def test_every_name_that_is_used_is_there():
    for name, manifest in pods(TOP).items():
        spec = manifest["spec"]["template"]["spec"]
        there = {v["name"] for v in spec["volumes"]} | {c["metadata"]["name"] for c in manifest["spec"].get("volumeClaimTemplates", [])}
        for container in spec["containers"]:
            assert {m["name"] for m in container["volumeMounts"]} <= there, name
            assert mounted(spec, container, CONFIG)["configMap"]["name"] == "streamlearn"
            assert all(len(port["name"]) <= 15 for port in container["ports"])  # the API server's own limit, which no schema holds
    services = {m["metadata"]["name"]: m["spec"] for m in manifests(TOP) if m["kind"] == "Service"}
    assert {m["spec"]["serviceName"] for m in pods(TOP).values() if m["kind"] == "StatefulSet"} <= set(services)
    ports = {p["name"] for _, c in containers(TOP).values() for p in c["ports"]}
    assert all(p["targetPort"] in ports for spec in services.values() for p in spec["ports"])


def test_fetchers_do_not_reach_what_is_private():
    policy = next(m for m in manifests(TOP) if m["metadata"]["name"] == "out-to-the-web")
    assert policy["spec"]["podSelector"]["matchExpressions"][0]["values"] == ["connect", "fetch"]
    blocks = [to["ipBlock"] for rule in policy["spec"]["egress"] for to in rule["to"] if "ipBlock" in to]
    web = next(block for block in blocks if block["cidr"] == "0.0.0.0/0")
    assert {"10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= set(web["except"])


def test_the_gpu_patch_lands_on_the_learner():
    patch = yaml.safe_load((TOP / "gpu" / "kustomization.yaml").read_text())["patches"][0]
    assert patch["target"] == {"kind": "StatefulSet", "name": "train"}
    learner = pods(TOP)["train"]["spec"]["template"]["spec"]["containers"][0]
    assert learner["name"] == "train" and learner["env"] and "limits" in learner["resources"]
    assert [step["path"].split("/")[6] for step in yaml.safe_load(patch["patch"])] == ["env", "resources"]


def test_prometheus_takes_the_scraping(tmp_path):
    if shutil.which("promtool") is None:
        missing("promtool is not installed: Debian's prometheus")
    config = yaml.safe_load((TOP / "prometheus.yml").read_text())
    found = config["scrape_configs"][0].pop("kubernetes_sd_configs")  # Debian builds Prometheus without it
    assert found == [{"role": "pod", "namespaces": {"names": ["streamlearn"]}}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config | {"rule_files": []}))
    command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    relabelled = config["scrape_configs"][0]["relabel_configs"][1]
    assert {re.fullmatch(relabelled["regex"], f"prom-{role}")[1] for role in containers(TOP)} == set(containers(TOP))
