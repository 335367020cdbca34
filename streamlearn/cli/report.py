"""`streamlearn report`: write the page."""

from pathlib import Path

import click

from streamlearn.cli.roles import Home
from streamlearn.contract.config_file import from_json
from streamlearn.contract.errors import ConfigError, Retryable

CHANNELS = ("candidate", "stable", "best")


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
    adapters = Home(home, config)
    click.echo(str(build_report(home, config, adapters.store(), out or home / "report.html", _channels(adapters))))


def _channels(adapters: Home) -> dict[str, str]:
    """Channel -> digest; none where no snapshot is published yet, or the registry is out of reach: the page lacks marks, no more."""
    if not adapters.config.snapshots.registry and not (adapters.path / "registry" / "oci-layout").exists():
        return {}
    try:
        registry = adapters.registry()
        return {name: held.digest for name in CHANNELS if (held := registry.find(name))}
    except Retryable as e:
        click.echo(f"channels are not marked: {e}", err=True)
        return {}
