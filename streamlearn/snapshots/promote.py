"""Moving the channels `stable` and `best`: promote, roll back, pin.  history.py reads what is written here.

  1. look     at the holder of the tag and the record that tells how it came there
  2. record   who, when, from, to, why, the verdict's figures: attached to the snapshot that the channel is to point to, under a number
              that is greater than all of the holder's history and of that snapshot
  3. tag      moves by compare-and-set from what step 1 saw            <- THE COMMIT POINT
  4. list     where the registry has lost the record from its list of referrers meanwhile, it is attached again

Killed after   what is left                                        who mends it
  1            nothing
  2            a record of a move that was not made: its snapshot   nobody needs to: it is in no history, and the next move to that
               is not what the tag points to                        snapshot has a greater number; `history --unfinished` lists it
  2, half      a blob that no manifest names                        the collection
  3            nothing; on a registry without the referrers API     the next move, or `history`: an `untold` move stands in for it
               perhaps a record that is not in its list

A pin is a record at the holder, from there to there, and its attaching is the commit.  It stays with the channel, whatever is forced, until
it is taken back.  A rollback's record is what marks the snapshot it left as bad: there is no second write that could be missing.

Of two who move one channel: the embedded registry has a lock (`.moves.lock`), taken from 1 to 4 and freed by the kernel if its holder
is killed, so the second one sees the first one's move, and Conflict says so where it had judged against the old holder.  OCI Distribution
has neither lock nor compare-and-set (adapters/oci_registry.py): both may be told that they moved it.  What holds there: the tag points to
one of the two snapshots, whole; the history at it names its own mover and has the same past; the other's record is an unfinished one.
A tag that another tool moves (skopeo) has no record: history shows `untold`, and the next move goes on from there.
"""

import fcntl
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from streamlearn.contract.errors import ConfigError, Conflict, NotFound
from streamlearn.contract.registry import ANY, OciLayout, Registry, canonical
from streamlearn.contract.status import now
from streamlearn.snapshots.artifact import LINEAGE, MODEL
from streamlearn.snapshots.history import (
    CHANNELS,
    MOVE,
    PAST,
    PINNED,
    PROMOTED,
    ROLLED_BACK,
    SCHEMA,
    UNPINNED,
    Move,
    bad_of,
    chain,
    history,
    marked,
    marks,
    number_of,
    records,
)

__all__ = ["CHANNELS", "Move", "Pinned", "history", "marked", "moving", "pin", "promote", "rollback", "unpin"]
LOCK = ".moves.lock"


class Pinned(Conflict):
    """The channel may not be moved: someone has pinned it."""


def promote(
    registry: Registry,
    channel: str,
    reference: str,
    *,
    by: str,
    why: str,
    forced: bool = False,
    verdict: Mapping[str, Any] | None = None,
    expect: str = ANY,
) -> Move:
    """Point `channel` to a snapshot (tag or digest).  Whether it deserves that is the gate's to say (probes/gate.py), before.

    `expect`: digest of the holder that the verdict was against, '' for none.  Raises Conflict where that is no longer so, Pinned unless `forced`, NotFound.
    """
    _known(channel)
    known, manifest = registry.manifest(reference)
    if manifest.get("artifactType") != MODEL:
        raise ConfigError(
            f"{reference}: artifactType {manifest.get('artifactType')!r} is not a snapshot's; `streamlearn snapshots list` has those"
        )
    with moving(registry):
        moves = _looked(registry, channel, expect, forced)
        if moves and moves[0].after == known.digest:
            raise ConfigError(f"{channel} points to {reference} already")
        return _move(registry, moves, _next(moves, channel, PROMOTED, known.digest, by=by, why=why, forced=forced), verdict)


def rollback(registry: Registry, channel: str, *, by: str, why: str, forced: bool = False) -> Move:
    """Back to the newest earlier holder that was not itself rolled back from, and is still there; what is left is marked as bad.

    Raises ConfigError where there is none, Pinned unless `forced`.
    """
    _known(channel)
    with moving(registry):
        moves = _looked(registry, channel, ANY, forced)
        if not moves:
            raise ConfigError(f"{channel} points to nothing yet; `streamlearn snapshots promote REFERENCE --channel {channel}`")
        left = {moves[0].after, *bad_of(moves)}
        earlier = dict.fromkeys(m.after for m in moves)
        target = next((digest for digest in earlier if digest not in left and _is_there(registry, digest)), None)
        if target is None:
            raise ConfigError(
                f"{channel}: no earlier holder to go back to, of {len(earlier)} known; "
                f"name one yourself: `streamlearn snapshots promote REFERENCE --channel {channel} --force`"
            )
        return _move(registry, moves, _next(moves, channel, ROLLED_BACK, target, by=by, why=why, forced=forced), None)


