"""What the rules and dashboards ask, and of which series."""

import json
import re
import subprocess

import yaml

from tests.conftest import REPO

OPS = REPO / "ops"
RULES = sorted((OPS / "prometheus/rules").glob("*.yml"))
CASES = sorted((OPS / "prometheus/tests").glob("*.yml"))
BOARDS = sorted((OPS / "grafana/dashboards").glob("*.json"))
WORDS = {"and", "or", "unless", "bool", "offset", "by", "on", "without", "ignoring", "inf", "nan"}
OF_PROMETHEUS = {"up", "ALERTS", "prometheus_notifications_errors_total", "prometheus_rule_evaluation_failures_total"}
ADDED = {"job", "instance", "__name__", "alertname", "alertstate", "severity"}  # labels that Prometheus adds


def rules():
    return [rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def alerts():
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def panels(board):
    return [p for p in board["panels"] if p["type"] != "row"]


def boards():
    return {file.stem: json.loads(file.read_text()) for file in BOARDS}


def asked():
    """(where, expression) of every panel's query."""
    return [(f"{name}/{p['id']} {p['title']}", t["expr"]) for name, board in boards().items() for p in panels(board) for t in p["targets"]]


def names(expr):
    """Series that an expression reads; a selector by __name__ gives nothing."""
    bare = re.sub(r'"[^"]*"', '""', expr)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    return {n for n in re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", bare) if n not in WORDS}


def selectors(expr):
    """(series, labels of its selector)."""
    return [
        (name, set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', inside)))
        for name, inside in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expr)
    ]


def promtool(*arguments):
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr
