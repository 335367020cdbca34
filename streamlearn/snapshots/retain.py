"""Letting old snapshots go.

Kept: the newest `keep` versions; whatever a tag that is no version points to (`candidate`, `stable`, `best`, your own); the newest version of
each generation; what the last `keep_moves` moves of each channel led to or from, so that they can be rolled back to; and what the
caller names.  Of the others only the version tag is taken away.

  1. take `.moves.lock`, so that no channel moves to what is being let go; read tags, moves and generations
  2. index.json without those tags, if they point where they did            <- THE COMMIT POINT
  3. the collection (registry_gc.py), a day later at the earliest: who is pulling one has time to end

Killed before 2 nothing has changed; after it, the snapshots are listed no more and the next collection takes them.  A snapshot
whose manifest cannot be read stops it: its generation is not known.  Only the embedded registry: others cannot take one tag away safely
(most know deletion by digest alone, which takes `stable` along), and have retention rules of their own.
"""

from collections.abc import Collection
from dataclasses import dataclass

from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.snapshots.artifact import version
from streamlearn.snapshots.history import CHANNELS, history
from streamlearn.snapshots.lineage import generation_of
from streamlearn.snapshots.promote import moving
from streamlearn.snapshots.publish import versions


@dataclass(frozen=True)
class Plan:
    """Version tags, in order of steps."""

    kept: dict[str, str]  # tag -> why
    gone: dict[str, str]  # tag -> digest


def plan(registry: Registry, *, keep: int, keep_moves: int = 10, also: Collection[str] = ()) -> Plan:
    """What would stay and go.  `also`: digests that are needed elsewhere.  Raises Corrupt where a manifest cannot be read."""
    if keep < 1:
        raise ConfigError(f"keep = {keep}: 1 or more of the newest versions stay, or `candidate` has none")
    found = versions(registry)
    channels: dict[str, list[str]] = {}
    for name, known in registry.tags().items():
        if name not in {version(step) for step in found}:
            channels.setdefault(known.digest, []).append(name)
    moves = [move for channel in CHANNELS for move in history(registry, channel)[:keep_moves]]
    moved = {digest for move in moves for digest in (move.before, move.after)}
    newest = set(sorted(found)[-keep:])
    kept, gone, generations = {}, {}, set()
    for step in sorted(found, reverse=True):
        tag, digest = version(step), found[step].digest
        generation = generation_of(registry, digest)
        reasons = [f"tag {name}" for name in sorted(channels.get(digest, []))]
        reasons += ["among the newest"] if step in newest else []
        reasons += [f"newest of {generation}"] if generation and generation not in generations else []
        reasons += ["in the last moves"] if digest in moved else []
        reasons += ["needed by this home"] if digest in also else []
        generations.add(generation)
        if reasons:
            kept[tag] = ", ".join(reasons)
        else:
            gone[tag] = digest
    return Plan(dict(reversed(kept.items())), dict(reversed(gone.items())))


def retain(registry: Registry, *, keep: int, keep_moves: int = 10, also: Collection[str] = ()) -> Plan:
    """Do it.  Raises ConfigError of a registry that is not embedded."""
    if not isinstance(registry, OciLayout):
        raise ConfigError(
            "a registry behind a network cannot take one tag away safely: use its own retention, and let it keep tagged manifests"
        )
    with moving(registry):
        done = plan(registry, keep=keep, keep_moves=keep_moves, also=also)
        registry.untag_all(done.gone)
    return done
