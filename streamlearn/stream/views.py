"""Multi-crop views: random resized crops image by image, then colour, blur and normalisation on whole batches.

Parameters and their distributions: SwAV (arXiv:2006.09882, section 3.2 and its code), SEER the same.  Every draw is a hash of the
sample's place in the sequence and the view's number, so a view does not depend on batch mates, workers or resumption.

Shapes: B images, V views of one resolution, S its side in px, N = V * B rows.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from streamlearn.contract.config import CropConfig, StreamConfig
from streamlearn.stream.decode import Pixels
from streamlearn.stream.keys import U64, uniform

Floats = NDArray[np.float64]
TRIES = 10  # of a box that fits, as torchvision has it; then the largest centred box of a legal ratio
RATIO = (3 / 4, 4 / 3)
# salts: one number for each kind of draw; a view's draws are salted with VIEW * its number too
_AREA, _SHAPE, _LEFT, _TOP, _FLIP, _JITTER, _BRIGHT, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA = range(13)
VIEW = 1000
LUMA = (0.299, 0.587, 0.114)
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], dtype=torch.float64)


def boxes(keys_B: U64, sizes_B2: NDArray[np.int64], view: int, scale: tuple[float, float]) -> Floats:
    """(B,4) left, top, right, bottom in px, not rounded: random area and aspect ratio inside each image (width, height)."""
    W, H = sizes_B2[:, 0].astype(float), sizes_B2[:, 1].astype(float)
    ratio = np.clip(W / H, *RATIO)  # what remains when no try fits
    w, h = np.minimum(W, H * ratio), np.minimum(H, W / ratio)
    left, top = (W - w) / 2, (H - h) / 2
    unsettled = np.ones(len(keys_B), bool)
    for attempt in range(TRIES):
        salt = VIEW * view + 100 + 10 * attempt
        area = (scale[0] + (scale[1] - scale[0]) * uniform(keys_B, salt + _AREA)) * W * H
        shape = np.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * uniform(keys_B, salt + _SHAPE))
        tw, th = np.sqrt(area * shape), np.sqrt(area / shape)
        fits = unsettled & (tw <= W) & (th <= H)
        w, h = np.where(fits, tw, w), np.where(fits, th, h)
        left = np.where(fits, uniform(keys_B, salt + _LEFT) * (W - tw), left)
        top = np.where(fits, uniform(keys_B, salt + _TOP) * (H - th), top)
        unsettled &= ~fits
        if not unsettled.any():
            break
    return np.stack([left, top, left + w, top + h], axis=1)


def crops(images: list[Pixels], keys_B: U64, config: CropConfig, first_view: int) -> NDArray[np.uint8]:
    """(V,B,S,S,3): crops by Pillow's antialiased bilinear resize, flipped at random."""
    sizes = np.array([(image.shape[1], image.shape[0]) for image in images])
    pictures = [Image.fromarray(image) for image in images]
    out = np.empty((config.count, len(images), config.size, config.size, 3), np.uint8)
    for v in range(config.count):
        view = first_view + v
        flips = uniform(keys_B, VIEW * view + _FLIP) < 0.5
        for i, box in enumerate(boxes(keys_B, sizes, view, config.scale)):
            crop = np.asarray(pictures[i].resize((config.size, config.size), Image.Resampling.BILINEAR, box=tuple(box)))
            out[v, i] = crop[:, ::-1] if flips[i] else crop
    return out


