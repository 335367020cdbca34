"""Multi-crop views: where each crop lies, at which scale the image must be decoded for all of them, and the crops themselves.

Boxes are drawn from the image's size alone, before anything is decoded, exactly as torchvision's RandomResizedCrop draws them (whole px).
An image whose every crop is larger than its view is decoded at 1/2, 1/4 or 1/8, the smallest that magnifies none of them, and its boxes
are moved to multiples of that (by under half a px of the view) so that crops begin and end with a decoded pixel.

Every draw is a hash of the sample's place in the sequence and the view's number, so a view does not depend on batch mates, workers or
resumption.  What follows a crop (flip, colour, blur): stream/distort.py.

Shapes: B images, V views (all resolutions together, in the order of the config), S the side of a view in px.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from streamlearn.contract.config import CropConfig
from streamlearn.stream.decode import SCALES, Pixels
from streamlearn.stream.keys import U64, uniform

Ints = NDArray[np.int64]
TRIES = 10  # of a box that fits, as torchvision has it; then the largest centred box of a legal ratio
RATIO = (3 / 4, 4 / 3)
_AREA, _SHAPE, _LEFT, _TOP = range(4)


def salts(views: range) -> Ints:
    """(V,1) A view has a thousand salts of draws: the first hundred are of its distortion, ten for each try at a box follow."""
    return 1000 * np.array(views, dtype=np.int64)[:, None]


def sides(crops: tuple[CropConfig, ...]) -> Ints:
    """(V,) the side of each view in px."""
    return np.repeat([crop.size for crop in crops], [crop.count for crop in crops])


def boxes(keys_B: U64, sizes_B2: Ints, views: range, scale_V2: NDArray[np.float64]) -> Ints:
    """(V,B,4) left, top, right, bottom in px: random area and aspect ratio inside each image (width, height)."""
    W, H = sizes_B2.T
    low, high = scale_V2[:, :1], scale_V2[:, 1:]
    ratio = np.clip(W / H, *RATIO)  # what remains when no try fits
    width, height = np.minimum(W, np.rint(H * ratio)), np.minimum(H, np.rint(W / ratio))
    whole = np.stack([(W - width) // 2, (H - height) // 2, width, height]).astype(np.int64)
    box_4VB = np.repeat(whole[:, None], len(views), axis=1)
    unsettled = np.ones(box_4VB.shape[1:], bool)
    for attempt in range(TRIES):
        at = salts(views) + 100 + 10 * attempt
        area = (low + (high - low) * uniform(keys_B, at + _AREA)) * W * H
        shape = np.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * uniform(keys_B, at + _SHAPE))
        w, h = np.rint(np.sqrt(area * shape)), np.rint(np.sqrt(area / shape))
        left, top = uniform(keys_B, at + _LEFT) * (W - w + 1), uniform(keys_B, at + _TOP) * (H - h + 1)
        fits = unsettled & (w > 0) & (w <= W) & (h > 0) & (h <= H)
        box_4VB = np.where(fits, np.stack([left, top, w, h]).astype(np.int64), box_4VB)
        unsettled &= ~fits
        if not unsettled.any():
            break
    box_4VB[2:] += box_4VB[:2]
    return np.ascontiguousarray(box_4VB.transpose(1, 2, 0))


def plan(keys_B: U64, sizes_B2: Ints, crops: tuple[CropConfig, ...]) -> tuple[Ints, Ints]:
    """(V,B,4) boxes of all views in px, and (B,) at which 1/n of its sides each image may be decoded; boxes are multiples of that n."""
    scale_V2 = np.array([crop.scale for crop in crops for _ in range(crop.count)])
    ends_VB2 = np.split(boxes(keys_B, sizes_B2, range(len(scale_V2)), scale_V2), 2, axis=2)
    room_B = ((ends_VB2[1] - ends_VB2[0]).min(axis=2) / sides(crops)[:, None]).min(axis=0)  # px of the image for one px of a view
    scale_B = np.array(SCALES)[np.argmax(room_B[:, None] >= np.array(SCALES), axis=1)]
    scale_B = np.where(room_B < 1, 1, scale_B)
    # a box that ends beyond the last whole block of n px ends with that
    step_B1 = scale_B[:, None]
    snapped = [np.minimum((end + step_B1 // 2) // step_B1, sizes_B2 // step_B1) * step_B1 for end in ends_VB2]
    return np.concatenate(snapped, axis=2), scale_B


def cut(image: Pixels, box_4: Ints, out_SS3: Pixels) -> None:
    """Write the box, resized: antialiased bilinear, as Pillow has it to within rounding (60 dB).  torch's integer code is four times as fast."""
    (left, top, right, bottom), side = box_4.tolist(), len(out_SS3)
    source_1HW3 = torch.from_numpy(np.ascontiguousarray(image[None, top:bottom, left:right]))
    # interpolate(mode="bilinear", antialias=True), which has no `out`; channels last on both ends, so that nothing is rearranged
    torch.ops.aten._upsample_bilinear2d_aa.out(
        source_1HW3.permute(0, 3, 1, 2), (side, side), False, None, None, out=torch.from_numpy(out_SS3[None]).permute(0, 3, 1, 2)
    )


def eval_crop(image: Pixels, size: int) -> Pixels:
    """(size,size,3): the centre, after resizing the shorter side; images of up to 64 px are not magnified for a margin."""
    height, width = image.shape[:2]
    short = size if size <= 64 else size * 256 // 224
    scale = min(height, width) / short
    half = size * scale / 2
    box = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))


def normalised(pixels_NSSC: Pixels | Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(N,3,S,S) float32, on the device of the pixels, laid out as they are (channels last)."""
    x = torch.as_tensor(pixels_NSSC).permute(0, 3, 1, 2).float().div_(255)
    mean3, std3 = (torch.tensor(three, device=x.device).view(1, 3, 1, 1) for three in (mean, std))
    return x.sub_(mean3).div_(std3)
