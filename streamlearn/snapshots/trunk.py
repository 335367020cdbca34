"""The trunk of a snapshot, from a registry or from a folder that was pulled: names translated, nothing missing, nothing left over."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.registry import Registry
from streamlearn.learn.backbones import build
from streamlearn.snapshots.keys import recognised
from streamlearn.snapshots.pull import read_file


def load_trunk(registry: Registry, reference: str) -> nn.Module:
    """(B,3,H,W) -> (B,D) of a snapshot, verified.  Raises NotFound; Corrupt where the bytes or the tensors are not a snapshot's."""
    settings = read_settings(read_file(registry, reference, "config.json"), reference)
    return filled(settings, safetensors.torch.load(read_file(registry, reference, "model.safetensors")), reference)


def load_folder(folder: str | Path) -> nn.Module:
    """The same from a folder that `snapshots pull`, skopeo, oras or a Hub client made.  Raises ConfigError where it is none."""
    folder = Path(folder)
    try:
        settings = read_settings((folder / "config.json").read_bytes(), str(folder))
        return filled(settings, read_weights(folder / "model.safetensors"), str(folder))
    except FileNotFoundError as e:
        raise ConfigError(f"{folder}: not a snapshot's folder, it has no {Path(e.filename).name}") from None


def read_settings(data: bytes, where: str) -> dict[str, Any]:
    """config.json of a snapshot.  Raises Corrupt."""
    try:
        settings: dict[str, Any] = json.loads(data)
        (settings["streamlearn"]["backbone"], settings["streamlearn"]["stem"], settings["pretrained_cfg"]["input_size"])
    except (ValueError, KeyError, TypeError) as e:
        raise Corrupt(f"{where}: config.json is not a streamlearn snapshot's: {type(e).__name__} {e}; publish or pull it again") from e
    return settings


def norm_of(settings: Mapping[str, Any]) -> str:
    """Of the trunk: bn, unless config.json says otherwise."""
    return str(settings["streamlearn"].get("norm", "bn"))


def read_weights(path: Path) -> dict[str, Tensor]:
    """name -> tensor, mapped from the file.  Raises Corrupt."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as e:
        raise Corrupt(f"{path}: not a safetensors file: {e}; pull it again") from e


def in_pycls(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names.  Names that are not of a trunk stay as they are: a strict load says which."""
    return {(known[0] if (known := recognised(name)) else name): weight for name, weight in weights.items()}


def filled(settings: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> nn.Module:
    """A trunk with these weights, under any of the known names.  Raises Corrupt naming what is missing, left over or of another shape."""
    ours = settings["streamlearn"]
    with torch.device("meta"):  # nothing is initialised that is to be overwritten
        trunk = build(ours["backbone"], ours["stem"], norm_of(settings))
    trunk = trunk.to_empty(device="cpu")
    try:
        trunk.load_state_dict(in_pycls(weights), strict=True)
    except RuntimeError as e:
        named = f"{ours['backbone']} with {ours['stem']} stem and norm {norm_of(settings)}"
        raise Corrupt(f"{where}: model.safetensors is not a {named}: {e}") from e
    return trunk
