"""`streamlearn probe`: run, finetune, compare, matrix, drift."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from streamlearn.cli.options import HOME
from streamlearn.cli.snapshots import open_registry
from streamlearn.contract.config import Config
from streamlearn.contract.config_file import from_json
from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.errors import ConfigError

if TYPE_CHECKING:
    from streamlearn.contract.registry import Registry

JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
BANK = click.option("--bank", "names", multiple=True, help="Of the configuration, or registered.  [default: all]")
DEVICE = click.option("--device", default="cpu", show_default=True, help="As torch names it.")


@click.group()
def probe() -> None:
    """Measure snapshots beyond what the role `evaluate` does by itself, and read what it found."""


def _config(home: Path) -> Config:
    path = home / "config.json"
    return from_json(path.read_text(), where=str(path)) if path.exists() else Config()


def _banks(home: Path, config: Config, names: tuple[str, ...] = ()) -> list[BankConfig]:
    from streamlearn.probes.evaluator import Banks

    known = {bank.name: bank for bank in Banks(config, home).configs()}
    missing = [name for name in names if name not in known]
    if missing or not known:
        raise ConfigError(
            f"probe bank {', '.join(missing) or '(any)'}: neither in the configuration nor registered; there are: {', '.join(known) or 'none'}; "
            "`streamlearn banks add` registers one"
        )
    return [known[name] for name in names] if names else list(known.values())


def _step(registry: "Registry", reference: str) -> tuple[int, str]:
    from streamlearn.snapshots.publish import step_of

    digest = registry.manifest(reference)[0].digest
    return step_of(registry, digest), digest


@probe.command()
@click.argument("reference")
@click.option("--protocol", type=click.Choice(["each", "thorough"]), default="thorough", show_default=True)
@BANK
@DEVICE
@HOME
def run(reference: str, protocol: str, names: tuple[str, ...], device: str, home: Path) -> None:
    """Measure one snapshot (a tag or a digest), and record the result beside it.  What is recorded already is only printed."""
    from streamlearn.probes.banks import load_bank
    from streamlearn.probes.claims import claim
    from streamlearn.probes.measure import Measurer, open_snapshot
    from streamlearn.probes.turns import alone
    from streamlearn.snapshots.publish import has_result, record_result, results

    registry, config = open_registry(home), _config(home)
    settings = config.probe.model_copy(update={"device": device})
    snapshot = open_snapshot(registry, *_step(registry, reference), device)
    measurer = Measurer(settings, home, alone(), lambda what: click.echo(f"… {what}", err=True))
    for bank_config in _banks(home, config, names):
        bank, named = load_bank(bank_config, snapshot.size), measurer.protocol(protocol, snapshot.size)
        with claim(home, snapshot.digest, bank.digest, named) as ours:
            if not ours:
                raise ConfigError(f"{reference} on {bank.name}: another evaluator of {home} is measuring it just now; ask again in a while")
            if not has_result(registry, snapshot.digest, bank.digest, named):
                record_result(registry, snapshot.digest, measurer.measure(protocol, snapshot, bank))
        _print(next(r for r in results(registry, snapshot.digest) if (r["bank_digest"], r["protocol"]) == (bank.digest, named)))


@probe.command()
@click.argument("reference")
@click.option("--rule", type=click.Choice(["bit", "seer"]), default="bit", show_default=True, help="BiT-HyperRule, or SEER's.")
@click.option("--bank", "name", required=True, help="Of the configuration, or registered.")
@click.option("--steps", type=int, help="Shorten the rule; its marks move in proportion.")
@click.option("--batch", type=int, help="Images in a step; the rate follows.  [default: the rule's]")
@click.option("--px", type=int, help="Side of the crops.  [default: the rule's]")
@click.option("--seed", default=0, show_default=True)
@DEVICE
@HOME
def finetune(
    *, reference: str, rule: str, name: str, steps: int | None, batch: int | None, px: int | None, seed: int, device: str, home: Path
) -> None:
    """Train all weights on a bank by a fixed rule, and record the accuracy: for releases.  The snapshot itself is not changed."""
    from streamlearn.probes import finetune as tuning
    from streamlearn.probes.banks import choose, load_bank
    from streamlearn.probes.claims import claim
    from streamlearn.probes.measure import open_snapshot
    from streamlearn.snapshots.publish import has_result, record_result, results
    from streamlearn.stream.decode import header

    registry, config = open_registry(home), _config(home)
    bank_config = _banks(home, config, (name,))[0]
    chosen = choose(bank_config)
    first = header(next(chosen.train.read())[1])
    made = tuning.rule_for(rule, len(chosen.train.chosen), first.height, first.width, batch=batch, px=px, steps=steps)
    snapshot = open_snapshot(registry, *_step(registry, reference), device)
    bank = load_bank(bank_config, made.load, tuning.SHAPES[rule])
    named = f"{made.protocol},seed{seed}"
    with claim(home, snapshot.digest, bank.digest, named) as ours:
        if not ours:
            raise ConfigError(f"{reference} on {name}: another evaluator of {home} is at it just now; ask again in a while")
        if not has_result(registry, snapshot.digest, bank.digest, named):
            every = max(1, made.steps // 20)

            def say(step: int, loss: float) -> None:
                if step % every == 0:
                    click.echo(f"… step {step} of {made.steps}: loss {loss:.3f}", err=True)

            record_result(registry, snapshot.digest, tuning.finetune(snapshot, bank, made, seed=seed, say=say))
    _print(next(r for r in results(registry, snapshot.digest) if (r["bank_digest"], r["protocol"]) == (bank.digest, named)))


@probe.command()
@click.argument("one")
@click.argument("other")
@JSON
@HOME
def compare(one: str, other: str, as_json: bool, home: Path) -> None:
    """OTHER against ONE on the same images: exact McNemar tests for every bank and probe that both were measured by."""
    from streamlearn.probes.compare import compare as rows_of

    rows = rows_of(open_registry(home), one, other)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    table = Table("bank", "probe", one, other, "difference", "95 %", "p")
    for r in rows:
        between = f"{r['low']:+.4f} … {r['high']:+.4f}" if "p" in r else "–"
        table.add_row(
            r["bank"],
            r["probe"],
            f"{r['one']:.4f}",
            f"{r['other']:.4f}",
            f"{r['difference']:+.4f}",
            between,
            f"{r['p']:.2g}" if "p" in r else "–",
        )
    Console().print(table)


@probe.command()
@click.option("--probe", "kind", default="knn", show_default=True, help="knn, ridge, logistic, low_shot_1 or low_shot_10.")
@JSON
@HOME
def matrix(kind: str, as_json: bool, home: Path) -> None:
    """A[snapshot, generation], forgetting and transfer, from the registry.  --json: everything, as continual.json has it."""
    from streamlearn.probes.overview import Overview

    config = _config(home)
    whole = Overview(config, open_registry(home), home).continual(_banks(home, config))
    if as_json:
        click.echo(json.dumps(whole, indent=1))
        return
    if kind not in whole["probes"]:
        raise ConfigError(f"--probe {kind}: no snapshot was measured by it; there are: {', '.join(whole['probes']) or 'none'}")
    found = whole["probes"][kind]
    table = Table("last snapshot of", *found["generations"])
    for name, snapshot, line in zip(found["generations"], found["snapshots"], found["matrix"], strict=True):
        step = f" (step {snapshot['step']:,})" if snapshot else " (none)"
        table.add_row(name + step, *("–" if x is None else f"{x:.4f}" for x in line))
    table.add_row("untrained", *("–" if x is None else f"{x:.4f}" for x in found["untrained"]))
    Console().print(table)
    for name, value in found["measures"].items():
        interval = found["intervals"].get(name)
        click.echo(
            f"{name}: {'–' if value is None else f'{value:+.4f}'}{f'  (95 %: {interval[0]:+.4f} … {interval[1]:+.4f})' if interval else ''}"
        )


@probe.command()
@JSON
@HOME
def drift(as_json: bool, home: Path) -> None:
    """What each source's windows showed: Fréchet-64 against its first window."""
    from streamlearn.probes.drift_watch import read_state

    state = read_state(home)
    for source in state["sources"].values():
        source["waiting"] = len(source["waiting"])
    if as_json:
        click.echo(json.dumps(state, indent=1))
        return
    table = Table("source", "window", "images", "found", "distance", "without drift at most")
    for name, source in sorted(state["sources"].items()):
        for w in source["windows"][-20:]:
            numbers = (f"{w[key]:.4g}" if key in w else "–" for key in ("distance", "threshold"))
            table.add_row(name, w["at"], str(w["images"]), w["found"], *numbers)
    Console().print(table)


def _print(result: dict[str, Any]) -> None:
    click.echo(json.dumps({k: v for k, v in result.items() if k != "right"}, indent=2))
