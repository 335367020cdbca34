"""Trunks: images (B,3,H,W) -> features (B,D).  `build` knows the names."""

from typing import Protocol

from torch import Tensor, nn

from streamlearn.contract.errors import ConfigError
from streamlearn.learn.backbones.regnet import REGNETY, RegNetY

__all__ = ["Backbone", "build", "names"]


class Backbone(Protocol):
    width: int  # D

    def __call__(self, images_BCHW: Tensor, /) -> Tensor:
        """(B,3,H,W) normalised -> (B,D)."""


def names() -> list[str]:
    return sorted(REGNETY)


def build(name: str, stem: str = "imagenet") -> nn.Module:
    """A randomly initialised trunk; it has `.width`.  Raises ConfigError for an unknown name."""
    if name not in REGNETY:
        raise ConfigError(f"model.backbone = {name!r}: unknown; one of {', '.join(names())}")
    return RegNetY(REGNETY[name], stem)
