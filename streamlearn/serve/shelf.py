"""What is on offer: the layout's tags and snapshots as the protocols and the page want them.

What an index says is worked out once for each index (the layout hands out the same object while its file has not changed), and
what a digest says never changes, so thousands of snapshots cost no more than the few that are looked at.  All of it blocks.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.oci import INDEX, MANIFEST, TAG, Descriptor, describe
from streamlearn.contract.oci_index import SUBJECT, Index
from streamlearn.contract.registry import OciLayout
from streamlearn.serve.asked import COMMIT, VERSION
from streamlearn.serve.sending import Sender
from streamlearn.snapshots.artifact import TITLE
from streamlearn.snapshots.publish import PROBE

MOST_MANIFEST = 4 * 2**20  # bytes, as registries have it
MOST_TEXT = 2**20  # of a card or a measurement
KEPT = 20_000  # manifests and measurements in memory
MAIN = ("stable", "candidate")  # what `main` means, the first that is there
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(?:/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """Of one index."""

    index: Index
    tags: dict[str, tuple[str, ...]]  # digest -> its tags, sorted
    versions: tuple[tuple[int, str], ...]  # (step, digest), oldest first
    commits: dict[str, str]  # first 40 letters of a digest -> digest


@dataclass(frozen=True)
class File:
    name: str
    digest: str
    size: int


class Shelf:
    def __init__(self, layout: OciLayout, sender: Sender, repository: str):
        self.layout, self.sender, self.repository = layout, sender, repository
        self._contents: Contents | None = None
        self._kept: dict[tuple[str, str], Any] = {}

    def contents(self) -> Contents:
        """Raises Corrupt where there is no index that can be read."""
        index, held = self.layout.index(), self._contents
        if held is None or held.index is not index:
            self._contents = held = _contents(index)
        return held

    def digest_of(self, reference: str) -> str:
        """Of a tag or a digest.  Raises NotFound."""
        if reference.startswith("sha256:"):
            self.layout.path(reference)
            return reference
        row = self.layout.index().tagged(reference) if TAG.fullmatch(reference) else None
        if row is None:
            raise NotFound(f"no tag {reference[:128]!r}")
        return row.digest

    def named(self, revision: str) -> str:
        """What `main` stands for, else the revision itself."""
        if revision != "main":
            return revision
        return next((tag for tag in MAIN if self.layout.index().tagged(tag)), MAIN[0])

    def revision(self, revision: str) -> str:
        """The digest of a revision as Hugging Face's clients name it: main, a tag, a commit, a digest.  Raises NotFound."""
        if COMMIT.fullmatch(revision) and revision in self.contents().commits:
            return self.contents().commits[revision]
        return self.digest_of(self.named(revision))

    def read_manifest(self, digest: str) -> tuple[Descriptor, bytes, dict[str, Any]]:
        """Verified.  Raises NotFound, Corrupt."""
        data = self.sender.read(digest, MOST_MANIFEST)
        try:
            known, manifest = describe(data, digest)
        except (Corrupt, RecursionError, AttributeError) as e:
            raise NotFound(f"{digest} is no manifest") from e
        if manifest.get("schemaVersion") != 2 or manifest.get("mediaType", MANIFEST) not in (MANIFEST, INDEX):
            raise NotFound(f"{digest} is no manifest")
        return known, data, manifest

    def manifest(self, digest: str) -> dict[str, Any]:
        """The same, parsed, read once."""
        return self._once("manifest", digest, lambda: self.read_manifest(digest)[2])

    def marks(self, digest: str) -> dict[str, str]:
        found = self.manifest(digest).get("annotations")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def files(self, digest: str) -> dict[str, File]:
        """Of a snapshot, by name; names that could lead anywhere are left out."""
        layers = self.manifest(digest).get("layers")
        found = {}
        for layer in layers if isinstance(layers, list) else []:
            match layer:
                case {"digest": str(blob), "size": int(size), "annotations": {**marks}}:
                    name = marks.get(TITLE)
                    if isinstance(name, str) and FILE.fullmatch(name):
                        found[name] = File(name, blob, size)
        return found

    def text(self, digest: str, name: str) -> str:
        """A small file of a snapshot; '' where it has none.  Raises Corrupt."""
        file = self.files(digest).get(name)
        try:
            return self.sender.read(file.digest, MOST_TEXT).decode(errors="replace") if file else ""
        except NotFound:
            return ""

    def results(self, digest: str) -> list[dict[str, Any]]:
        """What was measured of a snapshot, as far as it can be read."""
        found = [self._once("result", r.digest, partial(self._result, r.digest)) for r in self.layout.referrers(digest, PROBE)]
        return [result for result in found if result]

    def _result(self, referrer: str) -> dict[str, Any]:
        try:
            layer = self.read_manifest(referrer)[2]["layers"][0]["digest"]
            value = json.loads(self.sender.read(layer, MOST_TEXT))
        except (NotFound, ValueError, KeyError, IndexError, TypeError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def _once(self, kind: str, digest: str, make: Callable[[], T]) -> T:
        key = (kind, digest)
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = make()
        found: T = self._kept[key]
        return found


def _contents(index: Index) -> Contents:
    tags: dict[str, list[str]] = {}
    versions, commits = [], {}
    for (tag, _), row in index.rows.items():
        if not row.annotations.get(SUBJECT):
            commits[row.digest[7:47]] = row.digest
        if tag:
            tags.setdefault(row.digest, []).append(tag)
        if VERSION.fullmatch(tag):
            versions.append((int(tag.split(".")[1]), row.digest))
    return Contents(index, {digest: tuple(sorted(names)) for digest, names in tags.items()}, tuple(sorted(versions)), commits)
