"""Web archives as a tape of gzip members, each a record; and the images that a record names.

Members are unpacked here, with a cap, and only then handed to warcio: it would unpack without one, and a broken member ends its file.
"""

import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed
from warcio.statusandheaders import StatusAndHeadersParserException

from ingest.connectors import html
from streamlearn.contract.errors import StreamlearnError

WINDOW = 2**20  # bytes that are read at once
PIECE = 65536
MAX_LINKS = 1000  # of one record
_MAGIC = re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")  # gzip, deflate, and no reserved flag
_PREVIEWS = {"og:image", "og:image:url", "og:image:secure_url", "twitter:image"}
_CHARSETS = re.compile(  # of pages that are met with; not every codec of Python is harmless on a hostile megabyte
    r"utf-?8|utf-16(le|be)?|us-ascii|iso-8859-\d+|windows-\d+|cp\d+|shift_jis|euc-(jp|kr)|gb2312|gbk|gb18030|big5|koi8-[ru]"
)
_BROKEN = (  # what warcio has been seen to raise on garbage
    ArchiveLoadFailed,
    StatusAndHeadersParserException,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    EOFError,
    OSError,
    zlib.error,
)


class Broken(StreamlearnError):
    """No record; the next member may be one."""


@dataclass(frozen=True)
class Link:
    url: str
    alt: str
    license: str
    page: str


class Tape:
    """A file that is read forward, a window at a time."""

    def __init__(self, read: Callable[[int, int], bytes]):
        self._read, self._start, self._window = read, 0, b""

    def piece(self, offset: int) -> bytes:
        """Some bytes from `offset` on; empty at the end.  Raises what `read` raises."""
        if not self._start <= offset < self._start + len(self._window):
            self._start, self._window = offset, self._read(offset, WINDOW)
        at = offset - self._start
        return self._window[at : at + PIECE]


def unpack(tape: Tape, offset: int, limit: int) -> tuple[bytes, int]:
    """The gzip member at `offset`, at most `limit` bytes of it, and where the next one begins.  Raises Broken."""
    decoder, out, at = zlib.decompressobj(wbits=31), bytearray(), offset
    while not decoder.eof:
        piece = tape.piece(at)
        if not piece:
            raise Broken("truncated: the file ends within a record")
        try:
            out += decoder.decompress(piece, limit + 1 - len(out))
        except zlib.error as e:
            what = "corrupt" if at > offset or _MAGIC.match(piece) else "not gzip (of a plain archive, `warcio recompress` makes one)"
            raise Broken(f"{what}: {e}") from e
        at += len(piece) - len(decoder.unused_data)
        if len(out) > limit or at - offset > limit + PIECE:
            raise Broken(f"over max_record_bytes = {limit}")
    return bytes(out), at


def seek(tape: Tape, offset: int) -> tuple[bool, int]:
    """Looks through one piece for the next member: whether there is one, and where to go on.  At the file's end it stays."""
    piece = tape.piece(offset)
    if found := _MAGIC.search(piece):
        return True, offset + found.start()
    # a magic number may begin in the last three bytes, and end in the next piece or window
    last = piece[-3:]
    if found := _MAGIC.search(last + tape.piece(offset + len(piece))[:3]):
        return True, offset + len(piece) - len(last) + found.start()
    return False, offset + len(piece)


def links(record: bytes, limit: int) -> list[Link]:
    """The images that an unpacked member names, at most MAX_LINKS, always in the same order.  Raises Broken."""
    if not record.startswith(b"WARC/"):  # also a gzip within the gzip, which warcio would unpack without a cap
        raise Broken("no WARC record")
    found: dict[Link, None] = {}
    try:
        for one in ArchiveIterator(io.BytesIO(record)):
            page = one.rec_headers.get_header("WARC-Target-URI") or ""
            if one.rec_type == "metadata" and "json" in (one.rec_headers.get_header("Content-Type") or ""):
                found |= dict.fromkeys(_of_wat(json.loads(one.content_stream().read(limit)), page))
            elif one.rec_type == "response" and one.http_headers is not None:
                kind = (one.http_headers.get_header("Content-Type") or "").lower()
                if "html" in kind:
                    found |= dict.fromkeys(_of_html(one.content_stream().read(limit), kind, page))
    except _BROKEN as e:
        raise Broken(f"{type(e).__name__}: {e}"[:300]) from e
    return list(found)[:MAX_LINKS]


def _of_html(body: bytes, kind: str, page: str) -> Iterator[Link]:
    charset = kind.partition("charset=")[2].strip("\"' ;")
    try:
        text = body.decode(charset if _CHARSETS.fullmatch(charset) else "utf-8", "replace")
    except LookupError:  # iso-8859-99
        text = body.decode("utf-8", "replace")
    read = html.read(text, page)
    for url, alt in read.images:
        yield Link(url, alt, read.license or "", page)


def _of_wat(envelope: Any, page: str) -> Iterator[Link]:
    meta = _inside(envelope, "Envelope", "Payload-Metadata", "HTTP-Response-Metadata", "HTML-Metadata")
    page = _text(_inside(envelope, "Envelope", "WARC-Header-Metadata").get("WARC-Target-URI")) or page
    head = _inside(meta, "Head")
    base = html.join(page, _text(head.get("Base"))) or page
    all_ = [link for part in (meta.get("Links"), head.get("Link")) for link in _dicts(part)]
    licenses = (html.join(base, _text(link.get("url"))) for link in all_ if "license" in _text(link.get("rel")).lower().split())
    license_ = next(filter(None, licenses), "")
    for link in _dicts(meta.get("Links")):
        if _text(link.get("path")) == "IMG@/src" and (url := html.join(base, _text(link.get("url")))):
            yield Link(url, _text(link.get("alt")), license_, page)
    for tag in _dicts(head.get("Metas")):
        name = (_text(tag.get("property")) or _text(tag.get("name"))).lower()
        if name in _PREVIEWS and (url := html.join(base, _text(tag.get("content")))):
            yield Link(url, "", license_, page)


def _inside(value: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
