"""The gate: may a channel move to a snapshot?  Judged from what the registry holds; a verdict is a value with every figure and reason.

`stable`   1. measured on every bank that the present holder was measured on, by a protocol they share: else `waiting`
           2. no label-free measure says `collapsed`
           3. no bank and probe on which it is significantly worse: exact McNemar on the same images, Holm's correction over all of them
           4. on every bank and probe a loss as large as `margin` is ruled out: the 95 % interval of the difference lies above -margin
              (non-inferiority; without it, a bank too small to show anything would let everything pass)
           5. a later step than the holder's, never rolled back from
           It need not be better: it has seen what the holder has not.
`best`     1, 2, and not rolled back from; and its mean over the banks (or its figure on `best_bank`) by `best_probe` is higher than the holder's, by
           any gain, or where `best_significant` is set by a significant one: exact McNemar on one bank, on several a z-test of the mean
           of the differences.  Earlier steps may be best.

The first holder of a channel has nothing to be compared with: it must be measured, and not have collapsed.  A bank of the holder that can be
measured no more (neither in the configuration nor registered, or changed since, and both were measured on what it is now) is not waited for.
A pinned channel waits.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamlearn.contract.config_snapshots import GateConfig
from streamlearn.contract.registry import Registry
from streamlearn.probes.compare import compare
from streamlearn.probes.statistics import Z95, holm, unpaired
from streamlearn.snapshots.history import BEST, STABLE, chain, marked
from streamlearn.snapshots.publish import results, step_of

PROMOTED, REFUSED, WAITING = "promoted", "refused", "waiting"
OUTCOMES = (PROMOTED, REFUSED, WAITING)


@dataclass(frozen=True)
class Figure:
    """One bank and probe that both were measured by; the candidate minus the holder."""

    bank: str
    bank_digest: str
    protocol: str
    probe: str
    holder: float
    candidate: float
    difference: float
    low: float  # 95 %
    high: float
    p: float  # two-sided
    adjusted: float  # by Holm, over all figures of the verdict

    def __str__(self) -> str:
        return (
            f"{self.bank} {self.probe} {self.holder:.4f} -> {self.candidate:.4f} "
            f"({self.difference:+.4f}, 95 %: {self.low:+.4f} … {self.high:+.4f}, p = {self.adjusted:.2g} after Holm)"
        )


@dataclass(frozen=True)
class Verdict:
    channel: str
    outcome: str  # promoted: it may be; refused: not against this holder; waiting: not yet
    digest: str
    step: int
    against: str  # digest of the present holder; empty: none
    reasons: tuple[str, ...]
    figures: tuple[Figure, ...]
    pinned: bool = False  # the channel is: no other snapshot fares better

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def why(self) -> str:
        return "; ".join(self.reasons)


@dataclass
class _Case:
    """What speaks against it so far."""

    refusals: list[str]
    waits: list[str]
    praise: str = ""


def judge(
    registry: Registry, reference: str, channel: str, config: GateConfig | None = None, *, banks: Collection[str] | None = None
) -> Verdict:
    """`banks`: names of all that are configured or registered; without it, every bank of the holder is one.  Raises NotFound, Corrupt."""
    config = config or GateConfig()
    digest = registry.manifest(reference)[0].digest
    moves = chain(registry, channel)
    against, step = moves[0].after if moves else "", step_of(registry, digest)
    case, measured = _Case([], []), results(registry, digest)
    figures = _figures(compare(registry, against, digest)) if against and against != digest else []
    if digest in (bad := marked(registry)):
        case.refusals.append(f"rolled back from on {bad[digest].at} by {bad[digest].by}: {bad[digest].why or 'no reason given'}")
    if moves and moves[0].pinned:
        case.waits.append(f"{channel} is pinned by {next((m.by for m in moves if m.kind == 'pin'), '?')}")
    _measured(measured, case)
    if against == digest:
        case.refusals.append(f"{channel} points to it already")
    elif against:
        wanted = results(registry, against)
        if channel == BEST:
            figures, wanted, measured = _for_best(figures, config), _for_best(wanted, config), _for_best(measured, config)
            _better(figures, config, case)
        _lacks(wanted, measured, banks, case)
        if channel == STABLE:
            _no_worse(figures, config, case)
            if step <= (held := step_of(registry, against)):
                case.refusals.append(f"step {step:,} is not later than the holder's {held:,}; `streamlearn snapshots rollback` goes back")
    else:
        case.praise = "the first holder: measured, and no alarm"
        if channel == BEST and not _for_best(measured, config):
            case.waits.append(f"not measured by {config.best_probe} on {config.best_bank or 'any bank'}")
    outcome = REFUSED if case.refusals else WAITING if case.waits else PROMOTED
    reasons = tuple([*case.refusals, *case.waits] or [case.praise])
    return Verdict(channel, outcome, digest, step, against, reasons, tuple(figures), bool(moves) and moves[0].pinned)


def _measured(measured: Sequence[dict[str, Any]], case: _Case) -> None:
    if not any("alarms" in found for found in measured):
        case.waits.append("not measured on any bank yet")
    for found in measured:
        if found.get("alarms"):
            values = ", ".join(f"{name} {found[name]:.3g}" if name in found else name for name in found["alarms"])
            case.refusals.append(f"collapse alarms on {found['bank']}: {values}")


def _lacks(wanted: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]], banks: Collection[str] | None, case: _Case) -> None:
    """Banks of the holder that the candidate was not measured on by a protocol of the holder's."""
    common = {(r["bank_digest"], r["protocol"]) for r in wanted} & {(r["bank_digest"], r["protocol"]) for r in measured}
    done = {digest for digest, _ in common}
    renewed = {r["bank"] for r in wanted if r["bank_digest"] in done}
    for digest, name in {r["bank_digest"]: r["bank"] for r in wanted}.items():
        if digest not in done and name not in renewed and (banks is None or name in banks):
            case.waits.append(f"not measured on {name} ({digest[:19]}…) as the holder was")


