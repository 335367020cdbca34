"""Trunks: images (B,3,H,W) -> features (B,D).  `build` knows the names."""

from typing import Protocol

from torch import Tensor, nn

from streamlearn.contract.errors import ConfigError
from streamlearn.learn.backbones.regnet import REGNETY, RegNetY

__all__ = ["NORMS", "Backbone", "build", "names"]
NORMS = ("bn", "gn_ws")


class Backbone(Protocol):
    width: int  # D

    def __call__(self, images_BCHW: Tensor, /) -> Tensor:
        """(B,3,H,W) normalised -> (B,D)."""


def names() -> list[str]:
    return sorted(REGNETY)


def build(name: str, stem: str = "imagenet", norm: str = "bn") -> nn.Module:
    """A randomly initialised trunk; it has `.width`.  `norm`: bn or gn_ws (norms.py).  Raises ConfigError for an unknown name."""
    if name not in REGNETY:
        raise ConfigError(f"model.backbone = {name!r}: unknown; one of {', '.join(names())}")
    if norm not in NORMS:
        raise ConfigError(f"model.norm = {norm!r}: unknown; one of {', '.join(NORMS)}")
    return RegNetY(REGNETY[name], stem, norm)