def pin(registry: Registry, channel: str, *, by: str, why: str) -> Move:
    """Keep the channel where it is: nobody moves it but by force.  Raises ConfigError where it points to nothing, or is pinned already."""
    return _pin(registry, channel, PINNED, by=by, why=why)


def unpin(registry: Registry, channel: str, *, by: str, why: str) -> Move:
    """Take the pin back.  Raises ConfigError where there is none."""
    return _pin(registry, channel, UNPINNED, by=by, why=why)


def moving(registry: Registry) -> AbstractContextManager[None]:
    """Alone among those who move channels or retire versions, where the registry has a lock."""
    return registry.locked(LOCK, fcntl.LOCK_EX) if isinstance(registry, OciLayout) else nullcontext()


def _pin(registry: Registry, channel: str, kind: str, *, by: str, why: str) -> Move:
    _known(channel)
    with moving(registry):
        moves = _looked(registry, channel, ANY, forced=True)
        if not moves:
            raise ConfigError(f"{channel} points to nothing yet: there is nothing to {kind}")
        if moves[0].pinned == (kind == PINNED):
            raise ConfigError(f"{channel} is {'pinned already' if moves[0].pinned else 'not pinned'}")
        pinned = replace(_next(moves, channel, kind, moves[0].after, by=by, why=why, forced=False), pinned=kind == PINNED)
        return _record(registry, moves, pinned, None)


def _looked(registry: Registry, channel: str, expect: str, forced: bool) -> list[Move]:
    """The channel's moves.  Raises Conflict, Pinned."""
    moves = chain(registry, channel)
    held = moves[0].after if moves else ""
    if expect not in (ANY, held):
        raise Conflict(f"{channel} points to {held or 'nothing'}, not {expect or 'nothing'}: someone else moved it; judge again")
    if moves and moves[0].pinned and not forced:
        who = next((m for m in moves if m.kind == PINNED), moves[0])
        raise Pinned(f"{channel} is pinned by {who.by} since {who.at} ({who.why or 'no reason given'}); unpin it, or --force")
    return moves


def _next(moves: list[Move], channel: str, kind: str, after: str, *, by: str, why: str, forced: bool) -> Move:
    last = moves[0] if moves else None
    return Move(
        channel, last.number + 1 if last else 1, kind, now(), by, last.after if last else "", after, why=why, forced=forced,
        pinned=bool(last and last.pinned), previous=last.record if last else "",
    )  # fmt: skip


def _move(registry: Registry, moves: list[Move], move: Move, verdict: Mapping[str, Any] | None) -> Move:
    told = _record(registry, moves, move, verdict)
    registry.tag(told.after, told.channel, expect=told.before)
    if not any(r.digest == told.record for r in registry.referrers(told.after, MOVE)):
        registry.put_manifest(registry.read_manifest(told.record)[1])  # lost from a list that others write too
    return told


def _record(registry: Registry, moves: list[Move], move: Move, verdict: Mapping[str, Any] | None) -> Move:
    """Attached to where the move leads; with its number."""
    subject, manifest = registry.manifest(move.after)
    there = records(registry, move.after, move.channel)
    number = max([move.number, *(1 + number_of(r) for r in there)])
    move = replace(move, number=number, step=int(manifest.get("annotations", {}).get(LINEAGE + "step", -1)))
    payload = {k: v for k, v in move.to_json().items() if k != "record"}
    payload |= {"schema": SCHEMA, "verdict": dict(verdict or {}), "past": [m.to_json() for m in moves[:PAST]]}
    return replace(move, record=registry.attach(subject, MOVE, canonical(payload), marks(move)).digest)


def _is_there(registry: Registry, digest: str) -> bool:
    try:
        registry.manifest(digest)
    except NotFound:  # retention has let it go
        return False
    return True


def _known(channel: str) -> None:
    if channel not in CHANNELS:
        raise ConfigError(f"channel {channel!r}: one of {', '.join(CHANNELS)}; `candidate` and versions are moved by publishing alone")
