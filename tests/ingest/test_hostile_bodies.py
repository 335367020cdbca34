"""Forty and more bodies that mean harm: each has its verdict, within a bound of memory and time, and the client goes on."""

import asyncio
import gzip
import io
import resource
import struct
import time
import zlib

import pytest
from aiohttp import web
from PIL import Image, PngImagePlugin

from ingest.fetch.client import Client, Fetched, Unanswered
from ingest.fetch.screen import Reason, Refused
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import FetchConfig
from tests.ingest.server import BODIES, huge_png, picture

CONFIG = FetchConfig(
    allow_networks=("127.0.0.0/8",),
    total_timeout_s=3.0,
    attempts=1,
    host_rate=0,
    per_host=64,
    robots=False,
    breaker_failures=0,
    max_bytes=4 * 2**20,
)


def png(width, height, pixels=b"", *, extra=b"", end=True):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(pixels, 9)) + (chunk(b"IEND", b"") if end else b"")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def saved(kind, size=(64, 64), **more):
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, kind, **more)
    return out.getvalue()


def jpeg_with(marker, data, times=1):
    """A good JPEG with segments of a kind behind its first marker."""
    good = picture(5, size=(64, 64))
    return good[:2] + (bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data) * times + good[2:]


def jpeg_of(width, height):
    """A good JPEG whose header tells another size."""
    good = bytearray(picture(5, size=(64, 64)))
    at = good.index(b"\xff\xc0")
    good[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(good)


def text_bomb():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 50_000_000, zip=True)
    return saved("PNG", pnginfo=info)


def gif_of(frames):
    body = b"GIF89a" + struct.pack("<HHBBB", 40, 40, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"!\xf9\x04\0\0\0\0\0" + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\0"
    return body + frame * frames + b";"


PROGRESSIVE = saved("JPEG", progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
ANY_REFUSAL, STORED = "refused", "stored"
GOOD_PNG, GOOD_JPEG = saved("PNG"), picture(7, size=(64, 64))

CASES = {
    # name: (body, reason, or what else may come of it)
    **{name: (body, ANY_REFUSAL) for name, body in BODIES.items()},
    "65k x 65k png": (huge_png(), Reason.TOO_MANY_PIXELS),
    "65k x 65k jpeg": (jpeg_of(65500, 65500), Reason.TOO_MANY_PIXELS),
    "0 x 0 jpeg": (jpeg_of(0, 0), ANY_REFUSAL),
    "png of 2^31 px": (png(2**31 - 1, 1), ANY_REFUSAL),
    "png bomb, good end": (png(7900, 7900, bytes(2**20)), STORED),  # under the cap of pixels: the decoder of the learner refuses it
    "png bomb, no end": (png(7900, 7900, bytes(60 * 2**20), end=False), Reason.TRUNCATED),
    "webp of 16k x 16k": (saved("WEBP", (64, 64))[:20], ANY_REFUSAL),
    "png text bomb": (text_bomb(), ANY_REFUSAL),
    "png icc bomb": (png(64, 64, bytes(20_000), extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000), 9))), None),
    "png without pixels": (png(64, 64, b""), ANY_REFUSAL),
    "png, broken checksum": (GOOD_PNG[:-20] + b"\0" * 20, ANY_REFUSAL),
    "png, a million chunks": (GOOD_PNG[:33] + chunk(b"tEXt", b"a\0b") * 100_000 + GOOD_PNG[33:], None),
    "png, 4 GB chunk": (GOOD_PNG[:33] + b"\xff\xff\xff\xffIDAT" + GOOD_PNG[33:], ANY_REFUSAL),
    "jpeg, 10,000 scans": (PROGRESSIVE[:-2] + SCAN * 10_000 + b"\xff\xd9", Reason.CORRUPT),
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
    "gif of 65,000 px": (b"GIF89a" + struct.pack("<HHBBB", 65000, 65000, 0, 0, 0) + b";", ANY_REFUSAL),
    "svg, entities": (
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>',
        Reason.NOT_AN_IMAGE,
    ),
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


def serve_and_fetch(handler, paths, config=CONFIG):
    async def go():
        app = web.Application()
        app.router.add_get("/{name:.*}", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with Client(config) as client:
                told = [Candidate(url=f"{base}/{p}", source="t", source_ref="", discovered_at="2026-11-21T00:00:00Z") for p in paths]
                return await asyncio.gather(*(client.fetch(candidate) for candidate in told))
        finally:
            await runner.cleanup()

    return asyncio.run(go())


def test_every_body_has_its_verdict_within_bounds():
    names = list(CASES)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()

    async def handler(request):
        return web.Response(body=CASES[names[int(request.match_info["name"])]][0], content_type="image/jpeg")

    found = dict(zip(names, serve_and_fetch(handler, range(len(names)), CONFIG.model_copy(update={"total_timeout_s": 60.0})), strict=True))
    grown, used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.process_time() - began
    assert len(names) >= 50 and grown < 200, f"{grown:.0f} MiB"  # a decoded bomb alone would be 187
    assert used < 60
    for name, result in found.items():
        want = CASES[name][1]
        assert isinstance(result, Fetched if want == STORED else Refused if want is not None else Fetched | Refused), (name, result)
        assert not isinstance(want, Reason) or result.reason == want, (name, result)


async def _raw(request, data):
    """What is no well-formed HTTP, said to the very socket."""
    request.transport.write(data)
    request.transport.close()
    return web.Response()


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
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
    "a header of 4 MB": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 4_000_000 + b"\r\n\r\n",
    "100,000 headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
    "nul in headers": b"HTTP/1.1 200 OK\r\nX-\0: \0\r\nContent-Length: 0\r\n\r\n",
    "redirect to nowhere": b"HTTP/1.1 302 Found\r\nLocation: \r\nContent-Length: 0\r\n\r\n",
    "redirect to bytes": b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\nContent-Length: 0\r\n\r\n",
    "redirect to a megabyte": b"HTTP/1.1 302 Found\r\nLocation: http://a/" + b"a" * 90_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
    "nothing": b"",
}


def test_what_is_no_http_is_left_for_later_or_refused():
    names = list(RAW)

    async def handler(request):
        return await _raw(request, RAW[names[int(request.match_info["name"])]])

    found = dict(zip(names, serve_and_fetch(handler, range(len(names))), strict=True))
    assert not [name for name, r in found.items() if not isinstance(r, Refused | Unanswered) and r.body != GOOD_JPEG], (
        found
    )  # whole, or nothing


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_a_bomb_in_an_encoding_stays_as_small_as_it_came(encoding):
    """10 MB of zeros in 10 kB: nobody asked for an encoding, and nothing is unpacked."""
    bomb = gzip.compress(bytes(10_000_000))

    async def handler(request):
        return web.Response(body=bomb, headers={"Content-Encoding": encoding, "Content-Type": "image/jpeg"})

    (result,) = serve_and_fetch(handler, ["x"])
    assert isinstance(result, Refused) and result.reason == Reason.NOT_AN_IMAGE
