"""What befalls a crop, drawn for each sample and done to whole batches on the learner's device: flip, colour, blur, normalisation.

Distributions and order are those of SwAV's code (arXiv:2006.09882, src/multicropdataset.py; SEER the same), alike for all views:

  flip        horizontally, with probability 1/2
  jitter      with probability 0.8, strength s: brightness, contrast, saturation by factors 1 ± 0.8 s and hue by ± 0.2 s of a turn, in
              random order, each clamped to the legal range before the next (torchvision's ColorJitter)
  grey        with probability 0.2, by Rec. 601 luma
  blur        with probability 0.5, Gaussian of sigma 0.1 to 2 px as Pillow has it: three box filters of fractional width

Draws are hashes of the sample's key: the same for the same place in the sequence, wherever the work is done.  stream/distort_cpu.py does
the same to one crop after another, on bytes, in the workers.

Shapes: B images, N rows (views of images), S the side in px, T taps.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamlearn.contract.config import StreamConfig
from streamlearn.stream.keys import U64, uniform
from streamlearn.stream.views import salts

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)
ROWS = 256  # worked on at once: 150 MB of a 224 px view, and as much again for each step
_FLIP, _JITTER, _FACTOR, _ORDER, _GREY, _BLUR, _SIGMA = 4, 5, 6, 10, 14, 15, 16  # salts; _FACTOR and _ORDER are four each


@dataclass(frozen=True)
class Distortions:
    """The draws of N rows."""

    flip_N: NDArray[np.bool_]
    jitter_N: NDArray[np.bool_]
    order_N4: NDArray[np.int64]  # BRIGHTNESS .. HUE as they come
    factor_N4: NDArray[np.float64]  # by what, indexed by BRIGHTNESS .. HUE; the hue in turns
    grey_N: NDArray[np.bool_]
    sigma_N: NDArray[np.float64]  # px; 0: not blurred

    def rows(self, at: slice) -> "Distortions":
        return Distortions(*(getattr(self, field.name)[at] for field in fields(self)))


def draw(keys_B: U64, views: range, config: StreamConfig) -> Distortions:
    """For these views of every image, view by view: N = len(views) * B."""
    at, reach = salts(views), 0.8 * config.jitter

    def number(kind: int) -> NDArray[np.float64]:
        return uniform(keys_B, at + kind).ravel()

    factor_N4 = np.stack([number(_FACTOR + i) for i in range(4)], axis=1)
    factor_N4[:, :HUE] = max(0.0, 1 - reach) + factor_N4[:, :HUE] * (1 + reach - max(0.0, 1 - reach))
    factor_N4[:, HUE] = (2 * factor_N4[:, HUE] - 1) * min(0.5, 0.2 * config.jitter)
    return Distortions(
        flip_N=number(_FLIP) < 0.5,
        jitter_N=(number(_JITTER) < 0.8) & (config.jitter > 0),
        order_N4=np.argsort(np.stack([number(_ORDER + i) for i in range(4)], axis=1), axis=1),
        factor_N4=factor_N4,
        grey_N=(number(_GREY) < 0.2) & (config.jitter > 0),
        sigma_N=np.where(number(_BLUR) < config.blur, 0.1 + 1.9 * number(_SIGMA), 0.0),
    )


def kernel(sigma: float) -> NDArray[np.float64]:
    """(T,) the taps of Pillow's GaussianBlur: three times a box whose width makes up the variance, with fractional ends."""
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.ones(2 * whole + 3)
    box[[0, -1]] = ends
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box)


def distorted(crops_NSSC: Tensor, draws: Distortions, config: StreamConfig) -> Tensor:
    """(N,3,S,S) float32, normalised, on the device of `crops_NSSC` (uint8)."""
    N, S = crops_NSSC.shape[:2]
    out = torch.empty(N, 3, S, S, device=crops_NSSC.device)
    mean, std = (torch.tensor(v, device=out.device).view(1, 3, 1, 1) for v in (config.mean, config.std))
    for first in range(0, N, ROWS):
        at = slice(first, min(N, first + ROWS))
        x = _painted(crops_NSSC[at].permute(0, 3, 1, 2).float() / 255, draws.rows(at))
        torch.div(x - mean, std, out=out[at])
    return out


