"""An image world made by code: labelled concepts that vary in colour, pose, size, texture, light and background, and drift.

A concept is a shape, and nothing else is its own: colours, textures, backgrounds, clutter, light, noise and pose are drawn anew for every image,
so the pixels of two images of one concept have little in common.  Image i is a pure function of (seed, i).  Every `quarter_images` a quarter
ends: two new concepts appear, and the style (palettes, backgrounds, sizes) shifts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Plane = NDArray[Any]  # (S,S) float32
OVER = 2  # supersampling, for smooth edges
FIRST, EACH = 8, 2  # concepts in quarter 0, and new ones in each later quarter


def _ring(x: Plane, y: Plane) -> Plane:
    return np.abs(np.hypot(x, y) - 0.68) - 0.2


def _star(x: Plane, y: Plane) -> Plane:
    return np.asarray(np.hypot(x, y) - (0.56 + 0.32 * np.cos(5 * np.arctan2(y, x))))


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(np.maximum(np.abs(x) - 0.2, np.abs(y) - 0.88), np.maximum(np.abs(y) - 0.2, np.abs(x) - 0.88))


def _triangle(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x) * 0.87 + y * 0.5 - 0.42, -y - 0.5)


def _frame(x: Plane, y: Plane) -> Plane:
    return np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.62) - 0.15


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot(x, y) - 0.85, 0.7 - np.hypot(x - 0.42, y))


def _bars(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.maximum(np.abs(x), np.abs(y)) - 0.85, np.abs((x * 1.8) % 1.0 - 0.5) - 0.24)


def _dots(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot((x * 1.6) % 1.0 - 0.5, (y * 1.6) % 1.0 - 0.5) - 0.3, np.hypot(x, y) - 0.95)


def _gear(x: Plane, y: Plane) -> Plane:
    r = np.hypot(x, y)
    return np.asarray(np.maximum(r - 0.68 - 0.14 * np.sign(np.sin(9 * np.arctan2(y, x))), 0.25 - r))


def _spiral(x: Plane, y: Plane) -> Plane:
    r = np.hypot(x, y)
    turn = (np.arctan2(y, x) / (2 * np.pi) - r * 2.4) % 1.0
    return np.maximum(np.abs(turn - 0.5) - 0.22, r - 0.9)


def _hourglass(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(x) - np.abs(y) * 0.85 - 0.06, np.abs(y) - 0.85)


def _zigzag(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.abs(y - 0.6 * (2 * np.abs((x * 1.4) % 1.0 - 0.5) - 0.5)) - 0.2, np.abs(x) - 0.95)


def _tree(x: Plane, y: Plane) -> Plane:
    crown = np.minimum(
        np.maximum(np.abs(x) * 0.8 + y * 0.6 - 0.3, -y - 0.35), np.maximum(np.abs(x) * 0.8 + y * 0.6 - 0.62, -y + 0.2) - 0.05
    )
    return np.minimum(crown, np.maximum(np.abs(x) - 0.13, np.abs(y + 0.6) - 0.3))


def _arrow(x: Plane, y: Plane) -> Plane:
    head = np.maximum(np.abs(y) + (x - 0.05) * 0.8 - 0.62, -(x - 0.05))
    return np.minimum(head, np.maximum(np.abs(y) - 0.17, np.abs(x + 0.4) - 0.5))


SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "ring": _ring,
    "star": _star,
    "cross": _cross,
    "triangle": _triangle,
    "bars": _bars,
    "crescent": _crescent,
    "frame": _frame,
    "dots": _dots,
    "gear": _gear,
    "spiral": _spiral,
    "hourglass": _hourglass,
    "zigzag": _zigzag,
    "tree": _tree,
    "arrow": _arrow,
}
CONCEPTS = tuple(SHAPES)


@dataclass(frozen=True)
class World:
    seed: int
    size: int  # px
    quarter_images: int

    def quarter(self, index: int) -> int:
        return index // self.quarter_images

    def concepts(self, quarter: int) -> tuple[str, ...]:
        """What appears in a quarter."""
        return CONCEPTS[: min(len(CONCEPTS), FIRST + EACH * quarter)]

    def label(self, index: int) -> str:
        known = self.concepts(self.quarter(index))
        return known[int(self._rng(index, 0).integers(len(known)))]

    def jpeg(self, index: int) -> bytes:
        """The image as a web server would have it."""
        return self.draw(self.label(index), self._rng(index, 1), self.quarter(index))

    def labelled(self, count: int, quarters: int, salt: int) -> list[tuple[bytes, str]]:
        """Images for a bank, all concepts and styles of the first `quarters` alike, none of them ever served."""
        known = self.concepts(quarters - 1)
        rngs = [np.random.Generator(np.random.Philox(key=[self.seed, (salt << 40) + i])) for i in range(count)]
        return [(self.draw(known[i % len(known)], rng, i % quarters), known[i % len(known)]) for i, rng in enumerate(rngs)]

    def draw(self, concept: str, rng: np.random.Generator, quarter: int) -> bytes:
        side = self.size * OVER
        axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
        x, y = np.meshgrid(axis, axis)
        picture = _background(x, y, rng, quarter)
        if rng.random() < 0.5:  # clutter: a scrap that belongs to nothing
            picture = _lay(picture, _scrap(x, y, rng), _paint(x, y, rng, quarter))
        paint = _apart(_paint(x, y, rng, quarter), picture)
        for at in _places(rng):
            reach = np.float32(rng.uniform(0.4, 0.62) * (1.0 - 0.06 * (quarter % 3)))
            turn, squeeze = rng.uniform(-0.6, 0.6), np.float32(rng.uniform(0.85, 1.18))
            u, v = x - at[0], y - at[1]
            c, s = np.float32(np.cos(turn)) / reach, np.float32(np.sin(turn)) / reach
            inside = SHAPES[concept]((c * u + s * v) * squeeze, (c * v - s * u) / squeeze)
            picture = _lay(picture, inside * reach, paint)
        return _photograph(picture, x, y, rng, self.size)

    def _rng(self, index: int, salt: int) -> np.random.Generator:
        # Philox is a keyed hash: no state to carry, the same on every machine
        return np.random.Generator(np.random.Philox(key=[self.seed, (index << 1) + salt]))


def _places(rng: np.random.Generator) -> list[tuple[np.float32, np.float32]]:
    """A little flock: one instance near each corner, some of them missing, each shaken."""
    corners = [(cx, cy) for cx in (-0.5, 0.5) for cy in (-0.5, 0.5)]
    kept = rng.permutation(4)[: int(rng.integers(3, 5))]
    return [(np.float32(corners[k][0] + rng.uniform(-0.2, 0.2)), np.float32(corners[k][1] + rng.uniform(-0.2, 0.2))) for k in kept]


def _colour(rng: np.random.Generator, quarter: int) -> Plane:
    """A muted colour of any lightness; later quarters lean to other parts of the palette."""
    lean = np.array([[0.0, 0.0, 0.0], [0.08, 0.0, -0.08], [-0.08, 0.0, 0.08], [-0.04, 0.08, -0.04]], np.float32)[quarter % 4]
    return np.asarray((rng.uniform(0.2, 0.8) + 0.08 * rng.standard_normal(3) + lean).astype(np.float32))


def _apart(paint: Plane, ground: Plane) -> Plane:
    """Make sure that a shape can be seen: three tenths of the range lighter or darker than its ground, on the whole."""
    gap = float(paint.mean() - ground.mean())
    if abs(gap) < 0.3:
        paint = paint + np.float32((0.3 if gap >= 0 else -0.3) - gap)
    return paint


def _waves(x: Plane, y: Plane, rng: np.random.Generator, low: float, high: float) -> Plane:
    """A texture in 0 to 1: two crossed waves."""
    total = np.zeros_like(x)
    for _ in range(2):
        angle, rate, phase = rng.uniform(0, np.pi), rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
        total = total + np.sin(np.float32(rate) * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) + np.float32(phase))
    return total * np.float32(0.25) + np.float32(0.5)


def _paint(x: Plane, y: Plane, rng: np.random.Generator, quarter: int) -> Plane:
    """(S,S,3): one colour shading into another along a texture."""
    a, b = _colour(rng, quarter), _colour(rng, quarter)
    mix = _waves(x, y, rng, 0.5, 3)[..., None] * np.float32(rng.uniform(0, 0.5))
    return a * (1 - mix) + b * mix


def _background(x: Plane, y: Plane, rng: np.random.Generator, quarter: int) -> Plane:
    """A colour shading into another; later quarters have more texture."""
    a, b = _colour(rng, quarter), _colour(rng, quarter)
    mix = _waves(x, y, rng, 0.5, 2 + 2 * (quarter % 3))[..., None] * np.float32(rng.uniform(0.0, 0.8))
    return a * (1 - mix) + b * mix


def _scrap(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """A small blob or stick somewhere."""
    u, v = x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)
    if rng.random() < 0.5:
        return np.hypot(u, v) - np.float32(rng.uniform(0.06, 0.15))
    angle = rng.uniform(0, np.pi)
    along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    return np.asarray(np.maximum(np.abs(across) - np.float32(0.05), np.abs(along) - np.float32(rng.uniform(0.15, 0.4))).astype(np.float32))


def _lay(picture: Plane, inside: Plane, paint: Plane) -> Plane:
    """Paint where `inside` is negative, its edge one pixel soft."""
    cover = np.clip(0.5 - inside * (len(inside) / 4), 0, 1)[..., None].astype(np.float32)
    return picture * (1 - cover) + paint * cover


def _photograph(picture: Plane, x: Plane, y: Plane, rng: np.random.Generator, size: int) -> bytes:
    """Light from one side, exposure, grain; then down to size, as JPEG."""
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + np.float32(rng.uniform(0, 0.6)) * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    picture = picture * light[..., None] * np.float32(rng.uniform(0.6, 1.3))
    small = picture.reshape(size, OVER, size, OVER, 3).mean((1, 3))
    small = small + rng.standard_normal(small.shape, dtype=np.float32) * np.float32(0.02)
    pixels = np.ascontiguousarray((small.clip(0, 1) * 255).astype(np.uint8))
    return bytes(simplejpeg.encode_jpeg(pixels, quality=88, colorspace="RGB"))
