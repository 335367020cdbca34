"""Reading snapshots: list, show, verify, pull.  A pull is complete and verified, or an error and no folder."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.registry import Registry, sizes
from streamlearn.snapshots.package import LINEAGE, MODEL, TITLE, version
from streamlearn.snapshots.publish import results, steps


@dataclass(frozen=True)
class Listed:
    """One line of `snapshots list`."""

    step: int
    tags: tuple[str, ...]
    digest: str
    created: str
    bytes: int
    results: tuple[dict[str, Any], ...]


def list_snapshots(registry: Registry) -> list[Listed]:
    """All versions, oldest first."""
    names: dict[str, list[str]] = {}
    tags = registry.tags()
    for tag, known in tags.items():
        names.setdefault(known.digest, []).append(tag)
    found = []
    for step in steps(registry):
        descriptor = tags.get(version(step))
        if descriptor is None:  # came while we looked
            continue
        _, manifest = registry.manifest(descriptor.digest)
        created = manifest.get("annotations", {}).get("org.opencontainers.image.created", "")
        measured = tuple(results(registry, descriptor.digest))
        found.append(Listed(step, tuple(sorted(names[descriptor.digest])), descriptor.digest, created, sizes(manifest), measured))
    return found


def show(registry: Registry, reference: str) -> dict[str, Any]:
    """Everything that is known of one snapshot."""
    descriptor, manifest = registry.manifest(reference)
    return {
        "digest": descriptor.digest,
        "tags": sorted(tag for tag, d in registry.tags().items() if d.digest == descriptor.digest),
        "files": {layer["annotations"][TITLE]: {"digest": layer["digest"], "size": layer["size"]} for layer in manifest["layers"]},
        "lineage": {k.removeprefix(LINEAGE): v for k, v in manifest.get("annotations", {}).items() if k.startswith(LINEAGE)},
        "metrics": json.loads(read_file(registry, reference, "metrics.json")),
        "results": results(registry, descriptor.digest),
    }


def read_file(registry: Registry, reference: str, name: str) -> bytes:
    """One file of a snapshot, verified."""
    _, manifest = registry.manifest(reference)
    for layer in manifest["layers"]:
        if layer.get("annotations", {}).get(TITLE) == name:
            return registry.read_blob(layer["digest"])
    raise Corrupt(f"{reference}: the snapshot has no file {name}")


def verify(registry: Registry, reference: str) -> list[str]:
    """Read every byte; what was found sound.  Raises Corrupt or NotFound naming the first damage."""
    descriptor, manifest = registry.manifest(reference)
    if manifest.get("artifactType") != MODEL:
        raise Corrupt(f"{reference}: artifactType {manifest.get('artifactType')!r} is not a snapshot's")
    checked = [f"manifest {descriptor.digest}"]
    registry.check_blob(manifest["config"]["digest"])
    for layer in manifest["layers"]:
        size = registry.check_blob(layer["digest"])
        if size != layer["size"]:
            raise Corrupt(f"{reference}: {layer['annotations'][TITLE]} has {size} bytes, the manifest says {layer['size']}")
        checked.append(f"{layer['annotations'][TITLE]} {layer['digest']} ({layer['size']} bytes)")
    return checked


def pull(registry: Registry, reference: str, folder: Path) -> list[Path]:
    """The snapshot's files in a new folder; it appears only once every file is there and verified."""
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; name a folder that does not")
    _, manifest = registry.manifest(reference)
    staged = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.tmp")
    staged.mkdir(parents=True)
    try:
        for layer in manifest["layers"]:
            name = layer["annotations"][TITLE]
            if Path(name).name != name or name in ("", ".", ".."):
                raise Corrupt(f"{reference}: file name {name!r} leads out of the folder")
            registry.copy_blob(layer["digest"], staged / name)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return sorted(folder.iterdir())
