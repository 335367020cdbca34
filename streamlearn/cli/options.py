"""What several commands ask alike."""

import getpass
import os
from pathlib import Path

import click

HOME = click.option("--home", type=click.Path(path_type=Path), default=Path(".streamlearn"), show_default=True, help="The loop's folder.")


def user() -> str:
    """Who runs this, for records."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"
