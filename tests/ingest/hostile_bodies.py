"""Bodies and answers that mean harm, and what is to come of them."""

import gzip
import io
import itertools
import struct
import zlib

from PIL import Image, PngImagePlugin

from ingest.fetch.screen import Reason
from tests.ingest.server import BODIES, huge_png, picture


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, pixels=b"", *, extra=b"", end=True, interlace=0):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(pixels, 9)) + (chunk(b"IEND", b"") if end else b"")


def saved(kind, size=(64, 64), **more):
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, kind, **more)
    return out.getvalue()


def jpeg_with(marker, data, times=1):
    """A good JPEG with segments of a kind behind its first marker."""
    good = picture(5, size=(64, 64))
    return good[:2] + (bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data) * times + good[2:]


def jpeg_of(width, height, good=None):
    """A good JPEG whose header tells another size."""
    good = bytearray(good or picture(5, size=(64, 64)))
    at = max(good.find(b"\xff\xc0"), good.find(b"\xff\xc2"))
    good[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(good)


def text_bomb():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 50_000_000, zip=True)
    return saved("PNG", pnginfo=info)


def _comment(jpeg, text):
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(text) + 2) + text + jpeg[2:]


def _segment(source, jpeg):
    """The frame header of one JPEG, put before the first scan of another."""
    at, to = source.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    return jpeg[:to] + source[at : at + 19] + jpeg[to:]


def gif_of(frames, width=1, height=1):
    body = b"GIF89a" + struct.pack("<HHBBB", 40, 40, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"!\xf9\x04\0\0\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02D\x01\0"
    return body + frame * frames + b";"


def _in_gif(block):
    good = saved("GIF")
    at = 13 + 3 * 2 ** ((good[10] & 7) + 1)  # behind its colours
    return good[:at] + block + good[at:]


def webp_of(width, height):
    """Forty bytes that are a lossless WebP of any size: one colour takes no bits at all."""
    good = bytearray(saved("WEBP", lossless=True))
    at = good.index(b"VP8L") + 9
    good[at : at + 4] = ((width - 1) | (height - 1) << 14 | int.from_bytes(good[at : at + 4], "little") >> 28 << 28).to_bytes(4, "little")
    return bytes(good)


def riff(*chunks):
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width, height, flags=0):
    return b"VP8X", bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def exif(entries, count=2**28):
    """A TIFF directory, each entry of which promises a gigabyte, or points back to the directory."""
    head = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", entries)
    return (head + b"".join(struct.pack(">HHII", 0x8769 if n % 2 else 0x100 + n, 4, count, 8) for n in range(entries)))[:65_000]


PROGRESSIVE = saved("JPEG", progressive=True, subsampling=0)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
ANY_REFUSAL, STORED = "refused", "stored"
GOOD_PNG, GOOD_JPEG, GOOD_WEBP, GOOD_GIF = saved("PNG"), picture(7, size=(64, 64)), saved("WEBP", lossless=True), saved("GIF")

