"""The registry of snapshots: content-addressed blobs, manifests, tags that move in one step.

Any OCI registry when deployed; an OCI image layout folder (image-spec v1.1), the default, below.  skopeo, oras and zot read it as it is.

Writing, for whoever publishes:  blobs -> manifest blob -> index.json with the tag        <- THE COMMIT POINT is the index

Killed before the index is replaced, blobs lie there that no manifest of the index names: garbage, harmless.  index.json is replaced
whole, under a lock, so readers see the tags before or after, never between.
"""

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from streamlearn.contract import durable
from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, NotFound

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"
TAG = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")  # distribution-spec
ANY = "*"  # for `expect`: wherever the tag points now


@dataclass(frozen=True)
class Descriptor:
    """A pointer to content, with its digest and size."""

    media_type: str
    digest: str  # sha256:<hex>
    size: int
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            plain["artifactType"] = self.artifact_type
        if self.annotations:
            plain["annotations"] = dict(self.annotations)
        return plain

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Descriptor":
        return cls(raw["mediaType"], raw["digest"], raw["size"], raw.get("artifactType", ""), raw.get("annotations", {}))


class Registry(Protocol):
    def put_blob(self, data: bytes, media_type: str) -> Descriptor:
        """Store content under its digest.  Storing it again is harmless."""

    def read_blob(self, digest: str) -> bytes:
        """Verified content.  Raises NotFound, Corrupt."""

    def copy_blob(self, digest: str, path: Path) -> None:
        """Verified content, streamed to a file."""

    def put_manifest(self, manifest: Mapping[str, Any], *, tag: str = "", expect: str = ANY) -> Descriptor:
        """Store a manifest whose blobs are all there, and move `tag` to it in the same step (an untagged one is still listed)."""

    def tag(self, digest: str, tag: str, *, expect: str = ANY) -> None:
        """Move a tag.  `expect`: the digest it must point to now, '' for none; raises Conflict naming the holder."""

    def tags(self) -> dict[str, Descriptor]: ...

    def manifest(self, reference: str) -> tuple[Descriptor, dict[str, Any]]:
        """Of a tag or a digest.  Raises NotFound, Corrupt."""

    def referrers(self, digest: str, artifact_type: str = "") -> list[Descriptor]:
        """Manifests whose subject it is."""


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one JSON of a value: the same content has the same digest everywhere."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class OciLayout:
    """The embedded registry: one repository in one folder."""

    def __init__(self, root: Path):
        self.root = root
        self._parsed: tuple[tuple[int, int], dict[str, Any]] | None = None  # (mtime, size) -> index
        layout = root / "oci-layout"
        if not layout.exists():
            (root / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
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
        path = self._blob(digest)
        if not path.exists() or path.stat().st_size != len(data):
            durable.write(path, data)
            path.chmod(0o644)  # other users pull too
        return Descriptor(media_type, digest, len(data))

    def read_blob(self, digest: str) -> bytes:
        try:
            data = self._blob(digest).read_bytes()
        except FileNotFoundError:
            raise NotFound(f"{self.root}: no blob {digest}") from None
        self._verify(digest, digest_of(data), len(data))
        return data

    def copy_blob(self, digest: str, path: Path) -> None:
        try:
            with self._blob(digest).open("rb") as source:
                found = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
                self._verify(digest, found, source.tell())
                source.seek(0)
                with path.open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
        except FileNotFoundError:
            raise NotFound(f"{self.root}: no blob {digest}") from None
        except OSError as e:
            raise durable.translate(e, path) from e

    def put_manifest(self, manifest: Mapping[str, Any], *, tag: str = "", expect: str = ANY) -> Descriptor:
        for part in [manifest["config"], *manifest["layers"]]:
            if not self._blob(part["digest"]).exists():
                raise NotFound(f"{self.root}: the manifest names blob {part['digest']}, which is not there; push it first")
        blob = self.put_blob(canonical(manifest), MANIFEST)
        known = Descriptor(MANIFEST, blob.digest, blob.size, manifest.get("artifactType", ""))
        with self._changing() as entries:
            if tag:
                self._move(entries, known, tag, expect)
            elif not any(e["digest"] == known.digest for e in entries):
                entries.append(known.to_json())
        return known

    def tag(self, digest: str, tag: str, *, expect: str = ANY) -> None:
        known, manifest = self.manifest(digest)
        known = Descriptor(MANIFEST, known.digest, known.size, manifest.get("artifactType", ""))
        with self._changing() as entries:
            self._move(entries, known, tag, expect)

    def tags(self) -> dict[str, Descriptor]:
        named = ((e.get("annotations", {}).get(REF_NAME), e) for e in self._index()["manifests"])
        return {name: Descriptor.from_json(e) for name, e in named if name}

    def manifest(self, reference: str) -> tuple[Descriptor, dict[str, Any]]:
        digest = reference
        if not reference.startswith("sha256:"):
            tags = self.tags()
            if reference not in tags:
                known = ", ".join(sorted(tags)[-5:]) or "none"
                raise NotFound(f"{self.root}: no tag {reference!r}; tags here: {known}{' …' if len(tags) > 5 else ''}")
            digest = tags[reference].digest
        data = self.read_blob(digest)
        try:
            manifest: dict[str, Any] = json.loads(data)
        except ValueError as e:
            raise Corrupt(f"{self._blob(digest)}: not a manifest: {e}") from e
        return Descriptor(MANIFEST, digest, len(data), manifest.get("artifactType", "")), manifest

    def referrers(self, digest: str, artifact_type: str = "") -> list[Descriptor]:
        found = []
        for entry in self._index()["manifests"]:
            subject = entry.get("annotations", {}).get("org.streamlearn.subject")  # kept in the index, so a listing reads one file
            if subject == digest and artifact_type in ("", entry.get("artifactType")):
                found.append(Descriptor.from_json(entry))
        return found

    def attach(self, subject: Descriptor, artifact_type: str, payload: bytes, annotations: Mapping[str, str]) -> Descriptor:
        """A manifest with one layer that refers to `subject`; the same payload again is the same manifest."""
        empty = self.put_blob(b"{}", EMPTY)
        layer = self.put_blob(payload, "application/json")
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": artifact_type,
            "config": empty.to_json(),
            "layers": [layer.to_json()],
            "subject": Descriptor(MANIFEST, subject.digest, subject.size).to_json(),
            "annotations": dict(annotations),
        }
        blob = self.put_blob(canonical(manifest), MANIFEST)
        marks = dict(annotations) | {"org.streamlearn.subject": subject.digest}
        known = Descriptor(MANIFEST, blob.digest, blob.size, artifact_type, marks)
        with self._changing() as entries:
            if not any(e["digest"] == known.digest for e in entries):
                entries.append(known.to_json())
        return known

    def _move(self, entries: list[dict[str, Any]], known: Descriptor, tag: str, expect: str) -> None:
        if not TAG.match(tag):
            raise ConfigError(f"tag {tag!r}: letters, digits, '.', '_' and '-' only, at most 128, not beginning with '.' or '-'")
        held = next((e["digest"] for e in entries if e.get("annotations", {}).get(REF_NAME) == tag), "")
        if expect not in (ANY, held):
            raise Conflict(f"{self.root}: tag {tag} points to {held or 'nothing'}, not {expect or 'nothing'}: someone else moved it")
        entries[:] = [e for e in entries if e.get("annotations", {}).get(REF_NAME) != tag]
        entries.append(Descriptor(known.media_type, known.digest, known.size, known.artifact_type, {REF_NAME: tag}).to_json())

    @contextmanager
    def _changing(self) -> Iterator[list[dict[str, Any]]]:
        """The index's entries, to be changed in place; replaced whole on leaving, under the lock."""
        with (self.root / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            index = json.loads(json.dumps(self._index()))
            before = canonical(index)
            yield index["manifests"]
            if canonical(index) != before:
                durable.write(self.root / "index.json", canonical(index))

    def _index(self) -> dict[str, Any]:
        path = self.root / "index.json"
        try:
            stat = path.stat()
            mark = (stat.st_mtime_ns, stat.st_size)
            if self._parsed is None or self._parsed[0] != mark:
                index = json.loads(path.read_bytes())
                if not isinstance(index["manifests"], list):
                    raise TypeError("manifests is not a list")
                self._parsed = (mark, index)
        except FileNotFoundError:
            raise Corrupt(f"{path}: missing; restore it from a backup (the blobs are still there)") from None
        except (ValueError, KeyError, TypeError) as e:
            raise Corrupt(f"{path}: not an OCI index: {e}; restore it from a backup (the blobs are still there)") from e
        return self._parsed[1]

    def _blob(self, digest: str) -> Path:
        algorithm, _, encoded = digest.partition(":")
        if algorithm != "sha256" or not re.fullmatch(r"[0-9a-f]{64}", encoded):
            raise NotFound(f"{digest!r}: not a sha256 digest")
        return self.root / "blobs" / algorithm / encoded

    def _verify(self, digest: str, found: str, size: int) -> None:
        if found != digest:
            raise Corrupt(
                f"{self._blob(digest)}: {size} bytes with digest {found[:19]}…: damaged; delete the file and publish or pull again"
            )


def sizes(manifest: Mapping[str, Any]) -> int:
    """Bytes of a manifest's layers."""
    layers: Sequence[Mapping[str, Any]] = manifest["layers"]
    return sum(int(layer["size"]) for layer in layers)
