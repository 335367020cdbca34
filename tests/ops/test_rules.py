"""Alerts fire when they must and not else, each has its page and its panel, and everything is read as Prometheus reads it."""

import importlib
import re
import shutil
import subprocess

import pytest
import yaml

from streamlearn.__main__ import COMMANDS
from streamlearn.contract import metrics
from streamlearn.contract.config import Config
from tests.conftest import REPO, missing
from tests.ops import queries
from tests.ops.queries import OPS
from tests.test_docs import keys

ALWAYS = {"Watchdog"}  # has no case that stays silent


@pytest.fixture(autouse=True)
def tools():
    for tool in ("promtool", "amtool"):
        if shutil.which(tool) is None:
            missing(f"{tool} is not installed: Debian's prometheus and prometheus-alertmanager")


def test_promtool_takes_configuration_and_rules():
    for file in ("prometheus.yml", "embedded.yml"):
        code, said = queries.promtool("check", "config", OPS / "prometheus" / file)
        assert code == 0, said
    code, said = queries.promtool("check", "rules", "--lint=all", "--lint-fatal", *queries.RULES)
    assert code == 0, said


@pytest.mark.parametrize("cases", queries.CASES, ids=lambda p: p.stem)
def test_what_is_recorded_is_evaluated_before_what_reads_it(cases):
    """promtool takes groups in the order of a Go map where none is given: one run in some fails for nothing."""
    said = yaml.safe_load(cases.read_text())
    groups = [group["name"] for file in said["rule_files"] for group in yaml.safe_load((cases.parent / file).read_text())["groups"]]
    assert len(groups) == 1 or said["group_eval_order"] == groups


@pytest.mark.parametrize("cases", queries.CASES, ids=lambda p: p.stem)
def test_the_cases_of_the_rules_hold(cases):
    code, said = queries.promtool("test", "rules", cases)
    assert code == 0, said


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent():
    fires, silent = set(), set()
    for file in queries.CASES:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test.get("alert_rule_test", ()):
                (fires if case["exp_alerts"] else silent).add(case["alertname"])
    assert fires == set(queries.alerts()) and silent == set(queries.alerts()) - ALWAYS


@pytest.mark.parametrize("speed", ["Fast", "Slowly"])
def test_progress_burns_as_freshness_does(speed):
    """Its cases cannot be given ratios, as those of freshness are: where there is no learner its recording rule says so."""
    freshness, progress = (queries.alerts()[f"{name}BudgetBurning{speed}"]["expr"] for name in ("Freshness", "LearnerProgress"))
    assert progress == freshness.replace("stream_late:ratio_rate", "learner_idle:ratio").replace("0.05", "0.01")


def test_what_is_recorded_looks_as_far_back_as_its_name_says():
    named = {rule["record"]: rule["expr"] for rule in queries.rules() if re.search(r"\d+[mhd]$", rule.get("record", ""))}
    assert len(named) >= 20
    for name, expr in named.items():
        ranges = set(re.findall(r"\[(\w+)(?::\w+)?\]", expr))
        assert ranges == {re.search(r"\d+[mhd]$", name)[0]}, (name, ranges)


def test_every_alert_names_its_severity_its_page_and_its_panel():
    boards = queries.boards()
    for name, rule in queries.alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket") or name in ALWAYS
        assert rule["annotations"]["runbook_url"] == f"docs/runbook/{name}.md"
        board, panel = re.fullmatch(r"/d/streamlearn-(\w+)\?viewPanel=(\d+)", rule["annotations"]["dashboard_url"]).groups()
        assert int(panel) in {p["id"] for p in queries.panels(boards[board])}, name


def test_every_alert_has_a_page_with_meaning_first_look_and_remedy_and_no_page_is_left_over():
    folder = REPO / "docs/runbook"
    assert {p.stem for p in folder.glob("*.md")} == set(queries.alerts())
    for name, rule in queries.alerts().items():
        text = (folder / f"{name}.md").read_text()
        parts = re.split(r"^## ", text, flags=re.M)
        assert [part.split("\n")[0] for part in parts[1:]] == ["Meaning", "First look", "Remedy"], name
        assert all(len(part.split()) > 4 for part in parts[1:]) and text.startswith(f"# {name}\n")
        assert rule["labels"]["severity"] in parts[0] and rule["annotations"]["summary"] in parts[0], name


