"""`streamlearn backup` and `streamlearn restore`."""

import json
import logging
import sys
import tempfile
from pathlib import Path

import click

from streamlearn.cli.dataset import open_home
from streamlearn.cli.options import HOME
from streamlearn.cli.roles import Home
from streamlearn.contract import config_file
from streamlearn.contract.config import Config, StoreConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.object_store import FolderStore, ObjectStore
from streamlearn.operate.backup import Running, back_up
from streamlearn.operate.backup_set import Backup, BackupSet
from streamlearn.operate.restore import Outside, config_of, verify
from streamlearn.operate.restore import restore as restore_into
from streamlearn.supervise import exclusive

JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
S3 = "s3://"


def place_of(name: str, like: StoreConfig) -> ObjectStore:
    """A folder, or s3://bucket[/prefix], reached as `[store]` says where that is S3.  Raises ConfigError."""
    if not name.startswith(S3):
        return FolderStore(Path(name).resolve())
    bucket, _, prefix = name.removeprefix(S3).strip("/").partition("/")
    if not bucket:
        raise ConfigError(f"{name}: write s3://bucket/prefix")
    raw = (like.model_dump() if like.kind == "s3" else {}) | {"kind": "s3", "bucket": bucket, "prefix": prefix}
    from streamlearn.adapters.s3_store import S3Store

    return S3Store(config_file.section(StoreConfig, raw, where=name))


@click.command()
@click.option("--to", "place", required=True, metavar="FOLDER|s3://BUCKET/PREFIX", help="Where the backups of this home lie.")
@click.option("--keep", type=click.IntRange(1), help="Afterwards forget all but the newest so many backups, and what only they held.")
@click.option("--copy-shards", is_flag=True, help="Copy the shards too where the store is a bucket; else they are only named.")
@HOME
@JSON
def backup(*, place: str, keep: int | None, copy_shards: bool, home: Path, as_json: bool) -> None:
    """Copy a home, while everything runs, so that it can be restored as it is now.  What the place holds already is not copied again."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s", stream=sys.stderr)
    home = home.resolve()
    adapters, log = open_home(home)
    if not place.startswith(S3) and Path(place).resolve().is_relative_to(home):
        raise ConfigError(f"--to {place}: lies in the home; a backup belongs on another disk")
    store = adapters.config.store
    there = BackupSet(place_of(place, store), place)
    source = Running(home, log, adapters.store(), adapters.catalog(log.log_id), adapters.registry())
    made, done = back_up(source, there, by_name=store.kind == "s3" and not copy_shards)
    forgotten = there.forget(keep) if keep else 0
    if as_json:
        click.echo(json.dumps(described(made) | {"new": done.new, "new_bytes": done.new_bytes, "same": done.same, "forgotten": forgotten}))
        return
    click.echo(f"backup {made.number} in {place}: {told(made)}")
    click.echo(f"{done.new} files copied ({done.new_bytes / 1e6:.1f} MB), {done.same} were there already")
    if made.named:
        click.echo(
            f"{len(made.named)} objects of shards are only named: they stay in {S3}{store.bucket}/{store.prefix} (--copy-shards copies them)"
        )
    if "registry" in made.elsewhere:
        click.echo(f"the snapshots stay in {adapters.config.snapshots.registry}: {len(made.elsewhere['registry'])} tags are written down")
    if forgotten:
        click.echo(f"{forgotten} blobs of older backups forgotten")


@click.command()
@click.option("--from", "place", required=True, metavar="FOLDER|s3://BUCKET/PREFIX", help="What `streamlearn backup --to` was told.")
@click.option("--number", type=click.IntRange(1), help="Of the backup.  [default: the newest]")
@click.option("--force", is_flag=True, help="Put aside what the home holds; in a bucket, delete the state that is there.")
@click.option("--check", is_flag=True, help="Only read the whole backup and hold it against its digests.")
@click.option("--list", "listed", is_flag=True, help="Only say which backups there are.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override one key of the configuration, e.g. store.prefix=again."
)
@HOME
@JSON
def restore(
    *, place: str, number: int | None, force: bool, check: bool, listed: bool, settings: tuple[str, ...], home: Path, as_json: bool
) -> None:
    """Bring a backup back into --home, which must be empty unless --force is given.  Everything must be stopped."""
    from streamlearn.cli.up import overrides_of

    overrides, home = overrides_of(settings), home.resolve()
    there = BackupSet(place_of(place, config_file.load(None, overrides=overrides).store), place)
    if listed:
        for found in (there.read(n) for n in there.numbers()):
            click.echo(json.dumps(described(found)) if as_json else f"{found.number}\t{told(found)}")
        return
    chosen = there.read(number)
    with tempfile.TemporaryDirectory(prefix="streamlearn-restore-") as scratch:
        if check:
            verify(there, chosen, Path(scratch) / "file")
            click.echo(json.dumps(described(chosen)) if as_json else f"backup {chosen.number} is whole: {told(chosen)}")
            return
        config = config_of(chosen, there, home, Path(scratch) / "file")
    config = config_file.load(None, base=config, overrides=overrides)
    with exclusive(home, restoring=True):
        aside = restore_into(there, chosen, home, config, _outside(home, config), force=force)
    if as_json:
        click.echo(json.dumps(described(chosen) | {"aside": str(aside or "")}))
        return
    click.echo(f"{home}: backup {chosen.number} restored: {told(chosen)}")
    if aside:
        click.echo(f"what the home held is in {aside}; delete it once you are sure")
    click.echo(f"`streamlearn dataset verify --home {home}` checks it; the command that ran it goes on from there")


def _outside(home: Path, config: Config) -> Outside:
    adapters = Home(home, config)
    return Outside(adapters.store() if config.store.kind == "s3" else None, adapters.log() if config.log.kind == "kafka" else None)


def described(backup: Backup) -> dict[str, object]:
    shown = ("number", "at", "home", "step", "catalog_version", "positions")
    return {name: getattr(backup, name) for name in shown} | {
        "files": len(backup.entries),
        "bytes": backup.total_bytes,
        "named": len(backup.named),
    }


def told(backup: Backup) -> str:
    step = f"step {backup.step}" if backup.step >= 0 else "no checkpoint yet"
    covered = ", ".join(f"{place} {end}" for place, end in sorted(backup.positions.items())) or "nothing"
    return f"{backup.at}, {step}, catalog version {backup.catalog_version}, covered: {covered}; {len(backup.entries)} files, {backup.total_bytes / 1e6:.1f} MB"
