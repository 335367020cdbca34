"""The commands of `streamlearn dataset` that change what is stored.  Each may be killed and run again (docs/dataset-life.md)."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import click

from streamlearn.cli.options import HOME, user
from streamlearn.cli.roles import Home
from streamlearn.contract import config_file
from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.event_log import TAKEDOWNS, EventLog
from streamlearn.contract.object_store import ObjectStore

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Open:
    """A home with its seams open."""

    config: Config
    log: EventLog
    store: ObjectStore
    catalog: DeltaCatalog
    rewriting: Path  # where shards are written before they are put


def opened(folder: Path) -> Open:
    """Raises ConfigError where no loop has run."""
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder}: no loop has run here; `streamlearn up --home {folder}` starts one")
    config = config_file.from_json(path.read_text(), where=str(path))
    home = Home(folder.resolve(), config)
    log = home.log()
    return Open(config, log, home.store(), home.catalog(log.log_id), home.path / "rewriting")


def options(command: F) -> F:
    """--home, --dry-run and --json, which all of them have."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Machine-readable."),
        click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing."),
        HOME,
    ):
        command = option(command)
    return command


def say(what: str, found: dict[str, Any], *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found | {"dry_run": dry_run}, indent=2))
        return
    told = ", ".join(f"{value} {name}" for name, value in found.items())
    click.echo(f"{what}{' (dry run: nothing is changed)' if dry_run else ''}: {told}")


@click.command()
@click.option("--url", help="Exactly this address.")
@click.option("--host", help="A host with all its subdomains.")
@click.option("--sha256", help="An image by the digest of its bytes, in hex.")
@click.option("--reason", default="", help="Kept in the record, for audits.")
@click.option("--by", default=user, show_default="your user name", help="Who asks; kept in the record.")
@click.option("--again", is_flag=True, help="Apply every takedown there ever was once more.")
@options
def takedown(
    url: str | None, host: str | None, sha256: str | None, *, reason: str, by: str, again: bool, home: Path, dry_run: bool, as_json: bool
) -> None:
    """Deny and remove what a url, host or sha256 names.  Without one: what is denied but not removed yet."""
    from ingest import takedown as taking

    at = opened(home)
    at.log.ensure_topic(TAKEDOWNS, at.config.log.partitions)
    selectors = {"url": url, "host": host, "sha256": sha256}
    try:
        done = taking.takedown(
            at.log, at.store, at.catalog, folder=at.rewriting, reason=reason, by=by, again=again, dry_run=dry_run, **selectors
        )
    except ValueError as e:
        raise ConfigError(str(e)) from e
    say("taken down", asdict(done), dry_run=dry_run, as_json=as_json)


@click.command()
@options
def compact(home: Path, dry_run: bool, as_json: bool) -> None:
    """Merge small neighbouring shards, up to shard.max_bytes."""
    from ingest import compact as merging

    at = opened(home)
    done = merging.compact(at.store, at.catalog, folder=at.rewriting, max_bytes=at.config.shard.max_bytes, dry_run=dry_run)
    say("compacted", asdict(done), dry_run=dry_run, as_json=as_json)


@click.command()
@click.option("--window-days", type=float, help="Instead of dataset.window_days.")
@options
def expire(window_days: float | None, home: Path, dry_run: bool, as_json: bool) -> None:
    """End what was fetched before the window; `purge` deletes it."""
    from ingest import expire as ending

    at = opened(home)
    window = timedelta(days=at.config.dataset.window_days if window_days is None else window_days)
    say(
        "expired", asdict(ending.expire(at.catalog, window=window, at=datetime.now(UTC), dry_run=dry_run)), dry_run=dry_run, as_json=as_json
    )


@click.command()
@click.option("--grace-days", type=float, help="Instead of dataset.grace_days.")
@options
def purge(grace_days: float | None, home: Path, dry_run: bool, as_json: bool) -> None:
    """Delete the objects of shards that ended before the grace time."""
    from ingest import expire as ending

    at = opened(home)
    grace = timedelta(days=at.config.dataset.grace_days if grace_days is None else grace_days)
    done = ending.purge(at.store, at.catalog, grace=grace, at=datetime.now(UTC), dry_run=dry_run)
    say("purged", asdict(done), dry_run=dry_run, as_json=as_json)


@click.command()
@click.option("--name", help="Of the generation; default: the quarter, such as 2026Q4.")
@options
def cut(name: str | None, home: Path, dry_run: bool, as_json: bool) -> None:
    """Name the dataset as it is now: a generation."""
    from ingest import refresh as generations

    at, today = opened(home), datetime.now(UTC)
    made = generations.cut(at.store, at.catalog, name=checked(name or f"{today.year}Q{(today.month + 2) // 3}"), dry_run=dry_run)
    say("cut", asdict(made), dry_run=dry_run, as_json=as_json)


@click.command()
@click.option("--name", required=True, help="The generation, as cut.")
@click.option("--rate", type=float, help="Candidates a second, instead of dataset.refresh_rate; 0: no limit.")
@options
def refresh(name: str, rate: float | None, home: Path, dry_run: bool, as_json: bool) -> None:
    """Ask again for every image of a generation; goes on where it was stopped."""
    from ingest import refresh as generations

    at = opened(home)
    rate = at.config.dataset.refresh_rate if rate is None else rate
    done = generations.refresh(at.log, at.store, at.catalog, name=checked(name), rate=rate, dry_run=dry_run)
    say("re-queued", asdict(done), dry_run=dry_run, as_json=as_json)


def checked(name: str) -> str:
    """Raises ConfigError for what is no plain name."""
    if not name.replace("-", "").replace(".", "").isalnum() or not name.isascii() or name.startswith("."):
        raise ConfigError(f"--name {name!r}: letters, digits, '-' and '.', such as 2026Q4")
    return name


COMMANDS = [takedown, compact, expire, purge, cut, refresh]