def _painted(x_N3SS: Tensor, draws: Distortions) -> Tensor:
    """All but the normalisation, on values of 0 to 1."""

    def chosen(rows_N: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.flatnonzero(rows_N)).to(x_N3SS.device)

    rows = chosen(draws.flip_N)
    x_N3SS[rows] = x_N3SS[rows].flip(3)
    factor_N4 = torch.from_numpy(draws.factor_N4).float().to(x_N3SS.device)
    for step in range(4):
        for kind in range(4):
            rows = chosen(draws.jitter_N & (draws.order_N4[:, step] == kind))
            if len(rows):
                x_N3SS[rows] = _adjusted(x_N3SS[rows], kind, factor_N4[rows, kind].view(-1, 1, 1, 1))
    rows = chosen(draws.grey_N)
    x_N3SS[rows] = _luma(x_N3SS[rows]).expand(-1, 3, -1, -1)
    rows = chosen(draws.sigma_N > 0)
    if len(rows):
        x_N3SS[rows] = _blurred(x_N3SS[rows], draws.sigma_N[draws.sigma_N > 0])
    return x_N3SS


def _luma(x_N3SS: Tensor) -> Tensor:
    """(N,1,S,S)"""
    red, green, blue = x_N3SS.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _adjusted(x_N3SS: Tensor, kind: int, factor_N111: Tensor) -> Tensor:
    """One operation of the jitter."""
    if kind == BRIGHTNESS:
        return (factor_N111 * x_N3SS).clamp_(0, 1)
    if kind == CONTRAST:  # about the mean grey of the view itself
        return torch.lerp(_luma(x_N3SS).mean((2, 3), keepdim=True), x_N3SS, factor_N111).clamp_(0, 1)
    if kind == SATURATION:
        return torch.lerp(_luma(x_N3SS), x_N3SS, factor_N111).clamp_(0, 1)
    return _turned(x_N3SS, factor_N111.squeeze(1))


def _turned(x_N3SS: Tensor, turns_N11: Tensor) -> Tensor:
    """The hue of the hexcone (HSV) turned; value and saturation stay.

    With c = (x - min) / (max - min), the distance of a hue from red is 1 + c_green + c_blue - c_red sixths of a turn, so no sextant need
    be told from another; and a channel h sixths from its own hue has c = |h| - 3, folded, less 1, clamped.
    """
    low_NSS, high_NSS = x_N3SS.amin(1), x_N3SS.amax(1)
    spread_NSS = high_NSS - low_NSS
    red, green, blue = x_N3SS.unbind(1)
    away = (green + blue - red - low_NSS) / spread_NSS.clamp(min=1e-6) + 1
    hue = torch.copysign(away, green - blue) + 6 * turns_N11  # from -4.2 to 4.2
    parts = [(((hue - centre).abs() - 3).abs() - 1).clamp_(0, 1) for centre in (0, 2, -2)]
    return torch.stack([low_NSS + spread_NSS * part for part in parts], dim=1)


def _blurred(x_N3SS: Tensor, sigma_N: NDArray[np.float64]) -> Tensor:
    """Rows, then columns, each row of the batch with its own taps."""
    kernels = [kernel(sigma) for sigma in sigma_N.tolist()]
    T, S = max(len(k) for k in kernels), x_N3SS.shape[-1]
    taps_NT = np.stack([np.pad(k, (T - len(k)) // 2) for k in kernels])
    weights = torch.from_numpy(taps_NT).float().to(x_N3SS.device).repeat_interleave(3, dim=0)
    reach = T // 2
    y = F.pad(x_N3SS, (reach, reach, reach, reach), mode="replicate").flatten(0, 1).unsqueeze(0)
    y = F.conv2d(y, weights.view(-1, 1, 1, T), groups=len(weights))
    y = F.conv2d(y, weights.view(-1, 1, T, 1), groups=len(weights))
    return y.view(-1, 3, S, S)
