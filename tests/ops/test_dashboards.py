"""The dashboards are what their code makes, ask only for what is exported, and say what they show."""

import importlib.util
import shutil

import pytest
import yaml

from streamlearn.contract import metrics
from tests.conftest import missing
from tests.ops import queries
from tests.ops.queries import OPS

UNITS = {"short", "s", "bytes", "Bps", "percentunit"}
# exported for whoever looks closer, and on no panel
UNSHOWN = {"demo_urls_announced_total", "demo_requests_total", "process_virtual_memory_bytes", "process_open_fds", "process_max_fds"}


def test_the_committed_json_is_what_the_code_makes():
    if importlib.util.find_spec("grafana_foundation_sdk") is None:
        missing("grafana-foundation-sdk is not installed")
    from ops.grafana.generate import dashboards

    made = dict(dashboards())
    assert set(made) == {file.name for file in queries.BOARDS}
    for name, text in made.items():
        assert (OPS / "grafana/dashboards" / name).read_text() == text, f"{name}: run python -m ops.grafana.generate"


def test_every_query_is_promql(tmp_path):
    if shutil.which("promtool") is None:
        missing("promtool is not installed: Debian's prometheus")
    rules = [{"record": f"panel:q{i}:x", "expr": expr.replace("$__rate_interval", "1m")} for i, (_, expr) in enumerate(queries.asked())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    code, said = queries.promtool("check", "rules", file)
    assert code == 0, said


def test_queries_read_only_what_is_exported_or_recorded():
    known = set(metrics.declared()) | queries.OF_PROMETHEUS | {r["record"] for r in queries.rules() if "record" in r}
    assert {(where, name) for where, expr in queries.asked() for name in queries.names(expr) - known} == set()


def test_selectors_name_labels_that_their_series_have():
    declared = metrics.declared()
    everything = [*queries.asked(), *((r.get("alert") or r["record"], r["expr"]) for r in queries.rules())]
    for where, expr in everything:
        for name, labels in queries.selectors(expr):
            assert labels - queries.ADDED <= declared.get(name, set()), (where, name, labels)


def test_everything_that_is_exported_is_shown_or_said_not_to_be():
    recorded = {r["record"]: r["expr"] for r in queries.rules() if "record" in r}
    shown = set().union(*(queries.names(expr) for _, expr in queries.asked()))
    shown |= set().union(*(queries.names(recorded[name]) for name in shown & set(recorded)))
    parts = {name.removesuffix(end) for name in shown for end in ("_bucket", "_sum", "_count")}
    unshown = {
        n
        for n in metrics.declared()
        if n not in shown and n.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") not in parts
    }
    assert {n for n in unshown if not n.endswith("_heartbeat_timestamp_seconds")} == UNSHOWN  # heartbeats are read by their pattern


@pytest.mark.parametrize("board", queries.BOARDS, ids=lambda p: p.stem)
def test_every_panel_says_what_it_shows_and_in_what_unit(board):
    found = queries.boards()[board.stem]
    assert found["uid"] == f"streamlearn-{board.stem}" and found["editable"] is False and found["description"]
    for panel in queries.panels(found):
        assert panel["title"] and panel["description"] and panel["targets"], panel["id"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"]["uid"] == "${datasource}" and all(t["legendFormat"] and t["refId"] for t in panel["targets"])
        for target in panel["targets"]:
            assert "rate(" not in target["expr"] or "[" in target["expr"]


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    ids = [p["id"] for board in queries.boards().values() for p in queries.panels(board)]
    assert len(ids) == len(set(ids))
    for board in queries.boards().values():
        taken = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
            taken |= cells


def test_a_panel_links_to_the_runbook_of_the_alerts_that_point_at_it():
    linked = {}
    for name, board in queries.boards().items():
        for panel in queries.panels(board):
            for link in panel.get("links", []):
                linked[link["title"].removeprefix("Runbook: ")] = (name, panel["id"], link["url"].rpartition("/")[2])
    for name, rule in queries.alerts().items():
        where = rule["annotations"]["dashboard_url"]
        board, panel, page = linked.pop(name)
        assert where == f"/d/streamlearn-{board}?viewPanel={panel}" and page == f"{name}.md"
    assert linked == {}


def test_grafana_is_told_where_everything_is():
    sources = yaml.safe_load((OPS / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    providers = yaml.safe_load((OPS / "grafana/provisioning/dashboards/streamlearn.yml").read_text())["providers"]
    assert [(s["uid"], s["type"], s["editable"]) for s in sources] == [("prometheus", "prometheus", False)]
    assert [(p["type"], p["allowUiUpdates"]) for p in providers] == [("file", False)]
