"""`streamlearn trace`: what became of one image."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from streamlearn.cli.dataset import open_home, printable
from streamlearn.operate.trace import trace as traced


@click.command()
@click.argument("name", metavar="URL|SHA256|TOPIC/PARTITION/OFFSET")
@click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, one line an event.")
def trace(name: str, home: Path, as_json: bool) -> None:
    """What became of one image: where it waits, how each try of it ended, its shard, and the batches that learnt it."""
    adapters, log = open_home(home)
    for event in traced(log, adapters.store(), adapters.catalog(log.log_id), name):
        if as_json:
            click.echo(json.dumps(asdict(event)))
            continue
        more = ", ".join(f"{k} {v}" for k, v in event.more.items())
        click.echo(printable(f"{event.what:14}  {event.where}  {event.at}  {more}".rstrip()))
