"""Snapshots without weights, to be moved about; and a mover in a process of its own: python -m tests.snapshots.channels WHO WHERE SPOOL"""

import sys
from pathlib import Path

from streamlearn.contract.errors import Conflict
from streamlearn.contract.registry import EMPTY, MANIFEST, OciLayout
from streamlearn.snapshots.artifact import LINEAGE, MODEL, version
from streamlearn.snapshots.promote import promote


def snapshot(registry, step, *, tag=True, text="", generation=""):
    """A snapshot's manifest with one small file; its digest."""
    config, layer = registry.put_blob(b"{}", EMPTY), registry.put_blob(f"weights of {step}{text}".encode(), EMPTY)
    manifest = {
        "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": MODEL, "config": config.to_json(),
        "layers": [layer.to_json() | {"annotations": {"org.opencontainers.image.title": "model.safetensors"}}],
        "annotations": {LINEAGE + "step": str(step)} | ({LINEAGE + "generation": generation} if generation else {}),
    }  # fmt: skip
    return registry.put_manifest(manifest, tag=version(step) if tag else "").digest


if __name__ == "__main__":
    who, where, spool = sys.argv[1:]
    if where.startswith("oci://"):
        from tests.adapters.oci import remote

        registry = remote(where.split("/")[2], Path(spool), registry=where)
    else:
        registry = OciLayout(Path(where))
    print("ready", flush=True)
    for line in sys.stdin:  # a race a line
        reference, expect = line.split()
        try:
            print("moved", promote(registry, "stable", reference, by=who, why="race", expect=expect).number, flush=True)
        except Conflict as e:
            print("conflict", e, flush=True)
