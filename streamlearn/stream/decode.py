"""Image bytes -> RGB pixels.  libjpeg-turbo for JPEG, Pillow for the rest and for what libjpeg-turbo declines."""

import io
import warnings

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from streamlearn.contract.errors import Corrupt

Pixels = NDArray[np.uint8]
_ORIENTATION = 0x0112  # EXIF
_FAULTS = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def decode(data: bytes) -> Pixels:
    """(H,W,3) uint8, upright.  The first frame of an animation; grey, CMYK, palette, 16-bit and alpha are converted.

    Raises Corrupt with the decoder's reason.
    """
    if data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data[:4096]:
        try:
            if simplejpeg.decode_jpeg_header(data)[2] != "CMYK":
                return np.asarray(simplejpeg.decode_jpeg(data, "RGB"), dtype=np.uint8)
        except ValueError as e:
            raise Corrupt(f"JPEG of {len(data)} bytes: {e}") from e
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                turned = image.getexif().get(_ORIENTATION, 1) != 1
                return np.asarray(_rgb(ImageOps.exif_transpose(image) if turned else image), dtype=np.uint8)
    except _FAULTS as e:
        raise Corrupt(f"image of {len(data)} bytes: {e}") from e


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # deep grey: scaled, not clipped
        deep = np.asarray(image, dtype=np.float32)
        top = 65535.0 if deep.max(initial=0) > 255 else 255.0
        image = Image.fromarray((deep * (255.0 / top)).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)  # paper, not black
    return image.convert("RGB")
