"""`streamlearn config`: show, check, presets, schema."""

import json
from pathlib import Path

import click

from streamlearn.contract.config import Config
from streamlearn.contract.config_file import load
from streamlearn.contract.presets import PRESETS, preset


@click.group()
def config() -> None:
    """Show, check and document the configuration."""


_FILE = click.argument("file", required=False, type=click.Path(path_type=Path))


@config.command()
@_FILE
@click.option("--preset", "name", help="On top of this preset, whatever the file names.")
def show(file: Path | None, name: str | None) -> None:
    """The resolved configuration as JSON: the file (or the defaults) with STREAMLEARN__… overrides."""
    click.echo(load(file, overrides={"preset": json.dumps(name)} if name else None).model_dump_json(indent=2))


@config.command()
@click.argument("name", required=False)
def presets(name: str | None) -> None:
    """The recipes by name; with NAME, every number of one and where it is from, as a configuration file would have it."""
    if name:
        click.echo(preset(name, where="streamlearn config presets").toml(), nl=False)
        return
    width = max(map(len, PRESETS))
    for known in PRESETS.values():
        click.echo(f"{known.name:{width}s}  {known.what}")


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
