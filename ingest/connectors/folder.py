"""A watched folder of images, with its sub-folders.

The cursor is a time: files changed before it have been announced, and of the files changed at that very nanosecond, the names.  A file
counts once it has rested for a moment, so one that is still being written is not taken half.  A file that is changed later is
announced again, with its new bytes.
"""

import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from ingest.connectors.base import BATCH, Cursor, Found, LocalPath
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Section
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.status import now

REST_S = 0.5  # since the last change
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif"}


class FolderOptions(Section):
    """A watched folder of images."""

    path: LocalPath = Field(min_length=1, description="the folder; its sub-folders too")


class FolderConnector:
    Options = FolderOptions

    def __init__(self, name: str, options: FolderOptions):
        self.name, self.options, self.folder = name, options, Path(options.path)

    def check(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(f"connector {self.name}: path = {self.options.path!r}: no such folder; make it, or name another")

    def close(self) -> None:
        """Nothing is held open."""

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        self.folder = self.folder.resolve()  # a file's URL is where it really lies
        at, named = (int(cursor["mtime_ns"]), set(cursor["names"])) if cursor else (-1, set[str]())
        rested = time.time_ns() - int(REST_S * 1e9)
        found = Found()
        for mtime, name, path in self._changed(at, named, rested):
            candidate = Candidate(url=path.as_uri(), source=self.name, source_ref=name, discovered_at=now(), etag=str(mtime))
            try:
                candidate.to_json()
                found.candidates.append(candidate)
            except ValueError as e:
                found.refused.append((name, path.as_uri(), str(e)))
            at, named = (at, named | {name}) if mtime == at else (mtime, {name})
            if len(found) >= BATCH:
                found.cursor = {"mtime_ns": at, "names": sorted(named)}
                yield found
                found = Found()
        if len(found):
            found.cursor = {"mtime_ns": at, "names": sorted(named)}
            yield found

    def _changed(self, at: int, named: set[str], rested: int) -> list[tuple[int, str, Path]]:
        """Files to announce, by time of change.  Nothing younger than one that still rests, or it would be passed over."""
        files = []
        for path in self.folder.rglob("*"):
            if path.suffix.lower() in EXTENSIONS and not any(p.startswith(".") for p in path.relative_to(self.folder).parts):
                try:
                    stat = path.stat()
                except OSError:
                    continue  # removed while we looked; a link that goes round; not ours to read
                if path.is_file() and stat.st_mtime_ns <= rested:
                    files.append((stat.st_mtime_ns, path.relative_to(self.folder).as_posix(), path))
        return sorted((m, n, p) for m, n, p in files if m > at or (m == at and n not in named))
