"""What a panel is, as the four dashboards beside this file write it down.  generate.py turns it into Grafana's JSON."""

from dataclasses import dataclass

RATE = "[$__rate_interval]"
GOOD, BAD = "green", "red"


@dataclass(frozen=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """`id` stays what it is: alerts point at it.  `bad_from`: from this value on it is red; `bad_below`: below it."""

    id: int
    title: str
    description: str
    unit: str  # Grafana's: s, bytes, percentunit, short, ops ...
    queries: tuple[Query, ...]
    stat: bool = False
    bad_from: float | None = None
    bad_below: float | None = None


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    name: str  # its uid is streamlearn-<name>
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def panel(id: int, title: str, unit: str, description: str, *queries: tuple[str, str], **more: bool | float) -> Panel:
    return Panel(id, title, description, unit, tuple(Query(*query) for query in queries), **more)  # type: ignore[arg-type]


def per(name: str, by: str, selector: str = "") -> str:
    """Rate of a counter, summed over the rest."""
    return f"sum by ({by}) (rate({name}{selector}{RATE}))"


def quantile(q: float, name: str, by: str = "") -> str:
    """Of a histogram."""
    return f"histogram_quantile({q}, sum by (le{', ' + by if by else ''}) (rate({name}_bucket{RATE})))"
