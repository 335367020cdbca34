"""Keeping a copy of a registry elsewhere in the home's layout, so that `serve` can offer it: one way, and nothing is ever taken away there.

A tag is copied after all it leads to (snapshots/copy.py), so a client never sees half a snapshot.  Version tags never move: those that are here
are not asked for again.  Measurements come after their snapshot, so those of the newest versions and of the channels are looked for again.
"""

import logging
import threading
from collections.abc import Callable

from streamlearn.contract.errors import Corrupt, NotFound, Retryable
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.snapshots.copy import copy
from streamlearn.snapshots.publish import steps

NEWEST = 20  # versions whose measurements may still come
PERIOD_S = 15.0
logger = logging.getLogger(__name__)


def mirror(source: Registry, layout: OciLayout) -> int:
    """Copy what is there and not here; how many tags were brought.  Raises Retryable, Corrupt."""
    known, brought = set(layout.names()), 0
    versions = [f"0.{step}.0" for step in steps(source)]
    fixed, recent = set(versions), set(versions[-NEWEST:])
    for name in source.names():
        if name in fixed and name in known and name not in recent:
            continue
        found, held = source.find(name), layout.find(name)
        if found is None:
            continue  # gone meanwhile
        there = {r.digest for r in source.referrers(found.digest)}
        if held and held.digest == found.digest and there <= {r.digest for r in layout.referrers(held.digest)}:
            continue
        try:
            copy(source, layout, name, name)
        except NotFound as e:  # collected under our feet; the next round sees where the tag is now
            logger.info("not copied: %s", e)
            continue
        brought += 1
    return brought


def follow(source: Registry, layout: OciLayout, stop: threading.Event, told: Callable[[str], object]) -> None:
    """Mirror every `PERIOD_S` until `stop`; `told` hears what it waits for, or nothing."""
    while not stop.is_set():
        try:
            if brought := mirror(source, layout):
                logger.info("copied %d tags", brought)
            told("")
        except (Retryable, Corrupt) as e:
            logger.warning("%s; again in %g s", e, PERIOD_S)
            told(str(e))
        stop.wait(PERIOD_S)
