"""`streamlearn report`: write the page."""

from pathlib import Path

import click

from streamlearn.cli.roles import Home
from streamlearn.contract.config_file import from_json
from streamlearn.contract.errors import ConfigError


@click.command()
@click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")
@click.option("--out", type=click.Path(path_type=Path), help="The page.  [default: HOME/report.html]")
def report(home: Path, out: Path | None) -> None:
    """Write one self-contained HTML page with plots."""
    from streamlearn.report import build_report

    path = home / "config.json"
    if not path.exists():
        raise ConfigError(f"{home}: no loop has run here; `streamlearn up --home {home}` starts one")
    config = from_json(path.read_text(), where=str(path))
    click.echo(str(build_report(home, config, Home(home, config).store(), out or home / "report.html")))
