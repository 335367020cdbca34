"""What the learner hands to whoever publishes: plain values and tensors, nothing of the learner's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Export:
    """One model at one step.  The same state gives the same Export, so publishing after a crash gives the same digest."""

    name: str
    step: int
    weights: Mapping[str, Any]  # name -> tensor: the trunk, averaged and calibrated, pycls's names
    backbone: str
    stem: str
    width: int  # of the features
    size: int  # px, of the global crops
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    metrics: Mapping[str, Any]
    cursor: Mapping[str, int]  # topic/partition -> offset
    window: tuple[str, str]  # first and last fetch of what was learnt, RFC 3339
    generation: str
    config: Mapping[str, Any]
    config_digest: str
    revision: str = ""  # of the code
    source: str = ""  # URL of the code
    license: str = "Apache-2.0"  # of the weights, as SPDX has it
    norm: str = "bn"  # of the trunk: bn or gn_ws
    notes: Mapping[str, str] = field(default_factory=dict)  # further lineage, such as `init`: what the weights began as


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The other way: what a run begins as, under the learner's names."""

    source: str  # file name, or the snapshot's tag and step
    digest: str  # sha256 of the file, or of the snapshot's manifest
    layout: str  # whose names it had
    trunk: Mapping[str, Any]  # pycls's name -> tensor
    head: Mapping[str, Any] = field(default_factory=dict)  # name in the projection head -> tensor
    prototypes: Any = None  # (K,D)
    left: tuple[str, ...] = ()  # names that are neither


def is_path(init: str) -> bool:
    """Whether `train.init` names a file or folder, rather than a tag or a digest of the home's registry."""
    return "/" in init or init.endswith((".torch", ".pth", ".pt", ".pyth", ".pkl", ".bin", ".ckpt", ".safetensors"))
