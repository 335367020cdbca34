"""`streamlearn dataset`: status, show, generations, query, verify, sweep; what changes it is in dataset_change.py."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ingest import audit, look
from ingest.query import Answer, query, within
from streamlearn.cli.dataset_change import COMMANDS
from streamlearn.cli.options import HOME
from streamlearn.cli.roles import Home
from streamlearn.contract import config_file, durable
from streamlearn.contract.catalog import ShardRow
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.event_log import EventLog
from streamlearn.contract.shards import STORED

JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
DAY = click.DateTime(["%Y-%m-%d"])
SINCE = click.option("--since", type=DAY, help="Only shards of this day (UTC) and later.")
UNTIL = click.option("--until", type=DAY, help="Only shards of this day (UTC) and earlier.")
SHOWN = 100  # rows of a table; more do not help a reader


def open_home(path: Path) -> tuple[Home, EventLog]:
    """The adapters that HOME/config.json chooses.  Raises ConfigError where no loop has run."""
    file = path / "config.json"
    if not file.exists():
        raise ConfigError(f"{path}: no loop has run here; `streamlearn up --home {path}` starts one")
    home = Home(path, config_file.from_json(file.read_text(), where=str(file)))
    if home.config.log.kind == "sqlite" and not (path / "log.sqlite").exists():  # opening it would make a new, empty one
        raise ConfigError(f"{path / 'log.sqlite'}: no event log; the roles have not run yet, or it was moved: put it back")
    return home, home.log()


@click.group()
def dataset() -> None:
    """Look at what was ingested, query it, check it, change it, and sweep what a crash left."""


for command in COMMANDS:
    dataset.add_command(command)


@dataset.command()
@HOME
@SINCE
@JSON
def status(home: Path, since: Any, as_json: bool) -> None:
    """The dataset in numbers.  Outcomes and sources: since --since, by default of its last seven days."""
    adapters, log = open_home(home)
    catalog = adapters.catalog(log.log_id)
    rows = catalog.rows()
    found = look.overview(adapters.store(), rows, audit.progress(log, catalog, rows), _day(since))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    _print_status(found)


@dataset.command()
@click.argument("name", metavar="KEY|SAMPLE")
@HOME
@JSON
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the sample's bytes, as fetched, to this file.")
def show(name: str, home: Path, as_json: bool, out: Path | None) -> None:
    """A shard by its key; or a sample by topic/partition/offset, sha256 or URL, newest first, and where it lies."""
    adapters, log = open_home(home)
    store, catalog = adapters.store(), adapters.catalog(log.log_id)
    if name.startswith(audit.PREFIX):
        if out:
            raise click.UsageError("--out extracts a sample; name one by topic/partition/offset, sha256 or URL")
        row = look.find_shard(catalog.history(), name)
        _print_fields(row.__dict__ | ({"outcomes": _outcomes(adapters, row)} if row.status == "live" else {}), as_json)
        return
    samples = look.find_samples(store, catalog.rows(), name)
    if out:
        stored = next((s for s in samples if s.outcome["outcome"] == STORED), samples[0])
        durable.write(out, look.image_of(store, stored))
        click.echo(f"{out}: {stored.outcome['member_size']} bytes of {stored.name}", err=True)
    if as_json:
        click.echo(json.dumps([{"name": s.name, **s.outcome} for s in samples], indent=2))
        return
    for sample in samples:
        _print_fields({"name": sample.name, **sample.outcome}, as_json=False)


@dataset.command()
@HOME
@JSON
def generations(home: Path, as_json: bool) -> None:
    """Named generations: the catalog version that made each, its live shards and their samples."""
    adapters, log = open_home(home)
    found = look.generations(adapters.catalog(log.log_id).history())
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    columns = ("generation", "version", "shards", "samples")
    _print_table(columns, ([g[c] for c in columns] for g in found))


@dataset.command("query")
@click.argument("sql")
@HOME
@SINCE
@UNTIL
@JSON
@click.option("--csv", "as_csv", is_flag=True, help="All rows as CSV.")
def query_(sql: str, home: Path, since: Any, until: Any, as_json: bool, as_csv: bool) -> None:
    """DuckDB over `shards` (the live shards) and `outcomes` (a row for every offset; "offset" needs its quotes)."""
    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both")
    adapters, log = open_home(home)
    rows = within(adapters.catalog(log.log_id).rows(), _day(since), _day(until))
    with query(adapters.store(), rows, sql) as answer:
        if as_json:
            _print_json(answer)
        elif as_csv:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(answer.columns)
            writer.writerows(answer)
        else:
            _print_table(answer.columns, iter(answer))


@dataset.command()
@HOME
@click.option("--deep", is_flag=True, help="Read every byte of every shard.")
@click.option("--sample", type=click.IntRange(min=0), default=8, show_default=True, help="Shards to read whole, at random, unless --deep.")
@JSON
def verify(home: Path, deep: bool, sample: int, as_json: bool) -> None:
    """Check catalog, log and objects against each other.  Exit code 1 when something is wrong."""
    adapters, log = open_home(home)
    report = audit.verify(log, adapters.store(), adapters.catalog(log.log_id), deep=deep, sample=sample)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print_report(report)
    if not report.good:
        sys.exit(1)


@dataset.command()
@HOME
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--older-than", "hours", type=click.FloatRange(min=1), default=24.0, show_default=True, metavar="HOURS")
def sweep(home: Path, dry_run: bool, hours: float) -> None:
    """Delete the objects under shards/ that no row of the catalog names: what a killed fetcher left."""
    adapters, log = open_home(home)
    swept = audit.sweep(adapters.store(), adapters.catalog(log.log_id), older_than_s=hours * 3600, dry_run=dry_run)
    for orphan in swept.deleted:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {orphan.key} ({orphan.age_s / 3600:.1f} h old)")
    click.echo(f"{len(swept.deleted)} {'to be deleted' if dry_run else 'deleted'}, {len(swept.young)} younger than {hours:g} h let be")


def _day(value: Any) -> str:
    return value.date().isoformat() if value else ""


def _outcomes(adapters: Home, row: ShardRow) -> dict[str, int]:
    sql = (
        "SELECT outcome || CASE WHEN outcome = 'rejected' THEN ':' || reason ELSE '' END, count(*) FROM outcomes GROUP BY 1 ORDER BY 2 DESC"
    )
    with query(adapters.store(), [row], sql) as answer:
        return {str(outcome): int(count) for outcome, count in answer}


def printable(value: object) -> str:
    """For a terminal.  URLs and headers are a stranger's: no control sequence of theirs may reach it."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _print_fields(fields: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(fields, indent=2))
        return
    for name, value in fields.items():
        if value not in ("", {}):
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
            click.echo(f"{name:>17}  {printable(text)}")
    click.echo()


