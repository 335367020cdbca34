"""Writes ops/grafana/dashboards/*.json: `python -m ops.grafana.generate`.  The JSON is committed; a test makes it again and compares.

Panels link to the runbook pages of the alerts that point at them (ops/prometheus/rules).  Where your docs are to be read:
`--runbook https://…/docs/runbook`.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.builders import common as builders
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard

from ops.grafana import ingest, learner, overview, snapshots
from ops.grafana.panel import BAD, GOOD, Board, Panel

HERE = Path(__file__).parent
RULES = HERE.parent / "prometheus" / "rules"
BOARDS = (overview.BOARD, ingest.BOARD, learner.BOARD, snapshots.BOARD)
RUNBOOK = "https://example.org/streamlearn/docs/runbook"
LAST = builders.ReduceDataOptions().calcs(["lastNotNull"])
SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
POINTED = re.compile(r"- alert: (\w+)\n(?:(?!- alert:)[\s\S])*?dashboard_url: \"/d/streamlearn-(\w+)\?viewPanel=(\d+)\"")


def pointed_at() -> dict[tuple[str, int], list[str]]:
    """(board, panel) -> the alerts whose annotations name it."""
    found = defaultdict(list)
    for file in sorted(RULES.glob("*.yml")):
        for alert, board, number in POINTED.findall(file.read_text()):
            found[board, int(number)].append(alert)
    return dict(found)


def dashboards(runbook: str = RUNBOOK) -> Iterator[tuple[str, str]]:
    """(file name, JSON)."""
    alerts = pointed_at()
    for board in BOARDS:
        made = json.loads(JSONEncoder(sort_keys=True).encode(_board(board, alerts, runbook).build()))
        yield f"{board.name}.json", json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _board(board: Board, alerts: dict[tuple[str, int], list[str]], runbook: str) -> build.Dashboard:
    made = build.Dashboard(board.title).uid(f"streamlearn-{board.name}").description(board.description).tags(["streamlearn"])
    made = made.refresh("30s").time("now-6h", "now").timezone("utc").readonly()
    made = made.with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    made = made.link(build.DashboardLink("streamlearn").type(dashboard.DashboardLinkType.DASHBOARDS).tags(["streamlearn"]).keep_time(True))
    for number, row in enumerate(board.rows):
        made = made.with_row(build.Row(row.title).id(1000 + number))
        for panel in row.panels:
            links = [_runbook(name, f"{runbook}/{name}.md") for name in alerts.get((board.name, panel.id), [])]
            made = made.with_panel(_panel(panel).links(links) if links else _panel(panel))
    return made


def _runbook(alert: str, url: str) -> build.DashboardLink:
    return build.DashboardLink(f"Runbook: {alert}").type(dashboard.DashboardLinkType.LINK).url(url).target_blank(True)


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    made: stat.Panel | timeseries.Panel = (
        stat.Panel().span(4).height(5).reduce_options(LAST) if panel.stat else timeseries.Panel().span(8).height(8)
    )
    made = made.id(panel.id).title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    if panel.unit == "percentunit":
        made = made.min(0)
    edges = [dashboard.Threshold(value=None, color=GOOD if panel.bad_below is None else BAD)]
    if panel.bad_from is not None:
        edges.append(dashboard.Threshold(value=float(panel.bad_from), color=BAD))
    if panel.bad_below is not None:
        edges.append(dashboard.Threshold(value=float(panel.bad_below), color=GOOD))
    made = made.thresholds(build.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(edges))
    for ref, query in zip("ABCDEF", panel.queries, strict=False):
        made = made.with_target(prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(ref).datasource(SOURCE))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the dashboards.")
    parser.add_argument("--runbook", default=RUNBOOK, help="URL of docs/runbook, for the links  [default: %(default)s]")
    parser.add_argument("--to", type=Path, default=HERE / "dashboards", help="folder  [default: %(default)s]")
    asked = parser.parse_args()
    for name, text in dashboards(asked.runbook):
        (asked.to / name).write_text(text)


if __name__ == "__main__":
    main()
