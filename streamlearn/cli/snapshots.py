"""`streamlearn snapshots`: list, show, verify, pull, export."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import OciLayout
from streamlearn.snapshots import pull as reading

HOME = click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")
FORMATS = ("timm", "vissl", "pycls", "onnx", "torch-export")  # snapshots/export.py; here so that `--help` does not wait for torch
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")


def open_registry(home: Path) -> OciLayout:
    if not (home / "registry" / "oci-layout").exists():
        raise ConfigError(f"{home / 'registry'}: no snapshots yet; `streamlearn up --home {home}` makes them")
    return OciLayout(home / "registry")


@click.group()
def snapshots() -> None:
    """List, show, pull, verify and export published models."""


@snapshots.command("list")
@HOME
@JSON
def list_(home: Path, as_json: bool) -> None:
    """All snapshots, oldest first, with what was measured of them."""
    rows = reading.list_snapshots(open_registry(home))
    if as_json:
        click.echo(json.dumps([row.__dict__ for row in rows], indent=2))
        return
    table = Table("step", "tags", "digest", "MB", "bank", "k-NN", "random", "raw pixels", "ridge")
    for row in rows:
        head = [str(row.step), " ".join(row.tags), row.digest[7:19], f"{row.bytes / 1e6:.1f}"]
        for result in row.results or ({},):
            cells = [f"{result[k]:.3f}" if k in result else "–" for k in ("knn", "random_knn", "raw_knn", "ridge")]
            table.add_row(*head, str(result.get("bank", "–")), *cells)
    Console().print(table)


@snapshots.command()
@click.argument("reference")
@HOME
def show(reference: str, home: Path) -> None:
    """One snapshot: files, lineage, metrics, results.  REFERENCE: a tag or a digest."""
    click.echo(json.dumps(reading.show(open_registry(home), reference), indent=2))


@snapshots.command()
@click.argument("reference")
@HOME
def verify(reference: str, home: Path) -> None:
    """Read every byte of a snapshot and check it."""
    for line in reading.verify(open_registry(home), reference):
        click.echo(f"ok {line}")


@snapshots.command()
@click.argument("reference")
@click.argument("folder", type=click.Path(path_type=Path))
@HOME
def pull(reference: str, folder: Path, home: Path) -> None:
    """Copy a snapshot to a new FOLDER, verified."""
    for path in reading.pull(open_registry(home), reference, folder):
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
def export(reference: str, folder: Path | None, to: str, force: bool, classes: int, home: Path) -> None:
    """Write a snapshot for another framework to a new FOLDER.  [default: NAME-VERSION-TO, here]"""
    from streamlearn.snapshots.export import export as write

    folder, loading = write(open_registry(home), reference, folder, to, force=force, classes=classes)
    for path in sorted(folder.iterdir()):
        click.echo(f"{path}  ({path.stat().st_size / 1e6:.1f} MB)")
    click.echo(f"\nnext, in Python:\n\n{loading}")