def _no_worse(figures: Sequence[Figure], config: GateConfig, case: _Case) -> None:
    if not figures:
        case.waits.append("nothing that both it and the holder were measured by")
    for figure in figures:
        if figure.difference < 0 and figure.adjusted < config.alpha:
            case.refusals.append(f"significantly worse: {figure}")
        elif figure.low < -config.margin:
            case.refusals.append(f"a loss of {config.margin:g} is not ruled out (more test images, or snapshots.gate.margin): {figure}")
    worst = min(figures, key=lambda f: f.difference, default=None)
    case.praise = f"no significant loss on {len({f.bank_digest for f in figures})} banks; the least gain: {worst}"


def _for_best(rows: Sequence[Any], config: GateConfig) -> list[Any]:
    """Of figures or of results, those that `best` is chosen by."""
    found = []
    for row in rows:
        bank, probes = (row.bank, {row.probe}) if isinstance(row, Figure) else (row["bank"], set(row))
        if config.best_bank in ("", bank) and config.best_probe in probes:
            found.append(row)
    return found


def _better(figures: Sequence[Figure], config: GateConfig, case: _Case) -> None:
    if not figures:
        case.waits.append(f"it and the holder were not both measured by {config.best_probe} on {config.best_bank or 'any bank'}")
        return
    gain = sum(f.difference for f in figures) / len(figures)
    p = figures[0].p if len(figures) == 1 else _p_of_mean(figures)
    said = f"{config.best_probe} on {config.best_bank or f'{len(figures)} banks'}: {gain:+.4f} against the holder, p = {p:.2g}"
    if gain <= 0:
        case.refusals.append(f"not better by {said}")
    elif config.best_significant and p >= config.alpha:
        case.refusals.append(f"not significantly better by {said}")
    case.praise = f"better by {said}"


def _p_of_mean(figures: Sequence[Figure]) -> float:
    """Two-sided, of the mean of the differences; their test images are not the same ones, so variances add."""
    gain = sum(f.difference for f in figures)
    variance = sum(((f.high - f.low) / 2 / Z95) ** 2 for f in figures)
    return math.erfc(abs(gain) / math.sqrt(2 * variance)) if variance else float(gain == 0)


def _figures(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """Of compare.py's rows; those of multi-label banks from the two intervals."""
    found = []
    for row in rows:
        if "p" not in row:
            low, high, p = unpaired(row["one"], row["other"], row["one_interval"], row["other_interval"])
            row = row | {"low": low, "high": high, "p": p}
        found.append(row)
    adjusted = holm([row["p"] for row in found])
    return [
        Figure(
            row["bank"], row["bank_digest"], row["protocol"], row["probe"], row["one"], row["other"], row["difference"],
            row["low"], row["high"], row["p"], at,
        ) for row, at in zip(found, adjusted, strict=True)
    ]  # fmt: skip
