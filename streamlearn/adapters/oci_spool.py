"""What is under way between this machine and a registry: one folder of notes and of half-pulled blobs, so that a killed process goes on.

A name is claimed by a lock, which a kill takes away.  Who finds it claimed does its work under a name of its own, which nobody resumes.
What nobody has touched for a week is removed when the folder is next opened.  Upload addresses are keys: the folder is its owner's alone.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEEK_S = 7 * 86_400.0


class Spool:
    def __init__(self, folder: Path, *, now: float | None = None):
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = (time.time() if now is None else now) - WEEK_S
        for path in folder.iterdir():
            if path.is_file() and path.stat().st_mtime < old:
                path.unlink(missing_ok=True)

    @contextmanager
    def claim(self, name: str) -> Iterator[Path]:
        """A path that is ours alone until the end of the block: `name`'s, with what an earlier process left there, or another."""
        with (self.folder / f"{name}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                mine = self.folder / f"{name}.{os.urandom(4).hex()}"
                try:
                    yield mine
                finally:
                    mine.unlink(missing_ok=True)
                return
            os.utime(lock.name)
            yield self.folder / name
