"""Publishing a snapshot, and recording what was measured of it.

  1. blobs      files and ModelPack config, content-addressed
  2. manifest   with its immutable version tag `0.<step>.0`, one replacement of the index
  3. tag        `candidate` moves to it                                        <- THE COMMIT POINT for followers of the channel

Killed after   what is left                              who mends it
  1            blobs that no manifest names              nobody needs to; they are found again when the same step is published
  2            a whole, versioned snapshot; `candidate` still points to the one before
                                                         the learner publishes the step again when it comes back: same bytes, same digest
  3            nothing

A version tag is never moved.  If the step is already published with other bytes (a GPU run whose repetition differs in the last bit),
the published one stands.  `candidate` never moves back to an earlier step.
"""

import json
from typing import Any

from streamlearn.contract.errors import Conflict, NotFound
from streamlearn.contract.export import Export
from streamlearn.contract.registry import Descriptor, Registry, canonical
from streamlearn.snapshots.package import LINEAGE, pack, version

CANDIDATE = "candidate"
PROBE = "application/vnd.streamlearn.probe.v1+json"


def publish(registry: Registry, export: Export) -> tuple[str, str]:
    """(tag, digest) of the published snapshot."""
    tag = version(export.step)
    manifest = pack(registry, export, _parent(registry, export.step))
    try:
        digest = registry.put_manifest(manifest, tag=tag, expect="").digest
    except Conflict:
        digest = registry.manifest(tag)[0].digest  # published before a crash
    held = registry.find(CANDIDATE)
    if held is None or step_of(registry, held.digest) < export.step:
        registry.tag(digest, CANDIDATE, expect=held.digest if held else "")
    return tag, digest


def step_of(registry: Registry, digest: str) -> int:
    return int(registry.manifest(digest)[1].get("annotations", {}).get(LINEAGE + "step", -1))


def versions(registry: Registry) -> dict[int, Descriptor]:
    """Step -> its snapshot, in order of steps.  Behind a network a request a snapshot: not for loops."""
    return {step: descriptor for step in steps(registry) if (descriptor := registry.find(version(step)))}


def steps(registry: Registry) -> list[int]:
    """Of all versions, sorted."""
    parts = (tag.split(".") for tag in registry.names())
    return sorted(int(p[1]) for p in parts if len(p) == 3 and p[0] == "0" and p[2] == "0" and p[1].isdigit())


def record_result(registry: Registry, digest: str, result: dict[str, Any]) -> None:
    """Attach one measurement to a snapshot.  At most one for each (bank digest, protocol): a second is not recorded."""
    if has_result(registry, digest, result["bank_digest"], result["protocol"]):
        return
    subject, _ = registry.manifest(digest)
    marks = {LINEAGE + "bank": result["bank_digest"], LINEAGE + "protocol": result["protocol"]}
    registry.attach(subject, PROBE, canonical(result), marks)


def has_result(registry: Registry, digest: str, bank_digest: str, protocol: str) -> bool:
    marks = {LINEAGE + "bank": bank_digest, LINEAGE + "protocol": protocol}
    return any(marks.items() <= dict(r.annotations).items() for r in registry.referrers(digest, PROBE))


def results(registry: Registry, digest: str) -> list[dict[str, Any]]:
    """What was measured of a snapshot."""
    found = []
    for referrer in registry.referrers(digest, PROBE):
        _, manifest = registry.manifest(referrer.digest)
        if len(manifest["layers"]) != 1:
            raise NotFound(f"{referrer.digest}: a probe result has one layer, this has {len(manifest['layers'])}")
        found.append(json.loads(registry.read_blob(manifest["layers"][0]["digest"])))
    return found


def _parent(registry: Registry, step: int) -> str:
    """The digest of the newest snapshot before `step`: the same before and after a crash."""
    before = [s for s in steps(registry) if s < step]
    newest = registry.find(version(before[-1])) if before else None
    return newest.digest if newest else ""
