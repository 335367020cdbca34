"""What a run begins as instead of random weights: a checkpoint of others, a file of weights, or a snapshot.

Read without running anything: safetensors, or torch.load with weights_only.  A file whose pickle names any other function or class is refused
with that name, since to load it is to run it.  Layouts, found by what is in them:

    VISSL         classy_state_dict/base_model/model/{trunk,heads}: the public SEER checkpoints; consolidated only, not shards or slices
    converted     model_state_dict, state_dict, model or model_state (pycls) around the names, or nothing around them
    safetensors   timm's names, pycls's or VISSL's; a snapshot's folder likewise

Names are recognised one by one (snapshots/keys.py); whatever wraps them (module., trunk., _feature_blocks., FSDP's) is taken off.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from streamlearn.contract.errors import ConfigError, NotFound
from streamlearn.contract.export import WarmStart, is_path
from streamlearn.contract.registry import Registry
from streamlearn.snapshots.keys import recognised
from streamlearn.snapshots.publish import step_of
from streamlearn.snapshots.trunk import read_weights

AROUND = ("classy_state_dict", "base_model", "model_state_dict", "state_dict", "model", "model_state")  # the outermost first
HEAD = re.compile(r"(?:heads\.)?0\.projection_head\.(?P<rest>\d+\.\w+)")
PROTOTYPES = re.compile(r"(?:heads\.)?0\.prototypes0\.weight")
REMEDY = "convert it where you trust it: torch.save({name: tensor, …}) or safetensors"


def read(init: str, registry: Registry) -> WarmStart:
    """The weights that `train.init` names.  Raises ConfigError, naming key, file and remedy; Corrupt."""
    if is_path(init):
        return from_file(Path(init))
    try:
        descriptor, manifest = registry.manifest(init)
    except NotFound as e:
        raise ConfigError(f"train.init = {init!r}: {e}; a path has a slash: ./{init}") from e
    layer = next(layer for layer in manifest["layers"] if layer["mediaType"].endswith("weight.v1.raw"))
    content = safetensors.torch.load(registry.read_blob(layer["digest"]))
    return _sorted(content, f"{init} of step {step_of(registry, descriptor.digest)}", descriptor.digest)


def from_file(path: Path) -> WarmStart:
    """A checkpoint, or a folder with model.safetensors."""
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"train.init = {str(path)!r}: no such file")
    with path.open("rb") as f:
        digest = "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()
    content = read_weights(path) if path.suffix == ".safetensors" else _unpickled(path)
    return _sorted(content, path.name, digest)


def _unpickled(path: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        # torch's own text advises to load it all the same; only the name in it is passed on
        named = re.search(r"GLOBAL (\S+)", str(e))
        what = f"its pickle calls {named[1]}, which could do anything" if named else "its pickle is more than tensors and plain values"
        raise ConfigError(f"train.init = {str(path)!r}: refused: {what}; {REMEDY}") from e
    except (RuntimeError, EOFError, ValueError) as e:
        reason = (str(e) or "it ends too early").splitlines()[0]
        raise ConfigError(f"train.init = {str(path)!r}: not a checkpoint that torch can read: {reason}; fetch it again") from e
    if not isinstance(content, Mapping):
        raise ConfigError(f"train.init = {str(path)!r}: holds a {type(content).__name__}, not a state dict; {REMEDY}")
    return content


def _sorted(content: Mapping[str, Any], source: str, digest: str) -> WarmStart:
    """Each tensor to its place: trunk, head, prototypes, or left over."""
    kind = content.get("type", "consolidated")
    if kind != "consolidated" and not isinstance(kind, Tensor):
        raise ConfigError(
            f"train.init = {source!r}: a VISSL checkpoint of type {kind!r}: consolidate it first "
            "(VISSL's extra_scripts/convert_sharded_checkpoint.py), and name the one file"
        )
    trunk: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    left, layouts, prototypes = [], set(), None
    for name, tensor in _tensors(_unwrapped(content)):
        if known := recognised(name):
            if known[0] in trunk:
                raise ConfigError(
                    f"train.init = {source!r}: two tensors are {known[0]}, one of them {name}; leave only one model in the file"
                )
            trunk[known[0]] = tensor
            layouts |= {known[1]} - {""}
        elif at := HEAD.fullmatch(name):
            head[at["rest"]] = tensor
        elif PROTOTYPES.fullmatch(name):
            prototypes = tensor
        else:
            left.append(name)
    if not layouts:
        some = ", ".join(left[:3]) or "no tensor at all"
        raise ConfigError(
            f"train.init = {source!r}: no RegNet under names of VISSL, timm or pycls; it holds {some}{' …' if len(left) > 3 else ''}"
        )
    return WarmStart(
        source=source, digest=digest, layout="+".join(sorted(layouts)), trunk=trunk, head=head, prototypes=prototypes, left=tuple(left)
    )


def _unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in AROUND:
        inner = content.get(key)
        if isinstance(inner, Mapping):
            content = inner
    return content


def _tensors(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) for every tensor inside: VISSL keeps trunk and heads apart."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")
