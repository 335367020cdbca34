"""The model card: what the weights are, what they learnt from, how to load them, and what nobody knows about them.

`card` is a pure function of the Export, as all of a snapshot's files are.  Probes come after publishing, so they cannot stand in it;
`with_results` adds them to the copy that an export writes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from streamlearn.contract.export import Export
from streamlearn.snapshots.keys import timm_architecture

MEASURED = "## How well it does"
UNKNOWN = (
    "Not known when this card was written: a snapshot is measured after it is published. `streamlearn snapshots show {version}` tells, and\n"
    "`streamlearn snapshots export {version}` writes it into the card of the copy."
)


def card(export: Export, parent: str, version: str) -> str:
    """README.md of a snapshot."""
    in_timm = timm_architecture(export.backbone, export.stem, export.norm)
    averaged = "an exponential moving average" + (", with BatchNorm's statistics re-estimated on the stream" if export.norm == "bn" else "")
    norm = "" if export.norm == "bn" else "GroupNorm and standardised weights, "
    elsewhere = "VISSL, pycls, ONNX or torch.export" if export.norm == "bn" else "ONNX or torch.export"
    began = f" They began as {export.notes['init'].split()[0]}, whose own terms hold too." if "init" in export.notes else ""
    return f"""---
library_name: {"timm" if in_timm else "streamlearn"}
pipeline_tag: image-feature-extraction
tags: [self-supervised, swav, regnet, continual-learning]
license: {export.license.lower()}
---
# {export.name} {version}

A {export.backbone} trunk ({export.stem} stem, {norm}{export.width} features, no classifier), learnt without labels from a stream of images. This is
one moment of a run that goes on. The weights are {averaged}.

## Load it

{_loading(export, in_timm)}

Input: RGB, {export.size} x {export.size}, scaled to 0-1, minus {list(export.mean)}, over {list(export.std)}. Output: {export.width} features (global average pool).
For {elsewhere}: `streamlearn snapshots export {version} --to …`.

## What it learnt from

{_table(_data(export, parent))}

The images were taken as their sources gave them: no label was used, and nobody looked them over. Where each came from,
under which licence as far as its source said, and what was refused and why, is recorded image by image beside the shards, not here.

## How it learnt

{_table(_recipe(export))}

{MEASURED}

{UNKNOWN.format(version=version)}

## Licence and limits

The weights are given under {export.license}.{began} That says nothing about the images, whose rights are their owners'. The features carry whatever the web
carries, its gaps and its prejudices; nobody has looked for them. Do not use them to identify people.
"""


def with_results(text: str, results: Sequence[Mapping[str, Any]], version: str, *, library: str, loading: str) -> str:
    """The card of an exported copy: its library, how that one loads it, and what was measured of the snapshot."""
    text = re.sub(r"(?m)^library_name: .*$", f"library_name: {library}", text, count=1)
    text = re.sub(r"(?s)(## Load it\n\n).*?(\n\nInput: )", lambda m: m[1] + loading + m[2], text, count=1)
    if results:
        text = text.replace(UNKNOWN.format(version=version), measured(results))
    return text


def measured(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each bank and protocol, beside raw pixels and untrained networks of the same architecture."""
    columns = (("knn", "k-NN"), ("raw_knn", "k-NN, raw pixels"), ("random_knn", "k-NN, untrained"), ("ridge", "ridge"))
    rows = [f"| bank | protocol | {' | '.join(title for _, title in columns)} |", "|" + "---|" * (2 + len(columns))]
    for result in sorted(results, key=lambda r: (str(r.get("bank")), str(r.get("protocol")))):
        cells = [f"{result[key]:.4f}" if isinstance(result.get(key), int | float) else "–" for key, _ in columns]
        rows.append(f"| {result.get('bank', '–')} | {result.get('protocol', '–')} | {' | '.join(cells)} |")
    return "Accuracy of frozen features on labelled banks that were not learnt from, measured after publishing:\n\n" + "\n".join(rows)


def _loading(export: Export, in_timm: str) -> str:
    ours = f"""```python
import torch
from streamlearn.snapshots.trunk import load_folder
trunk = load_folder(".").eval()     # where this file lies
features = trunk(torch.zeros(1, 3, {export.size}, {export.size}))
```"""
    if export.norm != "bn":
        return ours + "\n\nNeither timm nor pycls has this network: they would compute something else from its tensors."
    if not in_timm:
        return ours + "\n\nThe tensors have the names of pycls's AnyNet; only `head.*` is missing. timm has no such model."
    return f"""```python
import timm, torch
trunk = timm.create_model("local-dir:.", pretrained=True).eval()     # where this file lies; or hf-hub:<name>
features = trunk(torch.zeros(1, 3, {export.size}, {export.size}))
```

With transformers: `AutoModel.from_pretrained(".")(images).pooler_output`. With streamlearn:

{ours}"""


def _table(facts: Mapping[str, object]) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value != ""]
    return "\n".join(["| | |", "|---|---|", *rows])


def _data(export: Export, parent: str) -> dict[str, object]:
    config, metrics = export.config, export.metrics
    sources = ", ".join(f"{c['name']} ({c['class']})" for c in config.get("connectors", ()))
    fetch = config.get("fetch", {})
    heeded = [name for key, name in (("robots", "robots.txt"), ("respect_noindex", "noindex headers")) if fetch.get(key)]
    return {
        "sources": sources,
        "opt-outs": f"over HTTP, noai and TDM headers{''.join(f', {h}' for h in heeded)} were heeded" if fetch else "",
        "images learnt": f"{metrics['images']}, of which {metrics['fresh']} for the first time" if "fresh" in metrics else "",
        "fetched": f"{export.window[0]} to {export.window[1]}" if export.window[1] else "nothing yet",
        "up to offset": ", ".join(f"{place} {offset}" for place, offset in sorted(export.cursor.items())),
        "generation": export.generation,
        "began as": export.notes.get("init", "random weights"),
        "snapshot before": parent or "none",
    }


def _recipe(export: Export) -> dict[str, object]:
    config, metrics = export.config, export.metrics
    objective, train = config.get("objective", {}), config.get("train", {})
    crops = " + ".join(f"{c['count']} x {c['size']} px" for c in config.get("stream", {}).get("crops", ()))
    rate = f"{metrics['learning_rate']:.4g} after {metrics['halvings']} halvings" if "halvings" in metrics else ""
    return {
        "objective": f"{objective['kind']}, {objective['prototypes']} prototypes" if objective else "",
        "steps": f"{export.step} of {train['batch']} images" if train else export.step,
        "views of each image": crops,
        "learning rate": rate,
        "code": export.revision,
        "configuration": f"sha256 {export.config_digest}, whole in config.json",
    } | {name: metrics[name] for name in ("code_entropy", "prototype_perplexity") if name in metrics}