CASES = {
    # name: (body, reason, or what else may come of it)
    **{name: (body, ANY_REFUSAL) for name, body in BODIES.items()},
    "65k x 65k png": (huge_png(), Reason.TOO_MANY_PIXELS),
    "65k x 65k jpeg": (jpeg_of(65500, 65500), Reason.TOO_MANY_PIXELS),
    "0 x 0 jpeg": (jpeg_of(0, 0), ANY_REFUSAL),
    "png of 2^31 px": (png(2**31 - 1, 1), ANY_REFUSAL),
    "png bomb, good end": (png(7900, 7900, bytes(2**20)), STORED),  # under the cap of pixels: the decoder of the learner refuses it
    "png bomb, no end": (png(7900, 7900, bytes(60 * 2**20), end=False), Reason.TRUNCATED),
    "webp of 16k x 16k": (webp_of(16383, 16383), Reason.TOO_MANY_PIXELS),
    "webp bomb": (webp_of(7900, 7900), STORED),  # likewise
    "webp bomb, no end": (webp_of(7900, 7900)[:-2], ANY_REFUSAL),
    "webp, a canvas of 16k x 16k": (riff(canvas(2**14, 2**14), (b"VP8L", webp_of(2**14, 2**14)[20:])), Reason.TOO_MANY_PIXELS),
    "webp, a canvas of 2^48 px": (riff(canvas(2**24, 2**24), (b"VP8L", GOOD_WEBP[20:])), ANY_REFUSAL),
    "webp, smaller than its canvas": (riff(canvas(7000, 7000), (b"VP8L", GOOD_WEBP[20:])), ANY_REFUSAL),
    "webp, animated, 16k x 16k": (riff(canvas(2**14, 2**14, 2), (b"ANIM", bytes(6)), (b"ANMF", bytes(16) + GOOD_WEBP[12:])), ANY_REFUSAL),
    "webp, icc of 3 MB": (riff(canvas(64, 64, 0x20), (b"ICCP", bytes(3_000_000)), (b"VP8L", GOOD_WEBP[20:])), None),
    "webp, a million chunks": (riff(canvas(64, 64), *[(b"abcd", b"")] * 10**6, (b"VP8L", GOOD_WEBP[20:])), Reason.CORRUPT),
    "webp, exif of 3 MB": (riff(canvas(64, 64, 8), (b"VP8L", GOOD_WEBP[20:]), (b"EXIF", exif(5000) * 46)), None),
    "png text bomb": (text_bomb(), ANY_REFUSAL),
    "png icc bomb": (png(64, 64, bytes(20_000), extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000), 9))), None),
    "png bomb, interlaced": (png(7900, 7900, bytes(2**20), interlace=1), STORED),
    "png, a hundred texts of a megabyte": (
        GOOD_PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6), 9)) * 100 + GOOD_PNG[33:],
        None,
    ),
    "png, a second header of 65k x 65k": (GOOD_PNG[:33] + huge_png()[8:33] + GOOD_PNG[33:], ANY_REFUSAL),
    "png, a second header behind its pixels": (GOOD_PNG[:-12] + huge_png()[8:33] + GOOD_PNG[-12:], None),
    "png, exif that promises gigabytes": (GOOD_PNG[:33] + chunk(b"eXIf", exif(5000)[6:]) + GOOD_PNG[33:], None),
    "png, then zip": (GOOD_PNG + b"PK\x03\x04" + bytes(500), STORED),
    "png without pixels": (png(64, 64, b""), ANY_REFUSAL),
    "png, broken checksum": (GOOD_PNG[:-20] + b"\0" * 20, ANY_REFUSAL),
    "png, a million texts": (GOOD_PNG[:33] + chunk(b"tEXt", b"a\0b") * 10**6 + GOOD_PNG[33:], Reason.CORRUPT),
    "png, a million empty pieces": (GOOD_PNG[:33] + chunk(b"IDAT", b"") * 10**6 + GOOD_PNG[33:], Reason.CORRUPT),
    "png, ten thousand texts": (GOOD_PNG[:33] + chunk(b"tEXt", b"a\0b") * 10**4 + GOOD_PNG[33:], None),
    "png, 4 GB chunk": (GOOD_PNG[:33] + b"\xff\xff\xff\xffIDAT" + GOOD_PNG[33:], ANY_REFUSAL),
    "jpeg, 10,000 scans": (PROGRESSIVE[:-2] + SCAN * 10_000 + b"\xff\xd9", Reason.CORRUPT),
    "progressive jpeg of 64 MP, no end": (jpeg_of(8000, 8000, PROGRESSIVE[:-2]), Reason.TRUNCATED),  # to decode it took 367 MiB
    "progressive jpeg of 64 MP, 60 scans, no end": (jpeg_of(8000, 8000, PROGRESSIVE[:-2] + SCAN * 50), Reason.TRUNCATED),
    "progressive jpeg of 64 MP, an end in its comment": (jpeg_of(8000, 8000, _comment(PROGRESSIVE[:-2], GOOD_JPEG)), Reason.TRUNCATED),
    "jpeg of 64 MP, no end": (jpeg_of(8000, 8000, GOOD_JPEG[:-2]), Reason.TRUNCATED),
    "jpeg, a second frame of 65k x 65k": (_segment(jpeg_of(65000, 65000), GOOD_JPEG), ANY_REFUSAL),
    "jpeg, a million comments": (jpeg_with(0xFE, b"", 10**6), Reason.CORRUPT),
    "jpeg, a million pieces of exif": (jpeg_with(0xE1, b"Exif\0\0" + bytes(8), 10**6), Reason.CORRUPT),  # quadratic to whoever joins them
    "jpeg, 500 pieces of exif": (jpeg_with(0xE1, b"Exif\0\0" + bytes(40_000), 500), None),
    "jpeg, a million fillings": (GOOD_JPEG[:2] + b"\xff" * 10**6 + GOOD_JPEG[2:], ANY_REFUSAL),
    "jpeg, exif that promises gigabytes": (jpeg_with(0xE1, exif(5000)), None),
    "jpeg, several pictures that promise gigabytes": (jpeg_with(0xE2, b"MPF\0" + exif(5000)[6:]), None),
    "jpeg, exif of 64 kB x 50": (jpeg_with(0xE1, b"Exif\0\0" + bytes(65_000), 50), None),
    "jpeg, exif that points to itself": (jpeg_with(0xE1, b"Exif\0\0MM\0*\0\0\0\x08" + b"\0\x01\x87i\0\x04\0\0\0\x01\0\0\0\x08" * 9), None),
    "jpeg, icc of 255 parts": (jpeg_with(0xE2, b"ICC_PROFILE\0\x01\xff" + bytes(60_000), 60), None),
    "jpeg, comments": (jpeg_with(0xFE, bytes(60_000), 60), None),
    "jpeg, segment beyond the end": (GOOD_JPEG[:2] + b"\xff\xe1\xff\xff" + GOOD_JPEG[2:400], ANY_REFUSAL),
    "jpeg, only markers": (b"\xff\xd8" + b"\xff" * 100_000 + b"\xff\xd9", ANY_REFUSAL),
    "jpeg, then html": (GOOD_JPEG + b"<script>alert(1)</script>", STORED),
    "jpeg, then zip": (GOOD_JPEG + b"PK\x03\x04" + bytes(1000), STORED),
    "html that begins like a jpeg": (b"\xff\xd8\xff<html>" + bytes(2000), ANY_REFUSAL),
    "gif89a/*javascript": (b"GIF89a/*" + bytes(500) + b"*/=1;", ANY_REFUSAL),
    "gif of 100,000 frames": (gif_of(100_000), Reason.ANIMATED),
    "gif, a frame larger than its screen": (gif_of(1, width=65535, height=65535), Reason.TOO_MANY_PIXELS),
    "gif, a frame without its pixels": (gif_of(1, width=7900, height=7900), STORED),
    "gif, a comment of 3 MB": (_in_gif(b"!\xfe" + (b"\xff" + b"a" * 255) * 12_000 + b"\0"), STORED),
    "gif, a comment of a million pieces": (_in_gif(b"!\xfe" + b"\1a" * 10**6 + b"\0"), Reason.CORRUPT),
    "gif, a million comments": (_in_gif(b"!\xfe\1a\0" * 10**6), Reason.CORRUPT),
    "gif, a million times how it is to be shown": (_in_gif(b"!\xf9\4\0\0\0\0\0" * 10**6), Reason.CORRUPT),
    "gif, a million pieces of a picture": (saved("GIF")[:-2] + b"\1a" * 10**6 + b"\0;", Reason.CORRUPT),
    "gif, colours but no picture": (b"GIF89a" + struct.pack("<HHBBB", 40, 40, 0xF7, 0, 0) + bytes(768) + b";", ANY_REFUSAL),
    "gif of 65,000 px": (b"GIF89a" + struct.pack("<HHBBB", 65000, 65000, 0, 0, 0) + b";", ANY_REFUSAL),
    "svg, entities": (
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>',
        Reason.NOT_AN_IMAGE,
    ),
    "svg, in utf-16": ("\ufeff<svg/>".encode("utf-16"), Reason.NOT_AN_IMAGE),
    "svg, packed": (gzip.compress(b"<svg/>" * 10**6), Reason.NOT_AN_IMAGE),
    "svg, whose file lies elsewhere": (b'<svg><image href="file:///etc/passwd"/></svg>', Reason.NOT_AN_IMAGE),
    "avif": (b"\0\0\0\x1cftypavif" + bytes(100), Reason.NOT_AN_IMAGE),
    "heic": (b"\0\0\0\x1cftypheic" + bytes(100), Reason.NOT_AN_IMAGE),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), Reason.NOT_AN_IMAGE),
    "jpeg xl": (b"\xff\x0a" + bytes(100), Reason.NOT_AN_IMAGE),
    "mp4": (b"\0\0\0\x18ftypmp42" + bytes(100), Reason.NOT_AN_IMAGE),
    "a program": (b"\x7fELF\2\1\1" + bytes(100), Reason.NOT_AN_IMAGE),
    "pdf": (b"%PDF-1.7\n" + bytes(1000), Reason.NOT_AN_IMAGE),
    "tiff": (b"II*\0" + bytes(1000), Reason.NOT_AN_IMAGE),
    "bmp": (saved("BMP"), Reason.NOT_AN_IMAGE),
    "ico": (saved("ICO"), Reason.NOT_AN_IMAGE),
    "psd": (b"8BPS" + bytes(1000), Reason.NOT_AN_IMAGE),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Reason.NOT_AN_IMAGE),
    "zip": (b"PK\x03\x04" + bytes(1000), Reason.NOT_AN_IMAGE),
    "gzip of a jpeg": (gzip.compress(GOOD_JPEG), Reason.NOT_AN_IMAGE),
    "a byte": (b"\xff", Reason.NOT_AN_IMAGE),
    "riff, no webp": (b"RIFF\x10\0\0\0WAVE" + bytes(100), Reason.NOT_AN_IMAGE),
    "webp, 4 GB": (b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(100), ANY_REFUSAL),
    "webp, lossless header only": (b"RIFF\x1e\0\0\0WEBPVP8L\x11\0\0\0/" + b"\xff" * 16, ANY_REFUSAL),
}


