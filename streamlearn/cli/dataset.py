"""`streamlearn dataset`: what is stored, and what becomes of it."""

import click

from streamlearn.cli.dataset_change import COMMANDS


@click.group()
def dataset() -> None:
    """Take down, compact, expire, purge, cut and refresh what is stored."""


for command in COMMANDS:
    dataset.add_command(command)
