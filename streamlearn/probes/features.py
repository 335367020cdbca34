"""Frozen features of a bank, and the two baselines every curve is drawn against."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamlearn.learn.backbones import build
from streamlearn.probes.banks import Split
from streamlearn.stream.views import normalised

RAW_SIDES = (8, 16, 32)  # px; raw pixels are compared at the side that suits them best


@torch.inference_mode()
def features(trunk: nn.Module, split: Split, mean: tuple[float, float, float], std: tuple[float, float, float], batch: int) -> Tensor:
    """(N,D) of a trunk in eval mode."""
    trunk.eval()
    parts = [split.images_NSSC[i : i + batch] for i in range(0, len(split.images_NSSC), batch)]
    return torch.cat([trunk(normalised(part, mean, std)) for part in parts])


@torch.inference_mode()
def raw_pixels(split: Split, side: int) -> Tensor:
    """(N, 3 side^2): the images themselves, made small."""
    x = torch.from_numpy(np.ascontiguousarray(split.images_NSSC)).permute(0, 3, 1, 2).float()
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False).flatten(1) - 127.5


@torch.no_grad()
def untrained(backbone: str, stem: str, images_NCHW: Tensor, seed: int, batch: int = 128) -> nn.Module:
    """A randomly initialised trunk whose BatchNorm has seen the bank: the fair form of `no learning at all`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build(backbone, stem)
    norms = [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = None  # cumulative average
    trunk.train()
    for part in images_NCHW.split(batch):
        if len(part) > 1:
            trunk(part)
    return trunk.eval()
