"""A real Alertmanager with the shipped file: a cause silences its consequences, and nothing else."""

import json
import shutil
import time
import urllib.request

import pytest

from tests.conftest import missing
from tests.ops import queries
from tests.ops.prometheus import free_port, running
from tests.ops.queries import OPS

LIMIT_S = 120
TOLD = {  # what would be told, with the labels that its rule leaves
    "ConnectorFailed": {"job": "connect"},
    "NoCandidates": {},
    "FetchBehind": {"job": "fetch", "instance": "fetch:9102"},
    "MostRefused": {"job": "fetch"},
    "NothingStored": {},
    "StreamStale": {},
    "LearnerStalled": {"job": "train"},
    "LearnerStarved": {"job": "train"},
    "LearnerCollapsing": {"job": "train", "instance": "train:9103"},
    "SnapshotOld": {"job": "train", "instance": "train:9103"},
    "EvaluatorBehind": {"job": "evaluate", "instance": "evaluate:9104"},
    "ServeBudgetBurning": {},
    "FreshnessBudgetBurningSlowly": {},
    "LearnerProgressBudgetBurningSlowly": {},
    "MetricsAbsent": {},
    "DiskFilling": {"job": "train", "instance": "train:9103"},
    "Watchdog": {},
}
LEARNERS = {"LearnerStalled", "LearnerStarved", "LearnerCollapsing", "SnapshotOld", "DiskFilling"}
FRESH, PROGRESS = {"FreshnessBudgetBurningSlowly"}, {"LearnerProgressBudgetBurningSlowly"}
OTHER, ELSEWHERE = ("RoleDown", {"job": "evaluate", "instance": "evaluate:9104"}), {"EvaluatorBehind", "MetricsAbsent"}
CAUSES = [
    (("RoleDown", {"job": "train", "instance": "train:9103"}), LEARNERS | PROGRESS | {"StreamStale", "MetricsAbsent"}),
    (("RoleAbsent", {"job": "train"}), LEARNERS | PROGRESS | {"StreamStale", "MetricsAbsent"}),
    (("RoleSilent", {"job": "train", "instance": "train:9103"}), LEARNERS | PROGRESS | {"StreamStale"}),
    (
        ("RoleDown", {"job": "fetch", "instance": "fetch:9102"}),
        FRESH | {"FetchBehind", "MostRefused", "NothingStored", "NoCandidates", "StreamStale", "MetricsAbsent"},
    ),
    (("RoleSilent", {"job": "connect", "instance": "connect:9101"}), FRESH | {"ConnectorFailed", "NothingStored", "NoCandidates", "StreamStale"}),
    (OTHER, ELSEWHERE),
    (("FetchWaiting", {"job": "fetch", "instance": "fetch:9102"}), FRESH | {"FetchBehind", "NothingStored", "StreamStale"}),
    (("LearnerWaitingForStore", {"job": "train", "instance": "train:9103"}), PROGRESS | {"LearnerStalled", "LearnerStarved", "StreamStale"}),
    (("DiskFull", {"job": "train", "instance": "train:9103"}), {"DiskFilling"}),
    (("DiskFull", {"job": "fetch", "instance": "fetch:9102"}), ELSEWHERE),
    (("FreshnessBudgetBurningFast", {}), FRESH),
    (("LearnerProgressBudgetBurningFast", {}), PROGRESS),
]  # fmt: skip


@pytest.mark.parametrize(("cause", "silenced"), CAUSES, ids=[f"{c[0]}-{c[1].get('job', '')}" for c, _ in CAUSES])
def test_a_cause_silences_what_follows_from_it_and_nothing_else(tmp_path, cause, silenced):
    if (program := shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")) is None:
        missing("Alertmanager is not installed: Debian's prometheus-alertmanager")
    rules, port = queries.alerts(), free_port()
    alerts = [
        {"labels": {"alertname": name, **labels} | rules[name]["labels"]} for name, labels in (cause, OTHER, *TOLD.items())
    ]  # once OTHER silences, the cause has been heard
    argv = [program, f"--config.file={OPS / 'alertmanager/alertmanager.yml'}", f"--storage.path={tmp_path}", "--cluster.listen-address="]
    with running([*argv, f"--web.listen-address=127.0.0.1:{port}"], tmp_path / "log"):
        at = f"http://127.0.0.1:{port}/api/v2/alerts"
        body, deadline = json.dumps(alerts).encode(), time.monotonic() + LIMIT_S

        def asked(data=None):
            """None: it is not there yet."""
            try:
                with urllib.request.urlopen(urllib.request.Request(at, data, {"Content-Type": "application/json"}), timeout=30) as answer:
                    return json.loads(answer.read() or b"[]")
            except OSError:
                return None

        while asked(body) is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        wanted = silenced | ELSEWHERE
        while (found := {a["labels"]["alertname"] for a in asked() or () if a["status"]["inhibitedBy"]}) != wanted:
            assert time.monotonic() < deadline, (found - wanted, wanted - found)
            time.sleep(0.2)
        assert len(asked()) == len({json.dumps(alert, sort_keys=True) for alert in alerts})
