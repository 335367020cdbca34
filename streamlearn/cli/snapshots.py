"""`streamlearn snapshots`: list, show, tags, verify, pull, copy, export, gc.  Those that move channels: cli/promotion.py."""

import json
import logging
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from streamlearn.cli.options import HOME
from streamlearn.cli.roles import Home
from streamlearn.contract import config_file
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.contract.registry_gc import collect
from streamlearn.snapshots import pull as reading
from streamlearn.snapshots.copy import copy as copy_snapshot

FORMATS = ("timm", "vissl", "pycls", "onnx", "torch-export")  # snapshots/export.py; here so that `--help` does not wait for torch
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")


KEY = click.option("--public-key", type=click.Path(path_type=Path), help="PEM; refuse what no signature of this key covers.")
ADDRESS = click.option("--registry", "address", default="", help="oci://host/repository.  [default: the loop's own]")


def config_of(home: Path, address: str = "") -> Config:
    """The loop's, if there is one, with the environment's overrides and another registry."""
    path = home / "config.json"
    base = config_file.from_json(path.read_text(), where=str(path)) if path.exists() else None
    return config_file.load(None, base=base, overrides={"snapshots.registry": json.dumps(address)} if address else {})


def open_registry(home: Path, address: str = "") -> Registry:
    config = config_of(home, address)
    if not config.snapshots.registry and not (home / "registry" / "oci-layout").exists():
        raise ConfigError(f"{home / 'registry'}: no snapshots yet; `streamlearn up --home {home}` makes them")
    return Home(home, config).registry()


@click.group()
def snapshots() -> None:
    """List, pull, verify, sign, copy, export, promote and roll back published models."""


@snapshots.command("list")
@HOME
@ADDRESS
@JSON
def list_(home: Path, address: str, as_json: bool) -> None:
    """All snapshots, oldest first, with what was measured of them."""
    rows = reading.list_snapshots(open_registry(home, address))
    if as_json:
        click.echo(json.dumps([row.__dict__ for row in rows], indent=2))
        return
    whole = (Column("tags", no_wrap=True), Column("digest", no_wrap=True))  # they are typed again: never cut
    table = Table("step", *whole, "MB", "bank", "k-NN", "random", "raw pixels", "ridge", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        head = [str(row.step), "\n".join(row.tags), row.digest[7:19], f"{row.bytes / 1e6:.1f}"]
        for result in row.results or ({},):
            cells = [f"{result[k]:.3f}" if k in result else "–" for k in ("knn", "random_knn", "raw_knn", "ridge")]
            table.add_row(*head, str(result.get("bank", "–")), *cells)
    Console().print(table)


@snapshots.command()
@click.argument("reference")
@HOME
@ADDRESS
def show(reference: str, home: Path, address: str) -> None:
    """One snapshot: files, lineage, metrics, results.  REFERENCE: a tag or a digest."""
    click.echo(json.dumps(reading.show(open_registry(home, address), reference), indent=2))


@snapshots.command()
@click.argument("reference")
@KEY
@click.option("--bundle", type=click.Path(path_type=Path), help="Write the signature that holds to this file, for `model_signing verify`.")
@HOME
@ADDRESS
def verify(reference: str, public_key: Path | None, bundle: Path | None, home: Path, address: str) -> None:
    """Read every byte of a snapshot and check it; with --public-key its signature too."""
    if bundle and not public_key:
        raise ConfigError("--bundle needs --public-key: it writes the signature that this key has made")
    registry = open_registry(home, address)
    for line in reading.verify(registry, reference):
        click.echo(f"ok {line}")
    if public_key:
        from streamlearn.snapshots import signing

        signature = signing.verify(registry, reference, public_key)
        click.echo(f"ok signed with the key of {public_key}")
        if bundle:
            bundle.write_bytes(signature)


@snapshots.command()
@click.argument("reference")
@click.argument("folder", type=click.Path(path_type=Path))
@KEY
@HOME
@ADDRESS
def pull(reference: str, folder: Path, public_key: Path | None, home: Path, address: str) -> None:
    """Copy a snapshot to a new FOLDER, verified."""
    registry = open_registry(home, address)
    if public_key:
        from streamlearn.snapshots import signing

        paths = reading.pull(registry, reference, folder, signing.checked(registry, reference, public_key))
    else:
        paths = reading.pull(registry, reference, folder)
    for path in paths:
        click.echo(str(path))


@snapshots.command()
@click.argument("reference")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--to", required=True, type=click.Choice(FORMATS), help="Who is to read it.")
@click.option("--force", is_flag=True, help="Replace FOLDER, if all it holds is an export.")
@click.option(
    "--classes", type=click.IntRange(1), default=1000, show_default=True, help="Of pycls's classifier, which is written as zeros."
)
@HOME
@ADDRESS
def export(reference: str, folder: Path | None, *, to: str, force: bool, classes: int, home: Path, address: str) -> None:
    """Write a snapshot for another framework to a new FOLDER.  [default: NAME-VERSION-TO, here]"""
    from streamlearn.snapshots.export import export as write

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of operators of torchvision, which no trunk has
    folder, loading = write(open_registry(home, address), reference, folder, to, force=force, classes=classes)
    for path in sorted(folder.iterdir()):
        click.echo(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    click.echo(f"\nnext, in Python:\n\n{loading}")


@snapshots.command()
@HOME
@ADDRESS
def tags(home: Path, address: str) -> None:
    """All tags, and the digest that each points to."""
    for name, known in sorted(open_registry(home, address).tags().items()):
        click.echo(f"{name}\t{known.digest}")


@snapshots.command()
@click.argument("reference")
@click.argument("target")
@click.option("--as", "tag", default="", help="The tag there.  [default: REFERENCE]")
@HOME
@ADDRESS
def copy(reference: str, target: str, tag: str, home: Path, address: str) -> None:
    """Copy a snapshot and all that refers to it to TARGET: oci://host/repository, or a folder, which becomes an OCI layout."""
    if not tag and reference.startswith("sha256:"):
        raise ConfigError("a snapshot that is named by its digest needs a tag there: --as TAG")
    source = open_registry(home, address)
    if target.startswith("oci://"):
        there = Home(home, config_of(home, target)).registry()
    else:
        there = OciLayout(Path(target))
    known = copy_snapshot(source, there, reference, tag or reference, told=lambda digest: click.echo(f"sent {digest}"))
    click.echo(f"{tag or reference}\t{known.digest}")


@snapshots.command()
@click.option("--grace-hours", default=24.0, show_default=True, type=click.FloatRange(min=0), help="Younger content is kept.")
@HOME
def gc(grace_hours: float, home: Path) -> None:
    """Drop what no tag leads to from the loop's own registry: no snapshot with a tag, and nothing that refers to one."""
    registry = open_registry(home)
    if not isinstance(registry, OciLayout):
        raise ConfigError("a registry behind a network collects its own garbage; see its documentation")
    done = collect(registry, grace_s=grace_hours * 3600)
    click.echo(f"dropped {done.manifests} manifests, {done.files} files, {done.bytes / 1e6:.1f} MB")