def _print_table(columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    table = Table(*(escape(printable(column)) for column in columns))
    for row in islice(rows, SHOWN):
        table.add_row(*(Text("–" if value is None else printable(value)) for value in row))  # a str would be read as markup
    Console().print(table)
    if next(rows, None) is not None:
        click.echo(f"the first {SHOWN} rows; --csv and --json give all", err=True)


def _print_json(answer: Answer) -> None:
    """An array, a row at a time: it may be longer than memory."""
    comma = "["
    for row in answer:
        click.echo(f"{comma}\n  {json.dumps(dict(zip(answer.columns, row, strict=True)), default=str, ensure_ascii=False)}", nl=False)
        comma = ","
    click.echo("[]" if comma == "[" else "\n]")


def _print_status(found: Mapping[str, Any]) -> None:
    age = found["freshness_s"]
    _print_fields(
        {
            "shards": found["shards"],
            "samples": found["samples"],
            "MB": f"{found['bytes'] / 1e6:.1f}",
            "days": f"{found['window_days']} ({' to '.join(found['days'])})" if found["days"] else "none yet",
            "oldest": found["oldest"],
            "newest": f"{found['newest']} ({age:.0f} s ago)" if age is not None else "",
            "since": found["since"],
            "outcomes": found["outcomes"],
            "rejected": found["rejected"],
            "sources": found["sources"],
        },
        as_json=False,
    )
    columns = ("topic", "partition", "position", "lag", "owed", "shards", "samples")
    _print_table(columns, ([p[c] for c in columns] for p in found["partitions"]))


def _print_report(report: audit.Report) -> None:
    for finding in report.findings:
        click.echo(printable(f"WRONG {finding.kind} {finding.where}: {finding.what}; {finding.remedy}"))
    for partition in report.partitions:
        for what, amount in (("records wait to be fetched", partition.lag), ("offsets may owe retries", partition.owed)):
            if amount:
                click.echo(f"note  {partition.topic}/{partition.partition}: {amount} {what}; the fetcher sees to it")
    young = sum(orphan.age_s < audit.OLD_S for orphan in report.orphans)
    if young:
        click.echo(f"note  {young} objects that no row names yet; normal while a unit is sealed, swept after a day")
    word = "ok" if report.good else "WRONG"
    read = f"{report.read} read whole ({report.bytes_read / 1e6:.1f} MB)"
    click.echo(f"{word}    {report.shards} shards, {read}, {len(report.partitions)} partitions, {len(report.findings)} findings")
