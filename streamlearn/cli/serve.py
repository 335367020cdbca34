"""`streamlearn serve`: let others pull this home's snapshots."""

import json
from pathlib import Path

import click

from streamlearn.cli.roles import in_this_process
from streamlearn.contract import config_file
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError


@click.command()
@click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="A TOML file.  [default: HOME/config.json, if there is one]")
@click.option("--address", help="To listen on.  [default: serve.address]")
@click.option("--port", type=click.IntRange(0, 65535), help="0: any free one.  [default: serve.port]")
@click.option(
    "--tokens", type=click.Path(path_type=Path), help="A file with a name and its token on each line.  [default: serve.tokens_file]"
)
@click.option("--public", is_flag=True, help="Anybody who reaches it may pull.")
def serve(*, home: Path, file: Path | None, address: str | None, port: int | None, tokens: Path | None, public: bool) -> None:
    """Serve the snapshots of a home, read-only: OCI registry, Hugging Face Hub and a page, until Ctrl-C."""
    said = {"address": address, "port": port, "tokens_file": str(tokens.resolve()) if tokens else None, "public": public or None}
    overrides = {f"serve.{key}": json.dumps(value) for key, value in said.items() if value is not None}
    home = home.resolve()
    in_this_process("serve", home, lambda: resolve(home, file, overrides))


def resolve(home: Path, file: Path | None, overrides: dict[str, str]) -> Config:
    """The file's or the home's configuration, if it has one, with the environment's overrides and the command's."""
    kept = home / "config.json"
    if file is None and not kept.exists() and not (home / "registry" / "oci-layout").exists():
        raise ConfigError(f"{home / 'registry'}: no snapshots yet; `streamlearn up --home {home}` makes them")
    base = config_file.from_json(kept.read_text(), where=str(kept)) if file is None and kept.exists() else None
    config = config_file.load(file, base=base, overrides=overrides)
    return config.model_copy(update={"home": str(home), "serve": config.serve.beside(file.parent if file else Path())})
