"""Bytes -> verdict.  By magic bytes and header, before anything is decoded; what the server called it does not count."""

import io
import struct
import warnings
from dataclasses import dataclass
from enum import StrEnum

import simplejpeg
from PIL import Image, UnidentifiedImageError

SMALL = 256 * 256  # px; images up to this are decoded; larger JPEGs only when their end looks wrong, at an eighth of their size
MAX_SCANS = 64  # of a JPEG; a progressive one has about ten, and each may cost a pass over all pixels
TAIL = 1024  # bytes in which a file's end is looked for: some tools append to it
_FAULTS = (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, struct.error, KeyError, TypeError, IndexError)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class Reason(StrEnum):
    """Why a candidate is refused: a closed set, a metric's label."""

    BAD_URL = "bad_url"
    BAD_RECORD = "bad_record"
    NO_RECORD = "no_record"  # an offset of the log without a record
    ADDRESS = "private_address"
    REDIRECTS = "too_many_redirects"
    GONE = "gone"  # 4xx
    TOO_LARGE = "too_large"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    ANIMATED = "animated"
    TOO_SMALL = "too_small"
    TOO_MANY_PIXELS = "too_many_pixels"
    NO_ANSWER = "no_answer"  # every try failed; after the last retry: dead
    OUTSIDE = "outside_folder"
    ROBOTS = "robots_txt"  # its robots.txt disallows the URL, or a hop on the way
    CRAWL_DELAY = "crawl_delay"  # the host asks for longer between requests than fetch.max_crawl_delay_s
    OPT_OUT = "opt_out"  # its headers say not to learn from it
    TAKEN_DOWN = "taken_down"  # someone had it taken down (ingest/takedown.py)


@dataclass(frozen=True)
class Refused:
    reason: Reason
    detail: str
    http_status: int = 0


@dataclass(frozen=True)
class Seen:
    """An image that may be stored."""

    ext: str
    width: int  # px
    height: int


def screen(body: bytes, *, max_pixels: int, min_side: int) -> Seen | Refused:
    """What these bytes are."""
    if not body:
        return Refused(Reason.EMPTY, "0 bytes")
    ext = sniff(body)
    if ext is None:
        return Refused(Reason.NOT_AN_IMAGE, f"begins with {body[:8]!r}")
    try:
        width, height, frames = header(body, ext)
    except _BOMB as e:
        return Refused(Reason.TOO_MANY_PIXELS, f"{ext} header: {e}")
    except _FAULTS as e:
        return Refused(Reason.CORRUPT if ends_well(body, ext) else Reason.TRUNCATED, f"{ext} header: {e}")
    if width * height > max_pixels:
        return Refused(Reason.TOO_MANY_PIXELS, f"{width} x {height} px, over {max_pixels}")
    if min(width, height) < min_side:
        return Refused(Reason.TOO_SMALL, f"{width} x {height} px, a side under {min_side}")
    if frames > 1:
        return Refused(Reason.ANIMATED, f"{ext} of several frames")
    if ext == "jpg" and (scans := body.count(b"\xff\xda")) > MAX_SCANS:
        return Refused(Reason.CORRUPT, f"{scans} scans, over {MAX_SCANS}")
    well = ends_well(body, ext)
    if width * height > SMALL and ext != "jpg" and not well:  # decoding would take its full size in memory to tell us the same
        return Refused(Reason.TRUNCATED, f"{ext} without its end")
    if width * height <= SMALL or not well:
        return _decoded(body, ext) or Seen(ext, width, height)
    return Seen(ext, width, height)


def sniff(body: bytes) -> str | None:
    """By magic bytes; the formats that are stored."""
    if body[:3] == b"\xff\xd8\xff":
        return "jpg"
    if body[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        return "webp"
    if body[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return None


def header(body: bytes, ext: str) -> tuple[int, int, int]:
    """(width, height, 1 or 2 for several frames) without decoding pixels, and without counting a million frames."""
    if ext == "jpg":
        height, width, _, _ = simplejpeg.decode_jpeg_header(body)
        return width, height, 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the cap is ours, and comes next
        with Image.open(io.BytesIO(body), formats=[{"png": "PNG", "webp": "WEBP", "gif": "GIF"}[ext]]) as image:
            return image.width, image.height, 2 if getattr(image, "is_animated", False) else 1


def ends_well(body: bytes, ext: str) -> bool:
    """Whether the file has its end, where its format says what that is."""
    if ext == "jpg":
        return body.endswith(b"\xff\xd9")
    if ext == "png":
        return b"IEND" in body[-TAIL:]
    if ext == "webp":
        return len(body) >= 8 + int.from_bytes(body[4:8], "little")
    return b";" in body[-TAIL:]


def _decoded(body: bytes, ext: str) -> Refused | None:
    """Decode, at an eighth of the size where the format can, to see whether it can be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(body)) as image:
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
    except _BOMB + _FAULTS as e:
        cut = "truncated" in str(e) or not ends_well(body, ext)
        return Refused(Reason.TRUNCATED if cut else Reason.CORRUPT, f"{ext}: {e}")
    return None
