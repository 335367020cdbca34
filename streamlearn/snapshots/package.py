"""A snapshot's files, and the artifact they are packed as.

Files: `model.safetensors`, `config.json`, `metrics.json`, `README.md`, flat as Hugging Face and timm have it.  Artifact: CNCF ModelPack
(model-spec) OCI manifest, one uncompressed layer a file, canonical JSON, times taken from the stream and never from the clock: the same
Export gives the same bytes, hence the same digest everywhere.  Lineage is in annotations, because ModelPack's config is closed.
"""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch

from streamlearn.contract.export import Export
from streamlearn.contract.registry import MANIFEST, Descriptor, Registry, canonical

MODEL = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHTS, SETTINGS, DOC = (f"application/vnd.cncf.model.{kind}.v1.raw" for kind in ("weight", "weight.config", "doc"))
TITLE, FILEPATH, FILE_META = "org.opencontainers.image.title", "org.cncf.model.filepath", "org.cncf.model.file.metadata+json"
LINEAGE = "org.streamlearn."
EPOCH = "1970-01-01T00:00:00Z"  # of a snapshot that has learnt nothing
KINDS = {"model.safetensors": WEIGHTS, "config.json": SETTINGS, "metrics.json": DOC, "README.md": DOC}
TIMM = {
    "regnety-200mf": "regnety_002",
    "regnety-400mf": "regnety_004",
    "regnety-600mf": "regnety_006",
    "regnety-800mf": "regnety_008",
}
TIMM |= {f"regnety-{gf}gf": f"regnety_{code}" for gf, code in [("1.6", "016"), ("3.2", "032"), ("4", "040"), ("6.4", "064"), ("8", "080")]}
TIMM |= {f"regnety-{gf}gf": f"regnety_{code}" for gf, code in [("12", "120"), ("16", "160"), ("32", "320"), ("64", "640"), ("128", "1280")]}
TIMM |= {"regnety-256gf": "regnety_2560"}


def version(step: int) -> str:
    """The immutable tag of a step."""
    return f"0.{step}.0"


def files(export: Export, parent: str) -> dict[str, bytes]:
    """Name -> bytes, a pure function of its arguments."""
    weights = {name: export.weights[name].contiguous() for name in sorted(export.weights)}
    settings = {
        "architecture": TIMM.get(export.backbone, export.backbone),
        "num_features": export.width,
        "num_classes": 0,
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": [3, export.size, export.size],
            "mean": list(export.mean),
            "std": list(export.std),
            "num_classes": 0,
        },
        "streamlearn": {"backbone": export.backbone, "stem": export.stem, "keys": "pycls", "config": export.config},
    }
    metrics = dict(export.metrics) | {"cursor": dict(export.cursor), "window": list(export.window), "parent": parent}
    return {
        "model.safetensors": safetensors.torch.save(weights, metadata={"format": "pt"}),
        "config.json": _pretty(settings),
        "metrics.json": _pretty(metrics),
        "README.md": card(export, parent).encode(),
    }


def pack(registry: Registry, export: Export, parent: str) -> dict[str, Any]:
    """Push the files as blobs; the manifest that binds them, not yet pushed."""
    created = export.window[1] or EPOCH
    contents = files(export, parent)
    layers = [_layer(registry.put_blob(data, KINDS[name]), name, created) for name, data in contents.items()]
    count = sum(w.numel() for name, w in export.weights.items() if not name.endswith("num_batches_tracked"))
    described = {
        "descriptor": {
            "createdAt": created,
            "family": "regnet",
            "name": export.name,
            "version": version(export.step),
            "licenses": ["Apache-2.0"],
        },
        "config": {
            "architecture": TIMM.get(export.backbone, export.backbone),
            "format": "safetensors",
            "paramSize": f"{count / 1e6:.1f}M",
            "precision": "float32",
            "capabilities": {"inputTypes": ["image"], "outputTypes": ["embedding"], "knowledgeCutoff": created},
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }
    config = registry.put_blob(canonical(described), MODEL_CONFIG)
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": MODEL,
        "config": config.to_json(),
        "layers": layers,
        "annotations": _annotations(export, parent, created),
    }


def _layer(blob: Descriptor, name: str, created: str) -> dict[str, Any]:
    meta = {"name": name, "mode": 0o644, "uid": 0, "gid": 0, "size": blob.size, "mtime": created, "typeflag": 0}
    # both names: oras reads the title, modctl and others the filepath
    marks = {TITLE: name, FILEPATH: name, FILE_META: canonical(meta).decode()}
    return Descriptor(blob.media_type, blob.digest, blob.size, annotations=marks).to_json()


def _annotations(export: Export, parent: str, created: str) -> dict[str, str]:
    marks = {
        "org.opencontainers.image.created": created,
        "org.opencontainers.image.version": version(export.step),
        "org.opencontainers.image.revision": export.revision,
        "org.opencontainers.image.licenses": "Apache-2.0",
        LINEAGE + "name": export.name,
        LINEAGE + "step": str(export.step),
        LINEAGE + "cursor": canonical(dict(export.cursor)).decode(),
        LINEAGE + "window": "/".join(export.window),
        LINEAGE + "generation": export.generation,
        LINEAGE + "parent.digest": parent,
        LINEAGE + "config.digest": export.config_digest,
    }
    return {name: value for name, value in marks.items() if value}


def _pretty(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def card(export: Export, parent: str) -> str:
    """The model card."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in sorted(export.metrics.items()))
    at = ", ".join(f"{place} up to {offset}" for place, offset in sorted(export.cursor.items())) or "nothing yet"
    return f"""---
library_name: streamlearn
tags: [self-supervised, swav, regnet, continual-learning]
license: apache-2.0
---
# {export.name} {version(export.step)}

A {export.backbone} trunk ({export.stem} stem, {export.width} features) learnt without labels by SwAV from a stream of uncurated images, at step
{export.step} of a run that goes on. The weights are an exponential moving average, with BatchNorm's statistics re-estimated on the stream.

| | |
|---|---|
| learnt from | {at} |
| images fetched | {export.window[0] or "–"} to {export.window[1] or "–"} |
| snapshot before | {parent or "none"} |
| configuration | sha256 {export.config_digest} (whole in config.json) |
{facts}

Input: RGB, {export.size} x {export.size}, scaled to 0-1, minus {list(export.mean)}, over {list(export.std)}. Output: {export.width} features (global average pool).

```python
import json, torch, safetensors.torch
from streamlearn.learn.backbones import build      # or pycls AnyNet: the keys are pycls's, only head.* is missing
trunk = build("{export.backbone}", "{export.stem}").eval()
trunk.load_state_dict(safetensors.torch.load_file("model.safetensors"))
features = trunk(torch.zeros(1, 3, {export.size}, {export.size}))
```

How well it does is measured after it is published, on labelled banks: `streamlearn snapshots show {version(export.step)}`. The images were neither selected nor
labelled by anyone; the features carry whatever the web carries. Do not use them to identify people.
"""
