"""Of the evaluators of one home (the role, a command beside it) one measures a (snapshot, bank, protocol) at a time.

A claim is a lock of the kernel on one of a few files: whoever is killed holds it no longer, and nothing has to be swept.  Under the claim
the registry is asked once more whether the result is there, so no measurement is made twice.  Evaluators of different homes know
nothing of each other: give a registry to one home.
"""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = 64  # two keys of one file wait for each other, which is harmless


@contextmanager
def claim(home: Path, *key: str) -> Iterator[bool]:
    """Whether it is ours now; False: another is at it."""
    folder = home / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    number = int.from_bytes(hashlib.sha256("\0".join(key).encode()).digest()[:4], "big") % FILES
    with (folder / f"{number:02d}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
