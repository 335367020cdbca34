"""Frozen features of a bank, and the two baselines every curve is drawn against."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamlearn.learn.backbones import build
from streamlearn.probes.banks import Split
from streamlearn.probes.turns import Turns, alone
from streamlearn.stream.decode import Pixels
from streamlearn.stream.views import boxes, cut, normalised

RAW_SIDES = (8, 16, 32)  # px; raw pixels are compared at the side that suits them best
VIEW_SCALE = (0.3, 1.0)  # share of the image that a view shows
Three = tuple[float, float, float]


@torch.inference_mode()
def features(trunk: nn.Module, split: Split, mean: Three, std: Three, batch: int, turns: Turns | None = None) -> Tensor:
    """(N,D) float32 on the CPU, of a trunk in eval mode on whatever device it is."""
    return of_pixels(trunk, split.images_NSSC, mean, std, batch, turns)


@torch.inference_mode()
def of_pixels(trunk: nn.Module, images_NSSC: Pixels, mean: Three, std: Three, batch: int, turns: Turns | None = None) -> Tensor:
    """Likewise, of images that belong to no bank.  Raises Stopped between two batches."""
    trunk.eval()
    turns = turns or alone()
    device = next(trunk.parameters()).device
    parts = []
    for i in range(0, len(images_NSSC), batch):
        with turns.turn():
            pixels = torch.from_numpy(np.ascontiguousarray(images_NSSC[i : i + batch])).to(device)
            parts.append(trunk(normalised(pixels, mean, std)).float().cpu())
    return torch.cat(parts)


def views(images_NSSC: Pixels, count: int) -> Pixels:
    """(N*count,S,S,3): random resized crops of each image, every second one mirrored; the same for the same images, whatever the snapshot."""
    N, side = images_NSSC.shape[:2]
    sizes_N2 = np.full((N, 2), side)
    scale_V2 = np.tile(VIEW_SCALE, (count, 1))
    boxes_VN4 = boxes(np.arange(N, dtype=np.uint64), sizes_N2, range(count), scale_V2)
    out: np.ndarray[Any, np.dtype[np.uint8]] = np.empty((N, count, side, side, 3), np.uint8)
    for n in range(N):
        for v in range(count):
            cut(images_NSSC[n], boxes_VN4[v, n], out[n, v])
    out[:, 1::2] = out[:, 1::2, :, ::-1].copy()
    return out.reshape(N * count, side, side, 3)


@torch.inference_mode()
def raw_pixels(split: Split, side: int) -> Tensor:
    """(N, 3 side^2): the images themselves, made small."""
    x = torch.from_numpy(np.ascontiguousarray(split.images_NSSC)).permute(0, 3, 1, 2).float()
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False).flatten(1) - 127.5


@torch.no_grad()
def untrained(backbone: str, stem: str, images_NCHW: Tensor, seed: int, batch: int = 128, *, norm: str = "bn") -> nn.Module:
    """A randomly initialised trunk whose BatchNorm, if it has one, has seen the bank: the fair form of `no learning at all`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build(backbone, stem, norm)
    norms = [m for m in trunk.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return trunk.eval()
    for m in norms:
        m.momentum = None  # cumulative average
    trunk.train()
    for part in images_NCHW.split(batch):
        if len(part) > 1:
            trunk(part)
    return trunk.eval()
