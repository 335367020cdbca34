"""`streamlearn config`: show, check, schema."""

import json
from pathlib import Path

import click

from streamlearn.contract.config import Config
from streamlearn.contract.config_file import load


@click.group()
def config() -> None:
    """Show, check and document the configuration."""


_FILE = click.argument("file", required=False, type=click.Path(path_type=Path))


@config.command()
@_FILE
def show(file: Path | None) -> None:
    """The resolved configuration as JSON: the file (or the defaults) with STREAMLEARN__… overrides."""
    click.echo(load(file).model_dump_json(indent=2))


@config.command()
@_FILE
def check(file: Path | None) -> None:
    """Exit 0 if the configuration is good; else say which key, value and remedy, and exit 2."""
    resolved = load(file)
    click.echo(f"{file or 'defaults'}: good (digest {resolved.digest[:12]})")


@config.command()
def schema() -> None:
    """The JSON schema of the configuration file."""
    click.echo(json.dumps(Config.model_json_schema(), indent=2))
