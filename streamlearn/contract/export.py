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
    notes: Mapping[str, str] = field(default_factory=dict)
