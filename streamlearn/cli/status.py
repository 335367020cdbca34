"""`streamlearn status`: what the loop is doing, once."""

import json
import time
from pathlib import Path

import click
from rich.console import Console

from streamlearn import view
from streamlearn.contract.errors import ConfigError


@click.command()
@click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def status(home: Path, as_json: bool) -> None:
    """What the loop is doing, once.  Works while it runs and after it has stopped."""
    if not (home / "config.json").exists():
        raise ConfigError(f"{home}: no loop has run here; `streamlearn up --home {home}` starts one")
    found = view.overview(home.resolve())
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        started = (home / "config.json").stat().st_mtime
        Console().print(view.panel(found, time.time() - started))