def test_pages_name_commands_and_keys_that_there_are():
    known = keys(Config)
    sections = {key.partition(".")[0] for key in known if "." in key}
    for page in sorted((REPO / "docs/runbook").glob("*.md")):
        text = page.read_text()
        for name, below in re.findall(r"`streamlearn ([a-z]+)(?: ([a-z]+))?", text):
            module, attribute, _ = COMMANDS[name]
            group = getattr(getattr(importlib.import_module(module), attribute), "commands", None)
            assert not (below and group is not None and below not in group), f"{page.name}: streamlearn {name} {below}"
        named = {key for key in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)`", text) if key.partition(".")[0] in sections}
        assert named <= known, f"{page.name}: {named - known}"


def test_rules_read_only_what_is_exported_or_recorded():
    known = set(metrics.declared()) | queries.OF_PROMETHEUS | {r["record"] for r in queries.rules() if "record" in r}
    unknown = {name for rule in queries.rules() for name in queries.names(rule["expr"])} - known
    assert unknown == set()


def test_a_panel_shows_what_its_alert_is_about():
    boards, recorded = queries.boards(), {r["record"]: r["expr"] for r in queries.rules() if "record" in r}

    def read(expr):
        found = queries.names(expr)
        return found | {n for name in found & set(recorded) for n in queries.names(recorded[name])}

    elsewhere = {
        "RoleAbsent",
        "MetricsAbsent",
        "Watchdog",
        "AlertsUndelivered",
        "RulesFailing",
    }  # of Prometheus itself: the roles' panel is nearest
    for name, rule in queries.alerts().items():
        board, panel = re.findall(r"streamlearn-(\w+)\?viewPanel=(\d+)", rule["annotations"]["dashboard_url"])[0]
        shown = set().union(*(read(t["expr"]) for p in queries.panels(boards[board]) if p["id"] == int(panel) for t in p["targets"]))
        assert name in elsewhere or shown & read(rule["expr"]), name


def test_every_job_is_limited_and_both_configurations_read_the_same_rules():
    deployed, embedded = (yaml.safe_load((OPS / "prometheus" / f).read_text()) for f in ("prometheus.yml", "embedded.yml"))
    assert deployed["rule_files"] == embedded["rule_files"] == ["rules/*.yml"]
    for config in (deployed, embedded):
        for job in config["scrape_configs"]:
            assert job["job_name"] in ("prometheus", "alertmanager") or (job["sample_limit"] and job["label_limit"]), job["job_name"]
    ports = {job["job_name"]: job.get("static_configs", job.get("dns_sd_configs")) for job in deployed["scrape_configs"]}
    for place, role in enumerate(metrics.ROLES):  # the order is that of the ports (cli/roles.py)
        assert role == "demo" or str(9100 + place) in str(ports[role]), role


def route(*labels):
    argv = ["amtool", "config", "routes", "test", f"--config.file={OPS / 'alertmanager/alertmanager.yml'}", *labels]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_alertmanager_sends_each_severity_where_it_belongs():
    code = subprocess.run(["amtool", "check-config", OPS / "alertmanager/alertmanager.yml"], capture_output=True, check=False).returncode
    assert code == 0
    assert route("alertname=RoleDown", "severity=page", "job=train") == "page"
    assert route("alertname=NoCandidates", "severity=ticket") == "ticket"
    assert route("alertname=Watchdog", "severity=none") == "watchdog"
    assert route("alertname=SomebodyElses") == "ticket"


def test_what_is_inhibited_is_an_alert_there_is():
    known = set(queries.alerts())
    config = yaml.safe_load((OPS / "alertmanager/alertmanager.yml").read_text())
    for rule in config["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            if match := re.fullmatch(r'alertname(=~|!~|=)"(.+)"', matcher):
                for one in match[2].split("|"):
                    assert any(re.fullmatch(one, name) for name in known), one
