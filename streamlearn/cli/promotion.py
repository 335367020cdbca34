"""`streamlearn snapshots`: promote, rollback, pin, unpin, history, retain, sign; beside those of cli/snapshots.py."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from streamlearn.cli.options import HOME, user
from streamlearn.cli.snapshots import ADDRESS, JSON, config_of, open_registry, snapshots
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import Registry
from streamlearn.snapshots import promote as moving
from streamlearn.snapshots.artifact import version
from streamlearn.snapshots.history import CHANNELS, UNTOLD, Move, verdict_of
from streamlearn.snapshots.history import history as history_of
from streamlearn.snapshots.history import unfinished as unfinished_of

__all__ = ["snapshots"]
PASSWORD = "STREAMLEARN_SIGNING_PASSWORD"


BY = click.option("--by", default=user, show_default="your user name", help="Who; kept in the record.")
WHY = click.option("--why", default="", help="Kept in the record.")
CHANNEL = click.option("--channel", type=click.Choice(CHANNELS), default="stable", show_default=True)
FORCE = click.option("--force", is_flag=True, help="Past the gate and a pin; the record says so.")


@snapshots.command()
@click.argument("reference")
@CHANNEL
@FORCE
@click.option("--dry-run", is_flag=True, help="Only say what the gate says.")
@BY
@WHY
@HOME
@ADDRESS
@JSON
def promote(
    *, reference: str, channel: str, force: bool, dry_run: bool, by: str, why: str, home: Path, address: str, as_json: bool
) -> None:
    """Point a channel to a snapshot (a tag or a digest), if the gate lets it pass.  Exit code 1: it does not, and nothing has moved."""
    from streamlearn.probes.bank_book import BankBook
    from streamlearn.probes.gate import PROMOTED, judge

    registry, config = open_registry(home, address), config_of(home)
    names = {bank.name for bank in (*config.probe.banks, *(r.bank for r in BankBook(home).all()))}
    verdict = judge(registry, reference, channel, config.snapshots.gate, banks=names or None)
    said = verdict.to_json()
    done = not dry_run and (force or verdict.outcome == PROMOTED)
    move = None
    if done:
        against, why = verdict.against, why or ("by hand, past the gate" if force and verdict.outcome != PROMOTED else verdict.why)
        move = moving.promote(registry, channel, verdict.digest, by=by, why=why, forced=force, verdict=said, expect=against)
    if as_json:
        click.echo(json.dumps({"verdict": said, "move": asdict(move) if move else None}, indent=2))
    else:
        click.echo(f"the gate: {verdict.outcome}")
        for line in (*verdict.reasons, *map(str, verdict.figures)):
            click.echo(f"  {line}")
        if move:
            click.echo(_said(move))
    if verdict.outcome != PROMOTED and not done:
        click.get_current_context().exit(1)


@snapshots.command()
@CHANNEL
@FORCE
@BY
@WHY
@HOME
@ADDRESS
@JSON
def rollback(*, channel: str, force: bool, by: str, why: str, home: Path, address: str, as_json: bool) -> None:
    """Point a channel back to its holder before; the gate does not promote what it left again."""
    _print(moving.rollback(open_registry(home, address), channel, by=by, why=why, forced=force), as_json)


@snapshots.command()
@CHANNEL
@BY
@WHY
@HOME
@ADDRESS
@JSON
def pin(*, channel: str, by: str, why: str, home: Path, address: str, as_json: bool) -> None:
    """Keep a channel where it is: only --force moves it."""
    _print(moving.pin(open_registry(home, address), channel, by=by, why=why), as_json)


@snapshots.command()
@CHANNEL
@BY
@WHY
@HOME
@ADDRESS
@JSON
def unpin(*, channel: str, by: str, why: str, home: Path, address: str, as_json: bool) -> None:
    """Take the pin back."""
    _print(moving.unpin(open_registry(home, address), channel, by=by, why=why), as_json)


@snapshots.command()
@click.option("--channel", type=click.Choice(CHANNELS), help="Only of this one.")
@click.option("--unfinished", is_flag=True, help="Instead: attempts that never moved their channel.  Reads every version.")
@HOME
@ADDRESS
@JSON
def history(channel: str | None, unfinished: bool, home: Path, address: str, as_json: bool) -> None:
    """Who moved the channels, when, where and why; the newest first.  --json: with the figures of each verdict."""
    registry = open_registry(home, address)
    moves = unfinished_of(registry) if unfinished else history_of(registry, *([channel] if channel else []))
    moves = [move for move in moves if channel in (None, move.channel)]
    if as_json:
        click.echo(json.dumps([_whole(registry, move) for move in moves], indent=2))
        return
    for m in moves:
        click.echo(f"{m.at or '–'}  {_said(m)}{', forced' if m.forced else ''}, by {m.by or '–'}\n    {m.why or '–'}")


@snapshots.command()
@click.option("--keep", type=click.IntRange(1), help="Newest versions to keep.  [default: snapshots.keep]")
@click.option("--keep-moves", type=click.IntRange(1), help="Newest moves of each channel to keep.  [default: snapshots.keep_moves]")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@HOME
@JSON
def retain(keep: int | None, keep_moves: int | None, dry_run: bool, home: Path, as_json: bool) -> None:
    """Let old versions of the loop's own registry go, but none that is tagged, newest of its generation, or may be rolled back to."""
    from streamlearn.probes.promoter import needed
    from streamlearn.snapshots.retain import plan
    from streamlearn.snapshots.retain import retain as let_go

    config = config_of(home).snapshots
    count = keep or config.keep
    if not count:
        raise ConfigError("neither --keep nor snapshots.keep says how many of the newest versions stay")
    wanted: dict[str, Any] = {"keep": count, "keep_moves": keep_moves or config.keep_moves, "also": needed(home)}
    done = (plan if dry_run else let_go)(open_registry(home), **wanted)
    if as_json:
        click.echo(json.dumps(asdict(done) | {"dry_run": dry_run}, indent=2))
        return
    for tag, reason in done.kept.items():
        click.echo(f"keep {tag}  {reason}")
    for tag, digest in done.gone.items():
        click.echo(f"{'would go' if dry_run else 'gone'} {tag}  {digest}")
    if done.gone and not dry_run:
        click.echo("`streamlearn snapshots gc` frees the space, a day from now")


@snapshots.command()
@click.argument("reference")
@click.option("--key", required=True, type=click.Path(path_type=Path), help=f"PEM, elliptic curve; its password: the variable {PASSWORD}.")
@BY
@HOME
@ADDRESS
def sign(reference: str, key: Path, by: str, home: Path, address: str) -> None:
    """Sign a snapshot's files with a private key; the signature lies beside the snapshot in the registry."""
    from streamlearn.snapshots.signing import sign as put_signature

    done = put_signature(open_registry(home, address), reference, key, by=by, password=os.environ.get(PASSWORD, ""))
    click.echo(f"signed {reference}\t{done.digest}")


def _print(move: Move, as_json: bool) -> None:
    click.echo(json.dumps(asdict(move), indent=2) if as_json else _said(move))


def _said(move: Move) -> str:
    return f"{move.channel}: {move.kind} {_name(move.step, move.after)} (before: {move.before[7:19] or 'nothing'})"


def _name(step: int, digest: str) -> str:
    return f"{version(step)} {digest[7:19]}" if step >= 0 else digest[7:19]


def _whole(registry: Registry, move: Move) -> dict[str, Any]:
    return asdict(move) | {"verdict": verdict_of(registry, move) if move.kind != UNTOLD else {}}
