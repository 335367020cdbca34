"""`streamlearn banks`: add, list, verify."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from streamlearn.cli.options import HOME
from streamlearn.contract.config_file import section
from streamlearn.contract.config_probe import BankConfig

JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")


@click.group()
def banks() -> None:
    """Labelled images that snapshots are measured on, registered by digest."""


@banks.command()
@click.argument("name")
@click.option(
    "--train", required=True, help="A folder with one sub-folder a class, a .parquet, a webdataset .tar, or a folder of .tar files."
)
@click.option("--test", default="", help="Likewise; left out: every fifth image of --train.")
@click.option("--image-column", default="jpeg", show_default=True, help="Of a parquet: the encoded bytes.")
@click.option("--label-column", default="label", show_default=True, help="Of a parquet or a shard's .json; lists make it multi-label.")
@click.option("--ignore-column", default="", help="Of a multi-label bank: classes not judged in an image.")
@click.option("--generation", default="", help="Its column in the transfer matrix, such as 2026Q4.")
@click.option("--max-train", default=10_000, show_default=True, help="Images used.")
@click.option("--max-test", default=10_000, show_default=True, help="Images used.")
@HOME
def add(*, home: Path, train: str, test: str, **settings: object) -> None:
    """Register a bank as it is now, under NAME.  The evaluator measures it from its next look on."""
    from streamlearn.probes.bank_book import BankBook

    places = {"train": str(Path(train).resolve()), "test": str(Path(test).resolve()) if test else ""}
    made = BankBook(home).add(section(BankConfig, places | settings, where="banks add"))
    damaged = f", {made.damaged} of them damaged and left out" if made.damaged else ""
    kind = "multi-label, " if made.multi else ""
    click.echo(
        f"{made.bank.name} {made.bank.digest}: {kind}{len(made.classes)} classes, {made.counts['train']} train, {made.counts['test']} test{damaged}"
    )


@banks.command("list")
@HOME
@JSON
def list_(home: Path, as_json: bool) -> None:
    """All registered banks."""
    from streamlearn.probes.bank_book import BankBook

    found = BankBook(home).all()
    if as_json:
        plain = [{"bank": r.bank.model_dump(mode="json"), "classes": r.classes, "multi": r.multi, "counts": r.counts} for r in found]
        click.echo(json.dumps(plain, indent=2))
        return
    table = Table("name", "digest", "classes", "train", "test", "generation", "from")
    for r in found:
        kind = f"{len(r.classes)}{' (multi)' if r.multi else ''}"
        table.add_row(
            r.bank.name, r.bank.digest[7:19], kind, str(r.counts["train"]), str(r.counts["test"]), r.bank.generation, r.bank.train
        )
    Console().print(table)


@banks.command()
@click.argument("names", nargs=-1)
@HOME
def verify(names: tuple[str, ...], home: Path) -> None:
    """Read every image again: exit code 2, and what has changed, unless all is as registered.  NAMES: all, if none is given."""
    from streamlearn.probes.bank_book import BankBook

    book = BankBook(home)
    for name in names or [r.bank.name for r in book.all()]:
        click.echo(f"ok {name} {book.verify(name).bank.digest}")
