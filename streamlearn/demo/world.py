"""An image world made by code: labelled concepts that vary in colour, pose, size, texture, light and background, and drift.

A concept is a shape, and nothing else is its own: an image is a swarm of one shape, each member with a colour, pose and size drawn anew, on a
shading ground with clutter, under slanted light, with grain.  The pixels of two images of one concept have almost nothing in common (k-NN on
raw pixels is near chance), but two crops of one image show the same shape in different members: that is what a self-supervised learner can
find out.  What crops share besides (ground, light, exposure, palette) is kept mild, else it is learnt first; LOG.md has the worlds that failed.

Image i is a pure function of (seed, i).  Every `quarter_images` a quarter ends: two new concepts appear, and the style (palette, texture,
sizes) shifts.
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
        picture = _ground(x, y, rng, quarter)
        if rng.random() < 0.5:  # clutter: a scrap that belongs to nothing
            picture = _lay(picture, _scrap(x, y, rng), _colour(rng, quarter))
        for at in _places(rng):
            reach = np.float32(rng.uniform(0.28, 0.38) * (1.0 - 0.06 * (quarter % 3)))
            turn, squeeze = rng.uniform(-0.6, 0.6), np.float32(rng.uniform(0.85, 1.18))
            u, v = x - at[0], y - at[1]
            c, s = np.float32(np.cos(turn)) / reach, np.float32(np.sin(turn)) / reach
            inside = SHAPES[concept]((c * u + s * v) * squeeze, (c * v - s * u) / squeeze)
            picture = _lay(picture, inside * reach, _apart(_colour(rng, quarter), picture, at, float(reach)))
        return _photograph(picture, x, y, rng, self.size)

    def _rng(self, index: int, salt: int) -> np.random.Generator:
        # Philox is a keyed hash: no state to carry, the same on every machine
        return np.random.Generator(np.random.Philox(key=[self.seed, (index << 1) + salt]))


def _places(rng: np.random.Generator) -> list[tuple[float, float]]:
    """A swarm: the cells of a 3x3 lattice that lies anywhere, up to two of them empty, each member shaken."""
    pitch = 2 / 3
    shift = rng.uniform(-pitch / 2, pitch / 2, 2)
    cells = [(i * pitch + shift[0], j * pitch + shift[1]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    kept = rng.permutation(9)[: int(rng.integers(7, 10))]
    return [(cells[k][0] + rng.uniform(-0.08, 0.08), cells[k][1] + rng.uniform(-0.08, 0.08)) for k in kept]


def _colour(rng: np.random.Generator, quarter: int) -> Plane:
    """A colour of any lightness; later quarters lean to other parts of the palette, by less than a colour varies within an image."""
    lean = np.array([[0.0, 0.0, 0.0], [0.025, 0.0, -0.025], [-0.025, 0.0, 0.025], [-0.015, 0.025, -0.015]], np.float32)[quarter % 4]
    return np.asarray((rng.uniform(0.15, 0.85) + 0.2 * rng.standard_normal(3) + lean).astype(np.float32))


def _apart(paint: Plane, picture: Plane, at: tuple[float, float], reach: float) -> Plane:
    """Make sure that a member can be seen: three tenths of the range lighter or darker than the ground around it."""
    side = len(picture)
    radius, column, row = int(reach * side / 2), int((at[0] + 1) / 2 * side), int((at[1] + 1) / 2 * side)
    around = picture[max(0, row - radius) : row + radius, max(0, column - radius) : column + radius]
    ground = float((around if around.size else picture).mean())
    gap = float(paint.mean()) - ground
    if abs(gap) < 0.3:
        lighter = ground < 0.35 or (gap >= 0 and ground < 0.6)
        paint = paint + np.float32((0.3 if lighter else -0.3) - gap)
    return paint


def _waves(x: Plane, y: Plane, rng: np.random.Generator, low: float, high: float) -> Plane:
    """A texture in 0 to 1: two crossed waves."""
    total = np.zeros_like(x)
    for _ in range(2):
        angle, rate, phase = rng.uniform(0, np.pi), rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
        total = total + np.sin(np.float32(rate) * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) + np.float32(phase))
    return total * np.float32(0.25) + np.float32(0.5)


def _ground(x: Plane, y: Plane, rng: np.random.Generator, quarter: int) -> Plane:
    """(S,S,1): a dark grey shading into a light one along crossed waves; finer in later quarters."""
    return 0.3 + 0.3 * _waves(x, y, rng, 2, 4 + quarter % 3)[..., None]


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
    light = 1 + np.float32(rng.uniform(0, 0.2)) * (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)))
    picture = picture * light[..., None] * np.float32(rng.uniform(0.9, 1.1))
    small = picture.reshape(size, OVER, size, OVER, 3).mean((1, 3))
    small = small + rng.standard_normal(small.shape, dtype=np.float32) * np.float32(0.02)
    pixels = np.ascontiguousarray((small.clip(0, 1) * 255).astype(np.uint8))
    return bytes(simplejpeg.encode_jpeg(pixels, quality=88, colorspace="RGB"))
