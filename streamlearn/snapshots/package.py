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
from streamlearn.snapshots import keys
from streamlearn.snapshots.artifact import EPOCH, FILE_META, FILEPATH, KINDS, LINEAGE, MODEL, MODEL_CONFIG, TITLE, version
from streamlearn.snapshots.card import card

NO_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")  # BatchNorm's, which are not learnt


def architecture(export: Export) -> str:
    """timm's name where timm has the model; else one that timm refuses, rather than another network under the same weights."""
    usual = {"imagenet", "bn"}
    ours = "-".join([export.backbone, *(part for part in (export.stem, export.norm) if part not in usual)])
    return keys.timm_architecture(export.backbone, export.stem, export.norm) or ours


def files(export: Export, parent: str) -> dict[str, bytes]:
    """Name -> bytes, a pure function of its arguments.

    The weights have timm's names where timm has the model, so that timm and transformers load the folder as it is; else pycls's.
    `config.json` says which, under streamlearn.keys: "streamlearn" where the names are made as pycls's, but pycls has no such network.
    """
    layout = keys.layout(export.backbone, export.stem, export.norm)
    named = {keys.to_timm(name) if layout == "timm" else name: weight for name, weight in export.weights.items()}
    weights = {name: named[name].contiguous() for name in sorted(named)}
    settings = {
        "architecture": architecture(export),
        "num_features": export.width,
        "num_classes": 0,  # here and not in model_args: transformers passes its own beside those
        "global_pool": "avg",
        "pretrained_cfg": preprocessing(export),
        "streamlearn": {
            "backbone": export.backbone,
            "stem": export.stem,
            "keys": layout,
            "config": export.config,
        }
        | ({"norm": export.norm} if export.norm != "bn" else {}),  # absent: as it was before there was a choice
    }
    metrics = dict(export.metrics) | {"cursor": dict(export.cursor), "window": list(export.window), "parent": parent}
    return {
        "model.safetensors": safetensors.torch.save(weights, metadata={"format": "pt"}),
        "config.json": pretty(settings),
        "metrics.json": pretty(metrics),
        "README.md": card(export, parent, version(export.step)).encode(),
    }


def preprocessing(export: Export) -> dict[str, Any]:
    """timm's account of the input: what the probes feed the trunk (stream.views.eval_crop)."""
    return {
        "input_size": [3, export.size, export.size],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0 if export.size <= 64 else 0.875,
        "crop_mode": "center",
        "mean": list(export.mean),
        "std": list(export.std),
        "num_classes": 0,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": export.license.lower(),
    }


def pack(registry: Registry, export: Export, parent: str) -> dict[str, Any]:
    """Push the files as blobs; the manifest that binds them, not yet pushed."""
    created = export.window[1] or EPOCH
    contents = files(export, parent)
    layers = [_layer(registry.put_blob(data, KINDS[name]), name, created) for name, data in contents.items()]
    config = registry.put_blob(canonical(described(export, [layer["digest"] for layer in layers])), MODEL_CONFIG)
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": MODEL,
        "config": config.to_json(),
        "layers": layers,
        "annotations": _annotations(export, parent, created),
    }


def described(export: Export, diff_ids: list[str]) -> dict[str, Any]:
    """ModelPack's config (model-spec v1): closed at every level, so lineage goes into annotations."""
    created = export.window[1] or EPOCH
    capabilities = {"inputTypes": ["image"], "outputTypes": ["embedding"], "knowledgeCutoff": export.window[1]}
    descriptor = {
        "createdAt": created,
        "family": "regnet",
        "name": export.name,
        "version": version(export.step),
        "revision": export.revision,
        "sourceURL": export.source,
        "licenses": [export.license],
    }
    return {
        "descriptor": {name: value for name, value in descriptor.items() if value},
        "config": {
            "architecture": architecture(export),
            "format": "safetensors",
            "paramSize": scaled(sum(w.numel() for name, w in export.weights.items() if not name.endswith(NO_PARAMETERS))),
            "precision": "+".join(sorted({str(w.dtype).removeprefix("torch.") for w in export.weights.values() if w.is_floating_point()})),
            "capabilities": {name: value for name, value in capabilities.items() if value},
        },
        "modelfs": {"type": "layers", "diffIds": diff_ids},
    }


def scaled(count: int) -> str:
    """ModelPack's paramSize: at most one decimal, and a letter."""
    for letter, unit in (("B", 1e9), ("M", 1e6)):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return f"{count / 1e3:.1f}K"


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
        "org.opencontainers.image.source": export.source,
        "org.opencontainers.image.licenses": export.license,
        LINEAGE + "name": export.name,
        LINEAGE + "step": str(export.step),
        LINEAGE + "cursor": canonical(dict(export.cursor)).decode(),
        LINEAGE + "window": "/".join(export.window),
        LINEAGE + "generation": export.generation,
        LINEAGE + "parent.digest": parent,
        LINEAGE + "config.digest": export.config_digest,
    }
    marks |= {LINEAGE + name: value for name, value in export.notes.items()}
    return {name: value for name, value in marks.items() if value}


def pretty(value: Mapping[str, Any]) -> bytes:
    """JSON for people: the same value gives the same bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