RAW = {
    "length too long": b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + GOOD_JPEG[:1000],
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 9999\r\n\r\n" + GOOD_JPEG,
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n" + GOOD_JPEG,
    "length of a billion digits": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n" + GOOD_JPEG,
    "chunk that never comes": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nabc",
    "chunk of letters": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "no status": GOOD_JPEG,
    "http/0.9": b"<html>hello</html>",
    "status of words": b"HTTP/1.1 OK fine\r\n\r\n",
    "20,000 interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
    "a header of 4 MB": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 4_000_000 + b"\r\n\r\n",
    "100,000 headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
    "nul in headers": b"HTTP/1.1 200 OK\r\nX-\0: \0\r\nContent-Length: 0\r\n\r\n",
    "redirect to nowhere": b"HTTP/1.1 302 Found\r\nLocation: \r\nContent-Length: 0\r\n\r\n",
    "redirect to bytes": b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\nContent-Length: 0\r\n\r\n",
    "redirect to a megabyte": b"HTTP/1.1 302 Found\r\nLocation: http://a/" + b"a" * 90_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
    "nothing": b"",
}

OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    # name: pieces of an answer that never ends; a number: seconds between the next ones; None: silence
    "slow-loris: a header, a byte at a time": itertools.chain([OK, 0.05], itertools.repeat(b"X")),
    "slow-loris: headers without end": itertools.chain([OK, 0.05], itertools.repeat(b"X: a\r\n")),
    "slow-loris: a body, a byte at a time": itertools.chain(
        [OK + b"Content-Length: 9999\r\n\r\n\xff\xd8\xff", 0.05], itertools.repeat(b"\0")
    ),
    "slow-loris: chunks of a byte": itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n", 0.05], itertools.repeat(b"1\r\n\0\r\n")),
    "not a word": [None],
    "headers, and not a word more": [OK, None],
    "a good picture, and not its end": [OK + b"Content-Length: 99999\r\n\r\n" + GOOD_JPEG, None],
    "endless headers": itertools.chain([OK], itertools.repeat(b"X: a\r\n" * 5000)),
    "an endless header": itertools.chain([OK + b"X: "], itertools.repeat(b"a" * 50_000)),
    "an endless folded header": itertools.chain([OK + b"X: a\r\n"], itertools.repeat(b" b\r\n" * 9000)),
    "an endless body": itertools.chain([OK + b"\r\n\xff\xd8\xff"], itertools.repeat(bytes(10**6))),
    "an endless body of chunks": itertools.chain(
        [OK + b"Transfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"186a0\r\n" + bytes(10**5) + b"\r\n")
    ),
    "an endless chunk extension": itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n1;"], itertools.repeat(b"a" * 50_000)),
    "endless trailers": itertools.chain([OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"], itertools.repeat(b"X: a\r\n" * 5000)),
    "endless interim answers": itertools.repeat(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 1000),
    "an endless answer of zeros": itertools.repeat(bytes(10**5)),
    "ten gigabytes announced": itertools.chain([OK + b"Content-Length: 10737418240\r\n\r\n"], itertools.repeat(bytes(10**6))),
    "ten gigabytes after a page that says no": itertools.chain([b"HTTP/1.1 404 No\r\n\r\n"], itertools.repeat(bytes(10**6))),
}
