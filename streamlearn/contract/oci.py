"""What OCI calls things: descriptors, manifests, digests, tags (image-spec v1.1, distribution-spec v1.1)."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.oci_index import encode

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # distribution-spec
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
CHUNK_BYTES = 2**20


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
        return cls(raw["mediaType"], raw["digest"], raw["size"], raw.get("artifactType", ""), raw.get("annotations") or {})


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one JSON of a value: the same content has the same digest everywhere."""
    return encode(value)


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """Raises Corrupt naming `where`."""
    try:
        manifest = json.loads(data)
    except ValueError as e:
        raise Corrupt(f"{where}: not a manifest: {e}") from e
    if not isinstance(manifest, dict):
        raise Corrupt(f"{where}: not a manifest: {type(manifest).__name__} where an object should be")
    return manifest


def describe(data: bytes, where: str) -> tuple[Descriptor, dict[str, Any]]:
    """What lists say of a manifest: a referrer's carries its annotations.  Raises Corrupt."""
    manifest = parse_manifest(data, where)
    marks = manifest.get("annotations") or {} if manifest.get("subject") else {}
    kind = manifest.get("artifactType") or (manifest.get("config") or {}).get("mediaType", "")  # as distribution-spec has it
    return Descriptor(manifest.get("mediaType", MANIFEST), digest_of(data), len(data), kind, marks), manifest


def parts(manifest: Mapping[str, Any]) -> list[str]:
    """Digests that a manifest or an index needs: not its subject, which may come later."""
    listed = [manifest.get("config"), *(manifest.get("layers") or []), *(manifest.get("manifests") or [])]
    return [part["digest"] for part in listed if part]


def check_tag(tag: str) -> None:
    if not TAG.fullmatch(tag):
        raise ConfigError(f"tag {tag!r}: letters, digits, '.', '_' and '-' only, at most 128, not beginning with '.' or '-'")


def referring(subject: Descriptor, artifact_type: str, config: Descriptor, layer: Descriptor, marks: Mapping[str, str]) -> dict[str, Any]:
    """The manifest that `attach` puts."""
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size).to_json(),
        "annotations": dict(marks),
    }


def copy_hashed(source: BinaryIO, target: BinaryIO) -> tuple[str, int]:
    """(digest, size) of what was copied."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        target.write(chunk)
        size += len(chunk)
    return "sha256:" + digest.hexdigest(), size


def known_tags(names: Sequence[str]) -> str:
    return f"tags here: {', '.join(names[-5:]) or 'none'}{' …' if len(names) > 5 else ''}"


def sizes(manifest: Mapping[str, Any]) -> int:
    """Bytes of a manifest's layers."""
    layers: Sequence[Mapping[str, Any]] = manifest["layers"]
    return sum(int(layer["size"]) for layer in layers)