def colour(keys_B: U64, view: int, strength: float) -> tuple[Tensor, Tensor]:
    """Brightness, saturation, hue and greyscale as one matrix (B,3,3), and the contrast factor (B,), float64.

    Jitter .8s .8s .8s .2s with probability 0.8, greyscale with probability 0.2.
    """

    def factor(salt: int, reach: float) -> Tensor:
        return torch.from_numpy(1 + (uniform(keys_B, VIEW * view + salt) * 2 - 1) * min(1.0, reach))

    jittered = torch.from_numpy(uniform(keys_B, VIEW * view + _JITTER) < 0.8)
    one = torch.ones(len(keys_B), dtype=torch.float64)
    bright = torch.where(jittered, factor(_BRIGHT, 0.8 * strength), one)
    contrast = torch.where(jittered, factor(_CONTRAST, 0.8 * strength), one)
    saturation = torch.where(jittered, factor(_SATURATION, 0.8 * strength), one).view(-1, 1, 1)
    turn = torch.where(jittered, factor(_HUE, 0.2 * strength) - 1, 0 * one) * 2 * math.pi
    grey = torch.tensor(LUMA, dtype=torch.float64).expand(3, 3)
    rotation = torch.zeros(len(keys_B), 3, 3, dtype=torch.float64)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
    hue = torch.linalg.inv(YIQ) @ rotation @ YIQ
    matrix = hue @ (saturation * torch.eye(3, dtype=torch.float64) + (1 - saturation) * grey) * bright.view(-1, 1, 1)
    to_grey = torch.from_numpy(uniform(keys_B, VIEW * view + _GREY) < 0.2)
    return torch.where(to_grey.view(-1, 1, 1), grey @ matrix, matrix), contrast


def augment(crops_VBSSC: NDArray[np.uint8], keys_B: U64, config: StreamConfig, first_view: int) -> Tensor:
    """(V,B,3,S,S) float32: colour distortion, blur, normalisation, each image by its own draws."""
    V, B, S = crops_VBSSC.shape[:3]
    x = torch.from_numpy(crops_VBSSC).permute(0, 1, 4, 2, 3).reshape(V * B, 3, S * S).float().div_(255)
    if config.jitter > 0:
        parts = [colour(keys_B, first_view + v, config.jitter) for v in range(V)]
        matrix, contrast = torch.cat([m for m, _ in parts]).float(), torch.cat([c for _, c in parts]).float().view(-1, 1, 1)
        x = torch.bmm(matrix, x)
        # contrast turns about the mean grey of the picture itself
        mean = (x * torch.tensor(LUMA).view(1, 3, 1)).sum(1, keepdim=True).mean(2, keepdim=True)
        x = (contrast * x + (1 - contrast) * mean).clamp_(0, 1)
    x = x.view(V * B, 3, S, S)
    if config.blur > 0:
        x = _blurred(x, keys_B, config.blur, first_view, V)
    mean3, std3 = torch.tensor(config.mean).view(1, 3, 1, 1), torch.tensor(config.std).view(1, 3, 1, 1)
    return ((x - mean3) / std3).view(V, B, 3, S, S)


def _blurred(x_NCSS: Tensor, keys_B: U64, probability: float, first_view: int, views: int) -> Tensor:
    """Gaussian blur, sigma uniform in 0.1 to 2 px, of the rows that draw it: two passes of one-dimensional kernels."""
    at, sigmas = [], []
    for v in range(views):
        salt = VIEW * (first_view + v)
        chosen = np.flatnonzero(uniform(keys_B, salt + _BLUR) < probability)
        at.append(chosen + v * len(keys_B))
        sigmas.append(0.1 + 1.9 * uniform(keys_B, salt + _SIGMA)[chosen])
    rows = torch.from_numpy(np.concatenate(at))
    if not len(rows):
        return x_NCSS
    reach = min(6, x_NCSS.shape[-1] - 1)  # 3 sigma
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / torch.from_numpy(np.concatenate(sigmas)).float().view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, dim=0)  # one a row and channel
    S = x_NCSS.shape[-1]
    y = F.pad(x_NCSS[rows].reshape(1, -1, S, S), (reach, reach, reach, reach), mode="reflect")
    y = F.conv2d(y, kernel.view(-1, 1, 1, 2 * reach + 1), groups=len(kernel))
    y = F.conv2d(y, kernel.view(-1, 1, 2 * reach + 1, 1), groups=len(kernel))
    x_NCSS = x_NCSS.clone()
    x_NCSS[rows] = y.view(-1, 3, S, S)
    return x_NCSS


def eval_crop(image: Pixels, size: int) -> Pixels:
    """(size,size,3): the centre, after resizing the shorter side; images of up to 64 px are not magnified for a margin."""
    height, width = image.shape[:2]
    short = size if size <= 64 else size * 256 // 224
    scale = min(height, width) / short
    half = size * scale / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))


def normalised(pixels_NSSC: NDArray[np.uint8], mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(N,3,S,S) float32."""
    x = torch.from_numpy(pixels_NSSC).permute(0, 3, 1, 2).float().div_(255)
    return (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
