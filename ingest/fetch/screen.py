"""Bytes -> verdict.  By magic bytes and header, before anything is decoded; what the server called it does not count."""

import io
import struct
import warnings
from dataclasses import dataclass
from enum import StrEnum

import simplejpeg
from PIL import Image, UnidentifiedImageError

SMALL = 256 * 256  # px; images up to this are decoded: no file may take its full size in memory to tell us that it is broken
MAX_SCANS = 64  # of a JPEG; a progressive one has about ten, and each may cost a pass over all pixels
MAX_SEGMENTS = 512  # of a JPEG before its pixels; a decoder may join them one by one: a million of 18 bytes took Pillow minutes
MAX_PIECES = {
    "png": 2**14,
    "webp": 2**14,
    "gif": 2**17,
}  # chunks and sub-blocks: 20 MB hold millions, each up to 10 us or 50 bytes to readers
TAIL = 1024  # bytes in which a file's end is looked for: some tools append to it
_ALONE = {b"\x01", *(bytes([0xD0 + n]) for n in range(8))}  # markers without a length: TEM, RST0 to RST7
_FAULTS = (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, struct.error, KeyError, TypeError, IndexError)
_READERS = {"png": ["PNG"], "webp": ["WEBP"], "gif": ["GIF"]}  # of Pillow's sixty, none that was not sniffed
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
    if _pieces(body, ext) > (most := MAX_PIECES.get(ext, 0)):
        return Refused(Reason.CORRUPT, f"over {most} pieces")
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
    if ext == "jpg" and _first_scan(body) == len(body):
        return Refused(Reason.CORRUPT, f"no pixels within {MAX_SEGMENTS} segments")
    if width * height <= SMALL:
        return _decoded(body, ext) or Seen(ext, width, height)
    return Seen(ext, width, height) if ends_well(body, ext) else Refused(Reason.TRUNCATED, f"{ext} without its end")


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
        warnings.simplefilter("ignore")  # of bombs: the cap is ours, and comes next; of the rest: nobody is to fill our log
        with Image.open(io.BytesIO(body), formats=_READERS[ext]) as image:
            return image.width, image.height, 2 if getattr(image, "is_animated", False) else 1


def ends_well(body: bytes, ext: str) -> bool:
    """Whether the file has its end, where its format says what that is."""
    if ext == "jpg":  # some tools append to it, far more than TAIL: then its end stands behind where its pixels begin
        return body.endswith(b"\xff\xd9") or body.find(b"\xff\xd9", _first_scan(body)) >= 0
    if ext == "png":
        return b"IEND" in body[-TAIL:]
    if ext == "webp":
        return len(body) >= 8 + int.from_bytes(body[4:8], "little")
    return b";" in body[-TAIL:]


def _first_scan(body: bytes) -> int:
    """Where a JPEG's pixels begin: behind its tables and comments, a thumbnail with an end of its own among them.

    The file's length where that is not within MAX_SEGMENTS.
    """
    at = 2
    for _ in range(MAX_SEGMENTS):
        marker = body[at + 1 : at + 2]
        if body[at : at + 1] != b"\xff" or not marker:
            break
        if marker == b"\xda":
            return at
        if marker == b"\xff":  # what fills up before a marker
            at += 1
        else:  # all others but a few say how long they are
            at += 2 if marker in _ALONE else 2 + max(2, int.from_bytes(body[at + 2 : at + 4], "big"))
    return len(body)


def _pieces(body: bytes, ext: str) -> int:
    """Of a PNG, a WebP or a GIF's first picture; to its end, or to where there are too many."""
    found, at, pictures = 0, 8, 0
    if ext == "png":
        while at + 8 <= len(body) and found <= MAX_PIECES[ext] and body[at + 4 : at + 8] != b"IEND":
            at += 12 + int.from_bytes(body[at : at + 4], "big")
            found += 1
    if ext == "webp":
        at = 12
        while at + 8 <= len(body) and found <= MAX_PIECES[ext]:
            size = int.from_bytes(body[at + 4 : at + 8], "little")
            at += 8 + size + size % 2
            found += 1
    if ext == "gif" and len(body) > 13:
        at = 13 + _colours(body[10])
        while at + 10 < len(body) and found <= MAX_PIECES[ext] and body[at] in b"!,":
            pictures += body[at] == 0x2C
            if pictures > 1:
                break  # nobody reads further: it is animated
            at += 2 if body[at] == 0x21 else 11 + _colours(body[at + 9])  # an extension and its label; a picture and its code size
            while at < len(body) and body[at] and found <= MAX_PIECES[ext]:
                at += 1 + body[at]
                found += 1
            at, found = at + 1, found + 1
    return found


def _colours(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _decoded(body: bytes, ext: str) -> Refused | None:
    """Decode a small image, to see whether it can be.  A JPEG without Pillow, which would keep all that is said beside the pixels."""
    try:
        if ext == "jpg":
            simplejpeg.decode_jpeg(body, "CMYK" if simplejpeg.decode_jpeg_header(body)[2] == "CMYK" else "GRAY")
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(body), formats=_READERS[ext]) as image:
                image.load()
    except _BOMB + _FAULTS as e:
        cut = "truncated" in str(e) or "Premature end" in str(e) or not ends_well(body, ext)
        return Refused(Reason.TRUNCATED if cut else Reason.CORRUPT, f"{ext}: {e}")
    return None
