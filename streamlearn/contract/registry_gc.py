"""Collecting an OCI layout's garbage: mark and sweep.

Kept: what a tag points to; what refers to something kept, through `subject`, at any distance; what those need (config, layers, the
manifests of an index, a subject); and everything young: an untagged manifest, a blob or a staged file that was made, or was found there
by a push, less than `grace_s` ago.  A push that takes longer than the grace is refused at its manifest and pushes its blobs again.

  1. mark, beside the others' work
  2. take the lock that every writer shares; mark what has come since
  3. index.json without the manifests that are dropped         <- THE COMMIT POINT
  4. unlink

Killed after   what is left                                who mends it
  1, 2         nothing has changed
  3, 4         blobs that no manifest of the index names   the next collection

A manifest that cannot be read leaves unknown what it needs: then nothing is dropped, and Corrupt names its file.
"""

import fcntl
import os
import time
from dataclasses import dataclass

from streamlearn.contract.errors import Corrupt
from streamlearn.contract.oci import INDEX, MANIFEST, parts
from streamlearn.contract.oci_index import Index
from streamlearn.contract.registry import OciLayout

DAY_S = 86_400.0
Part = tuple[str, str]  # digest, media type where it matters
MANIFESTS = {
    MANIFEST,
    INDEX,
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}


@dataclass(frozen=True)
class Collected:
    """What was dropped."""

    manifests: int  # entries of the index
    files: int
    bytes: int


def collect(layout: OciLayout, *, grace_s: float = DAY_S, now: float | None = None) -> Collected:
    """Drop what nobody can want any more.  `now`: seconds since 1970, the clock's if not given.  Raises Corrupt, and has dropped nothing then."""
    before = (time.time() if now is None else now) - grace_s
    needs: dict[str, list[Part]] = {}
    _Mark(layout, layout.index(), before, needs)
    with layout.locked(".sweep.lock", fcntl.LOCK_EX):
        index = layout.index()
        live = _Mark(layout, index, before, needs).live
        dead = [key for key, row in index.rows.items() if row.digest not in live]
        if dead:
            layout.replace_index(index.without(dead))
        files, size = _sweep(layout, live, before)
    return Collected(len(dead), files, size)


class _Mark:
    """`live`: every digest to keep.  `needs`: of manifests read before, so that a second mark reads only what is new."""

    def __init__(self, layout: OciLayout, index: Index, before: float, needs: dict[str, list[Part]]):
        self.layout, self.rows, self.needs = layout, index.rows, needs
        self.referring = index.referring(layout.subject_of)
        self.seen: set[Part] = set()
        roots = [row for (name, _), row in self.rows.items() if name or _modified(layout, row.digest) >= before]
        self._from([(row.digest, str(row.entry.get("mediaType"))) for row in roots])

    @property
    def live(self) -> set[str]:
        return {digest for digest, _ in self.seen}

    def _from(self, todo: list[Part]) -> None:
        while todo:
            digest, kind = todo.pop()
            if (digest, kind) in self.seen:
                continue
            self.seen.add((digest, kind))
            if kind in MANIFESTS:
                todo += self._needed(digest)
            referrers = [self.rows[key] for key in self.referring.get(digest, ())]
            todo += [(row.digest, str(row.entry.get("mediaType"))) for row in referrers]

    def _needed(self, digest: str) -> list[Part]:
        if digest not in self.needs:
            self.needs[digest] = self._read(digest)
        return self.needs[digest]

    def _read(self, digest: str) -> list[Part]:
        if not self.layout.has_blob(digest):
            if any(row.digest == digest for row in self.rows.values()):
                raise Corrupt(f"{self.layout.path(digest)}: missing, and the index names it; pull it again, or take its tag away")
            return []  # of a subject that is to come, or a platform that was not copied
        manifest = self.layout.manifest(digest)[1]
        nested = [manifest["subject"]] if manifest.get("subject") else []
        nested += manifest.get("manifests") or []
        return [(part["digest"], part.get("mediaType", "")) for part in nested] + [(needed, "") for needed in parts(manifest)]


def _sweep(layout: OciLayout, live: set[str], before: float) -> tuple[int, int]:
    files = size = 0
    with os.scandir(layout.root / "blobs" / "sha256") as entries:
        for entry in entries:
            stat = entry.stat()
            if f"sha256:{entry.name}" not in live and stat.st_mtime < before:
                os.unlink(entry.path)  # noqa: PTH108  scandir has the path already
                files, size = files + 1, size + stat.st_size
    return files, size


def _modified(layout: OciLayout, digest: str) -> float:
    try:
        return layout.path(digest).stat().st_mtime
    except FileNotFoundError:
        return 0.0
