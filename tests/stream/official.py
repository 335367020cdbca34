"""The views of SwAV's own code (src/multicropdataset.py) on torchvision's PIL back end, written down from their sources: the reference.

torchvision's transforms on a PIL image are these calls of Pillow; it is not installed here.
"""

import math
import random

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter


def box(rng, width, height, scale, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop.get_params -> left, top, right, bottom"""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def hue(image, turns):
    h, s, v = image.convert("HSV").split()
    turned = (np.asarray(h).astype(int) + int(turns * 255)) % 256  # uint8 arithmetic in torchvision
    return Image.merge("HSV", (Image.fromarray(turned.astype(np.uint8), "L"), s, v)).convert("RGB")


JITTER = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    hue,
)


def done(image, *, flip, jitter, order, factors, grey, sigma):
    """A crop with these draws."""
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if jitter:
        for kind in order:
            image = JITTER[kind](image, factors[kind])
    if grey:
        image = image.convert("L").convert("RGB")
    return image.filter(ImageFilter.GaussianBlur(sigma)) if sigma else image


def draw(rng: random.Random, strength=1.0):
    reach = 0.8 * strength
    factors = [rng.uniform(max(0, 1 - reach), 1 + reach) for _ in range(3)] + [rng.uniform(-0.2 * strength, 0.2 * strength)]
    order = list(range(4))
    rng.shuffle(order)
    return {
        "flip": rng.random() < 0.5, "jitter": rng.random() < 0.8, "order": order, "factors": factors, "grey": rng.random() < 0.2,
        "sigma": rng.uniform(0.1, 2.0) if rng.random() <= 0.5 else 0.0,
    }  # fmt: skip


def crop(image, corners, size):
    """resized_crop: antialiased bilinear"""
    return image.resize((size, size), Image.Resampling.BILINEAR, box=corners)
