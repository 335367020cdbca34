"""`streamlearn train`: lr, anneal."""

import json
import logging
import signal
import socket
import sys
import threading
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from streamlearn.cli.options import HOME, user
from streamlearn.cli.roles import Home
from streamlearn.contract import config_file
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.orders import Order, orders, send
from streamlearn.contract.status import read_status
from streamlearn.supervise import exclusive

NAME_LIMIT = 63  # of train.name


@click.group()
def train() -> None:
    """Tell a learner what rate to learn at, and branch release candidates off it."""


def _config(home: Path) -> Config:
    path = home / "config.json"
    if not path.exists():
        raise ConfigError(f"{path}: no such file; `streamlearn up --home {home}` makes it")
    return config_file.load(None, base=config_file.from_json(path.read_text(), where=str(path)))


@train.command()
@click.option("--halve", is_flag=True, help="Half of the rate, from the next step on.")
@click.option("--set", "value", type=float, metavar="RATE", help="This rate after warm-up, from the next step on.")
@click.option("--hold", is_flag=True, help="No plateau halves the rate from now on.")
@click.option("--release", is_flag=True, help="The end of --hold.")
@click.option("--reason", default="", help="For the record.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@HOME
def lr(*, halve: bool, value: float | None, hold: bool, release: bool, reason: str, as_json: bool, home: Path) -> None:
    """Order a change of the learning rate, or, without an option, show the rate and all orders.

    An order waits in the store until a learner takes it, at a step that is recorded with it; it is taken once, whatever is killed.
    """
    asked = [name for name, given in (("halve", halve), ("set", value is not None), ("hold", hold), ("release", release)) if given]
    if len(asked) > 1:
        raise ConfigError(f"--{' and --'.join(asked)}: one order at a time; they are taken in the order they are given")
    store = Home(home, _config(home)).store()
    if asked:
        number = send(store, Order(asked[0], value, by=f"{user()}@{socket.gethostname()}", reason=reason))
        click.echo(f"order {number}: the learner takes it before one of its next steps; `streamlearn train lr --home {home}` says when")
        return
    said = read_status(home).get("train", {})
    shown = {name: said.get(name) for name in ("lr", "halvings", "lr_held", "plateau_waits", "step")}
    listed = orders(store)
    if as_json:
        rows = [{"number": n, "order": order and order.__dict__, "in_force_from": step} for n, order, step in listed]
        click.echo(json.dumps(shown | {"orders": rows}, indent=2))
        return
    held, waits = ", held" if shown["lr_held"] else "", f", flat, but waits for: {shown['plateau_waits']}" if shown["plateau_waits"] else ""
    if shown["step"] is None:
        click.echo("no learner has said anything here yet")
    else:
        click.echo(f"learning rate {shown['lr']} at step {shown['step']}, {shown['halvings']} halvings{held}{waits}")
    table = Table("order", "what", "rate", "by", "at", "reason", "in force from step")
    for n, order, step in listed:
        cells = (
            [order.action, f"{order.value:g}" if order.value else "", order.by, order.at, order.reason]
            if order
            else ["unreadable"] + [""] * 4
        )
        table.add_row(str(n), *cells, "waits" if step is None else str(step))
    if listed:
        Console().print(table)


@train.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--share", type=click.FloatRange(0, 1, min_open=True), default=0.1, show_default=True, help="Of the trunk's steps; 0.05 to 0.1."
)
@click.option("--steps", type=click.IntRange(1), help="So many instead.")
@click.option("--name", default="", help="Of the model.  [default: the trunk's, and -anneal]")
@click.option("--device", default="", help="As torch names it.  [default: the trunk's]")
@HOME
def anneal(*, folder: Path, share: float, steps: int | None, name: str, device: str, home: Path) -> None:
    """Branch a release candidate off the newest checkpoint of --home: its rate falls linearly to zero, and it is published in FOLDER.

    The trunk may learn on meanwhile; nothing of it is written to.  The same command goes on where it was.
    """
    from streamlearn.cli.learner import anneal_role

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s: %(message)s", stream=sys.stderr)
    config = _config(home)
    if folder.resolve() == home.resolve():
        raise ConfigError(f"{folder}: that is the trunk; name another folder")
    if device:
        config = config.model_copy(update={"train": config.train.model_copy(update={"device": device})})
    called = name or f"{config.train.name[: NAME_LIMIT - 7]}-anneal"
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with exclusive(folder.resolve()):
        found = anneal_role(config, home.resolve(), folder.resolve(), share=share, steps=steps or 0, name=called, stop=stop)
    click.echo(found)
