"""The registry of snapshots: content-addressed blobs, manifests, tags that move in one step.

Any OCI registry when deployed (adapters/oci_registry.py); an OCI image layout folder (image-spec v1.1), the default, below.  skopeo, oras
and zot read it as it is.

Writing, for whoever publishes:  1 blobs -> 2 manifest blob -> 3 index.json with the tag        <- THE COMMIT POINT is the index

Killed after   what is left                                             who mends it
  1, 2         blobs that no manifest of the index names, or a hidden   nobody needs to: they are found again when the same is pushed
               `.….tmp` beside them                                     again; the collection (registry_gc.py) removes them after a day
  3            nothing

index.json is replaced whole, under `.lock`, so readers see the tags before or after, never between, and two who write lose nothing.
Whoever writes holds `.sweep.lock` shared and a collection holds it alone: a blob is either found and made young again, or swept and
missed, and a manifest with a blob missing is refused.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from streamlearn.contract import durable
from streamlearn.contract.errors import Conflict, Corrupt, NotFound
from streamlearn.contract.oci import (
    CHUNK_BYTES,
    DIGEST,
    EMPTY,
    INDEX,
    MANIFEST,
    Descriptor,
    canonical,
    check_tag,
    copy_hashed,
    describe,
    digest_of,
    known_tags,
    parts,
    referring,
    sizes,
)
from streamlearn.contract.oci_index import REF_NAME, SUBJECT, Index, Row

__all__ = ["ANY", "EMPTY", "MANIFEST", "Descriptor", "OciLayout", "Registry", "canonical", "digest_of", "sizes"]

ANY = "*"  # for `expect`: wherever the tag points now


class Registry(Protocol):
    """One repository.  Every call may raise Retryable where it lies behind a network."""

    def put_blob(self, data: bytes, media_type: str) -> Descriptor:
        """Store content under its digest.  Storing it again is harmless."""

    def put_file(self, path: Path, media_type: str) -> Descriptor:
        """As put_blob, streamed: memory does not grow with the file."""

    def has_blob(self, digest: str) -> bool: ...

    def read_blob(self, digest: str) -> bytes:
        """Verified content.  Raises NotFound, Corrupt."""

    def copy_blob(self, digest: str, path: Path) -> None:
        """Verified content, streamed to a file."""

    def check_blob(self, digest: str) -> int:
        """Read it all, streamed, and say its size.  Raises NotFound, Corrupt."""

    def put_manifest(self, manifest: Mapping[str, Any] | bytes, *, tag: str = "", expect: str = ANY) -> Descriptor:
        """Store a manifest whose blobs are all there, and move `tag` to it in the same step.

        Bytes are stored as they are, so a copy keeps its digest.  One with a `subject` is found by `referrers`.
        """

    def tag(self, digest: str, tag: str, *, expect: str = ANY) -> None:
        """Move a tag.  `expect`: the digest it must point to now, '' for none; raises Conflict naming the holder."""

    def untag(self, tag: str, *, expect: str = ANY) -> None:
        """Take a tag away, and nothing else.  Taking it away twice is harmless."""

    def names(self) -> list[str]:
        """All tags, sorted."""

    def find(self, tag: str) -> Descriptor | None:
        """Where a tag points now."""

    def tags(self) -> dict[str, Descriptor]:
        """All of `names` with `find` of each: behind a network a request a tag, so not for loops."""

    def read_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """Of a tag or a digest, byte for byte.  Raises NotFound, Corrupt."""

    def manifest(self, reference: str) -> tuple[Descriptor, dict[str, Any]]:
        """The same, parsed."""

    def referrers(self, digest: str, artifact_type: str = "") -> list[Descriptor]:
        """Manifests whose subject it is, with their annotations."""

    def attach(self, subject: Descriptor, artifact_type: str, payload: bytes, annotations: Mapping[str, str]) -> Descriptor:
        """A manifest with one layer that refers to `subject`; the same payload again is the same manifest."""


class OciLayout:
    """The embedded registry: one repository in one folder."""

    def __init__(self, root: Path):
        self.root, self._blobs = root, root / "blobs" / "sha256"
        self._parsed: tuple[tuple[int, int, int], Index] | None = None  # (inode, mtime, size) -> index
        self._subjects: dict[str, str] = {}  # of manifests whose entry does not say, by digest
        layout = root / "oci-layout"
        if not layout.exists():
            self._blobs.mkdir(parents=True, exist_ok=True)
            durable.create(root / "index.json", canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}))
            durable.create(layout, canonical({"imageLayoutVersion": "1.0.0"}))
        try:
            version = json.loads(layout.read_bytes())["imageLayoutVersion"]
        except (ValueError, KeyError, TypeError) as e:
            raise Corrupt(f'{layout}: not an OCI layout ({e}); it must hold {{"imageLayoutVersion":"1.0.0"}}') from e
        if version != "1.0.0":
            raise Corrupt(f"{layout}: imageLayoutVersion {version!r} is not known here, only 1.0.0")

    def put_blob(self, data: bytes, media_type: str) -> Descriptor:
        digest = digest_of(data)
        path = self.path(digest)
        with self.locked(".sweep.lock", fcntl.LOCK_SH):
            if not self._renewed(path, len(data)):
                durable.write(path, data)
                path.chmod(0o644)  # other users pull too
        return Descriptor(media_type, digest, len(data))

    def put_file(self, path: Path, media_type: str) -> Descriptor:
        staged = self._blobs / f".{os.urandom(8).hex()}.tmp"
        try:
            with path.open("rb") as source, staged.open("wb") as target:
                digest, size = copy_hashed(source, target)
            staged.chmod(0o644)
            with self.locked(".sweep.lock", fcntl.LOCK_SH):
                if not self._renewed(self.path(digest), size):
                    durable.publish(staged, self.path(digest))
        except OSError as e:
            raise durable.translate(e, staged) from e
        finally:
            staged.unlink(missing_ok=True)
        return Descriptor(media_type, digest, size)

    def has_blob(self, digest: str) -> bool:
        return self.path(digest).exists()

    def read_blob(self, digest: str) -> bytes:
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{self.root}: no blob {digest}") from None
        self._verify(digest, digest_of(data), len(data))
        return data

    def copy_blob(self, digest: str, path: Path) -> None:
        try:
            self.check_blob(digest)
            with self.path(digest).open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
        except OSError as e:
            raise durable.translate(e, path) from e

    def check_blob(self, digest: str) -> int:
        try:
            with self.path(digest).open("rb") as source:
                found = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
                self._verify(digest, found, source.tell())
                return source.tell()
        except FileNotFoundError:
            raise NotFound(f"{self.root}: no blob {digest}") from None

    def put_manifest(self, manifest: Mapping[str, Any] | bytes, *, tag: str = "", expect: str = ANY) -> Descriptor:
        data = manifest if isinstance(manifest, bytes) else canonical(manifest)
        known, parsed = describe(data, f"{self.root}: the manifest to put")
        self._complete(parsed)
        self.put_blob(data, known.media_type)
        self._list(known, parsed, tag, expect)
        return known

    def tag(self, digest: str, tag: str, *, expect: str = ANY) -> None:
        check_tag(tag)
        known, manifest = describe(self.read_manifest(digest)[1], str(self.path(digest)))
        self._list(known, manifest, tag, expect)

    def untag(self, tag: str, *, expect: str = ANY) -> None:
        with self._changing() as index:
            held = self._expected(index, tag, expect)
            if held is not None:
                self.replace_index(self._leaving(index.without([(tag, "")]), held))

    def names(self) -> list[str]:
        return self.index().names()

    def find(self, tag: str) -> Descriptor | None:
        row = self.index().tagged(tag)
        return None if row is None else _described(row)

    def tags(self) -> dict[str, Descriptor]:
        rows = self.index().rows
        return {name: _described(row) for (name, _), row in rows.items() if name}

    def read_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        digest = self._resolved(reference)
        data = self.read_blob(digest)
        return describe(data, str(self.path(digest)))[0], data

    def manifest(self, reference: str) -> tuple[Descriptor, dict[str, Any]]:
        digest = self._resolved(reference)
        return describe(self.read_blob(digest), str(self.path(digest)))

    def referrers(self, digest: str, artifact_type: str = "") -> list[Descriptor]:
        index = self.index()
        rows = [index.rows[key] for key in index.referring(self.subject_of).get(digest, ())]
        found = {row.digest: row for row in rows if artifact_type in ("", row.entry.get("artifactType"))}
        return [self._referrer(row) for row in found.values()]

    def attach(self, subject: Descriptor, artifact_type: str, payload: bytes, annotations: Mapping[str, str]) -> Descriptor:
        config, layer = self.put_blob(b"{}", EMPTY), self.put_blob(payload, "application/json")
        return self.put_manifest(referring(subject, artifact_type, config, layer, annotations))

    # --- what the collection (registry_gc.py) uses too ---

    def path(self, digest: str) -> Path:
        """Of a blob's file.  Raises NotFound where it is no digest."""
        if not DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r}: not a sha256 digest")
        return self._blobs / digest[7:]

    def index(self) -> Index:
        """index.json as it is now.  Raises Corrupt."""
        path = self.root / "index.json"
        try:
            stat = path.stat()
            mark = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            parsed = self._parsed
            if parsed is None or parsed[0] != mark:
                self._parsed = parsed = (mark, Index.parse(path.read_bytes()))
        except FileNotFoundError:
            raise Corrupt(f"{path}: missing; restore it from a backup (the blobs are still there)") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise Corrupt(f"{path}: not an OCI index: {e}; restore it from a backup (the blobs are still there)") from e
        return parsed[1]

    def replace_index(self, index: Index) -> None:
        """Whole, by who holds the lock."""
        path = self.root / "index.json"
        self._parsed = None
        durable.write(path, index.encoded())
        stat = path.stat()
        self._parsed = ((stat.st_ino, stat.st_mtime_ns, stat.st_size), index)

    def subject_of(self, row: Row) -> str:
        """What a manifest refers to, where its entry does not say; '' for nothing.  Raises Corrupt."""
        if row.digest not in self._subjects:
            subject = ""
            if row.entry.get("mediaType") in (MANIFEST, INDEX) and self.has_blob(row.digest):
                subject = (self.manifest(row.digest)[1].get("subject") or {}).get("digest", "")
            self._subjects[row.digest] = subject
        return self._subjects[row.digest]

    @contextmanager
    def locked(self, name: str, how: int) -> Iterator[None]:
        with (self.root / name).open("a") as lock:
            fcntl.flock(lock, how)
            yield

    # --- its own ---

    @contextmanager
    def _changing(self) -> Iterator[Index]:
        with self.locked(".sweep.lock", fcntl.LOCK_SH), self.locked(".lock", fcntl.LOCK_EX):
            yield self.index()

    def _list(self, known: Descriptor, manifest: Mapping[str, Any], tag: str, expect: str) -> None:
        subject = (manifest.get("subject") or {}).get("digest", "")
        marks = dict(known.annotations) | {SUBJECT: subject} | ({REF_NAME: tag} if tag else {})
        entry = Descriptor(known.media_type, known.digest, known.size, known.artifact_type, marks).to_json()
        with self._changing() as index:
            self._complete(manifest)
            held = self._expected(index, tag, expect) if tag else None
            if not self.has_blob(known.digest):
                raise NotFound(f"{self.root}: no blob {known.digest}")
            if (held is not None and held.entry == entry) or (not tag and index.lists(known.digest)):
                return
            index = index.put(entry)
            self.replace_index(index if held is None else self._leaving(index, held))

    def _resolved(self, reference: str) -> str:
        if reference.startswith("sha256:"):
            return reference
        row = self.index().tagged(reference)
        if row is None:
            raise NotFound(f"{self.root}: no tag {reference!r}; {known_tags(self.names())}")
        return row.digest

    def _expected(self, index: Index, tag: str, expect: str) -> Row | None:
        check_tag(tag)
        row = index.tagged(tag)
        held = row.digest if row else ""
        if expect not in (ANY, held):
            raise Conflict(f"{self.root}: tag {tag} points to {held or 'nothing'}, not {expect or 'nothing'}: someone else moved it")
        return row

    def _leaving(self, index: Index, held: Row) -> Index:
        """What loses its last tag stays listed and is young again: who is pulling it has the collection's grace."""
        if index.lists(held.digest):
            return index
        if self.has_blob(held.digest):
            os.utime(self.path(held.digest))
        marks = {k: v for k, v in held.annotations.items() if k != REF_NAME}
        return index.put({**held.entry, "annotations": marks})

    def _complete(self, manifest: Mapping[str, Any]) -> None:
        for digest in parts(manifest):
            if not self.has_blob(digest):
                raise NotFound(f"{self.root}: the manifest names blob {digest}, which is not there; push it first")

    def _renewed(self, path: Path, size: int) -> bool:
        """It is there already, and from now on young."""
        try:
            if path.stat().st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _referrer(self, row: Row) -> Descriptor:
        if SUBJECT not in row.annotations:
            return self.read_manifest(row.digest)[0]
        return _described(row)

    def _verify(self, digest: str, found: str, size: int) -> None:
        if found != digest:
            raise Corrupt(
                f"{self.path(digest)}: {size} bytes with digest {found[:19]}…: damaged; delete the file and publish or pull again"
            )


def _described(row: Row) -> Descriptor:
    marks = {k: v for k, v in row.annotations.items() if k not in (SUBJECT, REF_NAME)}
    return Descriptor.from_json({**row.entry, "annotations": marks})
