"""Who moved a channel, when, from where to where and why: read from the records that promote.py attaches.

A record is a referrer of the snapshot that the channel was moved to.  Its number is greater than every number that its predecessor or that
snapshot had before, so of the records at the holder of the tag the one with the greatest number tells how the tag came there.  It holds the
moves before it too (the newest 500), and names its predecessor: where its payload is damaged, what lists say of it stands, and
the chain goes on at the predecessor.  Records of attempts that never moved the tag are in no record's past: `unfinished` lists them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.oci import parse_json
from streamlearn.contract.registry import Descriptor, Registry
from streamlearn.snapshots.artifact import LINEAGE
from streamlearn.snapshots.publish import versions

MOVE = "application/vnd.streamlearn.move.v1+json"
SCHEMA = "streamlearn.move/1"
STABLE, BEST = "stable", "best"
CHANNELS = (STABLE, BEST)
PROMOTED, ROLLED_BACK, PINNED, UNPINNED, UNTOLD = "promote", "rollback", "pin", "unpin", "untold"
PAST = 500  # moves that a record holds
TOLD = ("channel", "number", "kind", "at", "by", "before", "after", "forced", "pinned", "previous")  # in a record's annotations too


@dataclass(frozen=True)
class Move:
    """One record.  `untold`: the tag was moved by another tool, or its record is lost; then only channel and `after` are known."""

    channel: str
    number: int  # of the channel; grows, with gaps where an attempt was not finished
    kind: str  # promote, rollback, pin, unpin, untold
    at: str  # RFC 3339, by the mover's clock
    by: str
    before: str  # digest that the channel pointed to; empty: nothing
    after: str  # digest that it points to since
    step: int = -1  # of `after`
    why: str = ""
    forced: bool = False  # past the gate or a pin
    pinned: bool = False  # the channel is, from then on
    previous: str = ""  # digest of the record before
    record: str = ""  # digest of this one

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def history(registry: Registry, *channels: str) -> list[Move]:
    """Moves, the newest first; of all channels by their times, of one in their true order.  Behind a network a few requests a channel.

    Raises Corrupt where a record is not one of ours.
    """
    chains = [chain(registry, channel) for channel in channels or CHANNELS]
    found: list[Move] = []
    while chains := [moves for moves in chains if moves]:
        newest = max(chains, key=lambda moves: (moves[0].kind == UNTOLD, moves[0].at))
        found.append(newest.pop(0))
    return found


def chain(registry: Registry, channel: str) -> list[Move]:
    """Of one channel, from where its tag points now."""
    held = registry.find(channel)
    if held is None:
        return []
    here = records(registry, held.digest, channel)
    if here:
        return _from(registry, here[0])
    lost = max((r for d in versions(registry).values() for r in records(registry, d.digest, channel)), key=number_of, default=None)
    older = _from(registry, lost) if lost else []
    untold = Move(channel, older[0].number if older else 0, UNTOLD, "", "", older[0].after if older else "", held.digest)
    return [replace(untold, pinned=bool(older) and older[0].pinned, previous=older[0].record if older else ""), *older]


def marked(registry: Registry) -> dict[str, Move]:
    """Digest -> the rollback that left it, of snapshots that nobody has promoted by force since."""
    bad: dict[str, Move] = {}
    for channel in CHANNELS:
        for digest, move in bad_of(chain(registry, channel)).items():
            bad.setdefault(digest, move)
    return bad


def bad_of(moves: list[Move]) -> dict[str, Move]:
    """As `marked`, of one channel's moves."""
    bad: dict[str, Move] = {}
    for move in reversed(moves):
        if move.kind == ROLLED_BACK:
            bad[move.before] = move
        if move.kind == PROMOTED:
            bad.pop(move.after, None)
    return bad


def verdict_of(registry: Registry, move: Move) -> dict[str, Any]:
    """The figures that the move was made on; empty if there were none, or they are lost."""
    if not move.record:
        return {}
    try:
        found: dict[str, Any] = _payload(registry, move.record).get("verdict") or {}
    except (Corrupt, NotFound):
        return {}
    return found


def unfinished(registry: Registry) -> list[Move]:
    """Records of attempts that never moved their channel: killed before the tag, or beaten to it.  Harmless.  Reads every version."""
    done = {move.record for channel in CHANNELS for move in chain(registry, channel)}
    digests = {d.digest for d in versions(registry).values()} | {m.digest for c in CHANNELS if (m := registry.find(c))}
    every = [r for digest in sorted(digests) for c in CHANNELS for r in records(registry, digest, c)]
    return [_listed(r) for r in every if r.digest not in done]


def records(registry: Registry, digest: str, channel: str) -> list[Descriptor]:
    """A snapshot's, of one channel, the greatest number first."""
    ours = [r for r in registry.referrers(digest, MOVE) if r.annotations.get(LINEAGE + "channel") == channel]
    return sorted(ours, key=number_of, reverse=True)


def marks(move: Move) -> dict[str, str]:
    """What lists say of a record: a registry shows it without opening the record."""
    return {LINEAGE + name: str(getattr(move, name)) for name in TOLD}


def _from(registry: Registry, record: Descriptor) -> list[Move]:
    """This record's move and all before it."""
    found: list[Move] = []
    while True:
        try:
            payload = _payload(registry, record.digest)
            moves = [_move(payload | {"record": record.digest}), *(_move(raw) for raw in payload["past"])]
            return found + moves
        except (Corrupt, NotFound):
            move = replace(_listed(record), why="(the record is damaged; this is what the registry's list says of it)")
        found.append(move)
        older = [r for r in registry.referrers(move.before, MOVE) if r.digest == move.previous] if move.before else []
        if not older:
            return found
        record = older[0]


def _payload(registry: Registry, record: str) -> dict[str, Any]:
    """Raises Corrupt, NotFound."""
    layers = registry.manifest(record)[1].get("layers") or []
    try:
        payload: dict[str, Any] = parse_json(registry.read_blob(layers[0]["digest"]), f"{record}: not the record of a move")
        if payload["schema"] != SCHEMA:
            raise Corrupt(f"{record}: schema {payload['schema']!r} is not known here, only {SCHEMA}")
    except (KeyError, IndexError, TypeError) as e:
        raise Corrupt(f"{record}: not the record of a move: {e}") from e
    return payload


def _move(raw: Mapping[str, Any]) -> Move:
    """Raises Corrupt."""
    try:
        move = Move(**{name: raw[name] for name in Move.__dataclass_fields__ if name in raw})
    except TypeError as e:
        raise Corrupt(f"not the record of a move: {e}") from e
    wrong = [name for name, field in Move.__dataclass_fields__.items() if type(getattr(move, name)) is not field.type]
    if wrong:
        raise Corrupt(f"not the record of a move: {wrong[0]} is {getattr(move, wrong[0])!r}")
    return move


def _listed(record: Descriptor) -> Move:
    """From the annotations alone."""
    told = {name: record.annotations.get(LINEAGE + name, "") for name in TOLD}
    flags = {name: told.pop(name) == "True" for name in ("forced", "pinned")}
    del told["number"]
    return Move(**told, **flags, number=number_of(record), record=record.digest)  # type: ignore[arg-type]  # what is left are texts


def number_of(record: Descriptor) -> int:
    text = record.annotations.get(LINEAGE + "number", "")
    return int(text) if text.isdigit() else 0
