"""The `streamlearn` command.  Groups are imported when they are called, so `streamlearn status` does not wait for torch."""

import importlib
import sys

import click

from streamlearn.contract.errors import ConfigError, StreamlearnError

COMMANDS = {  # name -> (module, attribute, one line of help)
    "up": ("streamlearn.cli.up", "up", "Run the whole loop on this machine."),
    "status": ("streamlearn.cli.status", "status", "What the loop is doing, once."),
    "report": ("streamlearn.cli.report", "report", "Write the report page."),
    "snapshots": (
        "streamlearn.cli.promotion",
        "snapshots",
        "Published models: list, pull, verify, sign, copy, export, promote, roll back …",
    ),
    "serve": ("streamlearn.cli.serve", "serve", "Let others pull snapshots: OCI registry, Hugging Face Hub, a page."),
    "train": ("streamlearn.cli.train", "train", "Order a learning rate, and branch off release candidates: lr, anneal."),
    "probe": ("streamlearn.cli.probe", "probe", "Measure and compare snapshots: run, finetune, compare, matrix, drift."),
    "banks": ("streamlearn.cli.banks", "banks", "Register labelled banks by digest: add, list, verify."),
    "connectors": ("streamlearn.cli.connectors", "connectors", "List, validate, plan, start, pause and delete sources."),
    "dataset": ("streamlearn.cli.dataset", "dataset", "Look at what was ingested, and change it: query, show, verify, takedown, compact …"),
    "doctor": ("streamlearn.cli.doctor", "doctor", "Look for what is wrong, and say what to do about it."),
    "trace": ("streamlearn.cli.trace", "trace", "What became of one image, from the log to the weights."),
    "drain": ("streamlearn.cli.drain", "drain", "Stop intake, let everything be learnt, and end."),
    "backup": ("streamlearn.cli.backup", "backup", "Copy a home while everything runs."),
    "restore": ("streamlearn.cli.backup", "restore", "Bring a backup back."),
    "config": ("streamlearn.cli.config", "config", "Show, check and document the configuration."),
    "health": ("streamlearn.cli.healthcheck", "health", "Whether the roles of a home are healthy: an exit code, for containers."),
    "role": ("streamlearn.cli.roles", "role", "Run one role in this process (what `up` starts)."),
}


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="streamlearn")
def cli() -> None:
    """A continual, online, self-supervised learner over streaming, uncurated images."""


def main() -> None:
    """Bad input is the user's to mend: one clear message, exit code 2.  A bug keeps its traceback."""
    try:
        cli(standalone_mode=True)
    except ConfigError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(2)
    except StreamlearnError as e:
        click.echo(f"error: {type(e).__name__}: {e}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
