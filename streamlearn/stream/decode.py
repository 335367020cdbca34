"""Image bytes -> RGB pixels.  libjpeg-turbo for JPEG, Pillow for the rest and for what libjpeg-turbo declines.

In two steps, so that crops can be drawn before anything is decoded: `header` tells the size and what it takes, `pixels` decodes at the
scale that the crops need.  libjpeg-turbo scales by 1/2, 1/4 and 1/8 while it transforms blocks, for less than a whole decode costs
(reference/loading.md, section 2); its other fractions have no fast code.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from streamlearn.contract.errors import Corrupt

Pixels = NDArray[np.uint8]
SCALES = (8, 4, 2, 1)  # a side may be decoded at 1/n of its length
KEPT_BYTES = 2**26  # of a Buffer: 22 megapixels
_ORIENTATION = 0x0112  # EXIF
# EXIF orientation -> what brings the pixels upright: transposed first, then turned about in rows and columns
_UPRIGHT = {
    2: (False, 1, -1), 3: (False, -1, -1), 4: (False, -1, 1),
    5: (True, 1, 1), 6: (True, 1, -1), 7: (True, -1, -1), 8: (True, -1, 1),
}  # fmt: skip
_FAULTS = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class Header:
    """What is known before decoding."""

    width: int  # px, upright
    height: int
    orientation: int  # as EXIF numbers them; 1: upright
    turbo: bool  # libjpeg-turbo decodes it, and can scale it down


class Buffer:
    """Memory that one decode after another writes to: fresh pages for each image would cost a tenth of the decoding."""

    def __init__(self, memory: NDArray[np.uint8] | None = None) -> None:
        self.memory = np.empty(0, np.uint8) if memory is None else memory

    def of(self, size: int) -> NDArray[np.uint8] | None:
        """At least `size` bytes; None where that is more than is worth keeping."""
        if size > KEPT_BYTES:
            return None
        if len(self.memory) < size:
            self.memory = np.empty(size, np.uint8)
        return self.memory


def header(data: bytes) -> Header:
    """Raises Corrupt with the decoder's reason."""
    if data[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as e:
            raise Corrupt(f"JPEG of {len(data)} bytes: {e}") from e
        orientation = 1
        if b"Exif\0\0" in data[:4096]:
            with _opened(data) as image:
                orientation = _orientation(image)
        turbo = space in ("RGB", "YCbCr", "Gray")
    else:
        with _opened(data) as image:
            (width, height), orientation, turbo = image.size, _orientation(image), False
    if orientation != 1 and _UPRIGHT[orientation][0]:
        width, height = height, width
    return Header(width, height, orientation, turbo)


def pixels(data: bytes, known: Header, *, scale: int = 1, buffer: Buffer | None = None) -> Pixels:
    """(ceil(H/scale), ceil(W/scale), 3) uint8, upright; `scale` is one of SCALES, and 1 unless `known.turbo`.

    The first frame of an animation; grey, CMYK, palette, 16-bit and alpha are converted.  With a `buffer` the array lives until that is
    next used.  Raises Corrupt with the decoder's reason.
    """
    if not known.turbo:
        assert scale == 1
        with _opened(data) as image:
            converted = np.array(_rgb(ImageOps.exif_transpose(image) if known.orientation != 1 else image), dtype=np.uint8)
        if converted.shape[:2] != (known.height, known.width):  # some formats can contradict themselves
            raise Corrupt(f"image of {len(data)} bytes: {converted.shape[1::-1]} px, and not {(known.width, known.height)}")
        return converted
    height, width = -(-known.height // scale), -(-known.width // scale)
    if known.orientation != 1 and _UPRIGHT[known.orientation][0]:
        height, width = width, height
    try:
        image = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=height if scale > 1 else 0,
            min_width=width if scale > 1 else 0,
            min_factor=scale,
            buffer=None if buffer is None else buffer.of(3 * height * width),
        )
    except ValueError as e:
        raise Corrupt(f"JPEG of {len(data)} bytes: {e}") from e
    return _upright(image, known.orientation)


def decode(data: bytes) -> Pixels:
    """The whole image, as `pixels` has it.  Raises Corrupt with the decoder's reason."""
    return pixels(data, header(data))


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """A Pillow image; its many kinds of complaint, in here and in the body, become Corrupt."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except _FAULTS as e:
        raise Corrupt(f"image of {len(data)} bytes: {e}") from e


def _orientation(image: Image.Image) -> int:
    turned = image.getexif().get(_ORIENTATION, 1)
    return turned if turned in _UPRIGHT else 1


def _upright(image: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return image
    transposed, rows, columns = _UPRIGHT[orientation]
    turned = image.transpose(1, 0, 2) if transposed else image
    return np.ascontiguousarray(turned[::rows, ::columns])


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # deep grey: scaled, not clipped
        deep = np.asarray(image, dtype=np.float32)
        top = 65535.0 if deep.max(initial=0) > 255 else 255.0
        image = Image.fromarray((deep * (255.0 / top)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)  # paper, not black
    return image.convert("RGB")
