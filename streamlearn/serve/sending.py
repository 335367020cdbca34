"""Sending a blob: streamed, in flat memory, and never as if whole where its bytes are damaged.

* Whole: hashed while it is sent, and the last piece is kept back until the digest is right.  If it is not, the connection is
  broken off: no client has so many bytes as Content-Length says.  What is small is read once before, so that the answer can say why.
* A part: cannot be checked by itself, so the whole file was read and found sound before, since it last changed (its inode, size and times are
  remembered, in this process).  The first part of a large file that is asked for waits for that: about a second a gigabyte.

A file that is no regular one, a symbolic link for one, is not there.  The file stays open while it is sent, so a collection of garbage
takes nothing away from under a pull.
"""

import asyncio
import hashlib
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.metrics import ServeMetrics
from streamlearn.contract.oci import CHUNK_BYTES
from streamlearn.contract.registry import OciLayout
from streamlearn.serve.asked import asked_range

READ_FIRST = 2**26  # bytes: what is not larger is checked before its first byte is sent
KNOWN = 2**16  # files whose state is remembered
Mark = tuple[int, int, int, int]  # inode, size, times of change
logger = logging.getLogger(__name__)


class File:
    """A blob, open for reading at any place."""

    def __init__(self, path: Path):
        """Raises NotFound."""
        try:  # O_NONBLOCK: a pipe in the way is not waited for
            self.fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise NotFound(f"no blob sha256:{path.name} ({e.strerror})") from e
        found = os.fstat(self.fd)
        self.size, self.regular = found.st_size, stat.S_ISREG(found.st_mode)
        self.mark: Mark = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if not self.regular:
            os.close(self.fd)
            raise NotFound(f"no blob sha256:{path.name} (not a file)")

    def read(self, at: int, count: int) -> bytes:
        return os.pread(self.fd, count, at)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


@dataclass(frozen=True)
class Sent:
    """How a blob is to be sent: a protocol's name for it, and headers of its own."""

    digest: str
    protocol: str  # of metrics.PULLED_BY
    etag: str
    headers: Mapping[str, str]


class Sender:
    def __init__(self, layout: OciLayout, metrics: ServeMetrics):
        self.layout, self.metrics = layout, metrics
        self._sound: dict[tuple[str, Mark], bool] = {}
        self._checks: dict[tuple[str, Mark], asyncio.Task[bool]] = {}

    def read(self, digest: str, most: int) -> bytes:
        """A small blob, verified.  Blocking.  Raises NotFound (also where it is larger), Corrupt."""
        with File(self.layout.path(digest)) as file:
            if file.size > most:
                raise NotFound(f"{digest} has {file.size} bytes: not what was asked for")
            data = file.read(0, file.size)
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise self._damaged(digest)
        return data

    async def send(self, request: web.Request, sent: Sent) -> web.StreamResponse:
        """The answer to GET or HEAD of a blob.  Raises NotFound, Corrupt, Refused."""
        with await asyncio.to_thread(File, self.layout.path(sent.digest)) as file:
            headers = {"ETag": sent.etag, "Accept-Ranges": "bytes", **sent.headers}
            if sent.etag in (request.headers.get("If-None-Match") or ""):
                return web.Response(status=304, headers=headers)
            part = None
            if request.method == "GET" and request.headers.get("If-Range", sent.etag).strip() == sent.etag:
                part = asked_range(request.headers.get("Range"), file.size)
            sound = self._sound.get((sent.digest, file.mark))
            if sound is None and request.method == "GET" and (part or file.size <= READ_FIRST):
                sound = await self._check(sent.digest, file)
            if sound is False:
                raise self._damaged(sent.digest)
            first, last = part or (0, file.size - 1)
            if part:
                headers["Content-Range"] = f"bytes {first}-{last}/{file.size}"
            response = web.StreamResponse(status=206 if part else 200, headers={"Content-Type": "application/octet-stream", **headers})
            response.content_length = last + 1 - first
            await response.prepare(request)
            if request.method == "GET":
                try:
                    await self._stream(request, response, sent, file, part)
                except ConnectionError:  # the client has gone: there is nobody to tell
                    logger.debug("%s was not fetched to its end", sent.digest)
            return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, sent: Sent, file: File, part: tuple[int, int] | None
    ) -> None:
        at, last = part or (0, file.size - 1)
        hashed = hashlib.sha256()
        held = b""
        while at <= last:
            piece = await asyncio.to_thread(_piece, file, at, min(CHUNK_BYTES, last + 1 - at), None if part else hashed)
            if not piece:
                break  # cut short while we read
            at += len(piece)
            await self._write(response, held, sent.protocol)
            held = piece
        if at <= last or (part is None and "sha256:" + hashed.hexdigest() != sent.digest):
            self._remember(sent.digest, file.mark, False)
            self.metrics.corrupt.inc()
            logger.error("%s: broken off", self._damaged(sent.digest))
            if request.transport is not None:
                request.transport.abort()
            return
        if part is None:
            self._remember(sent.digest, file.mark, True)
        await self._write(response, held, sent.protocol)

    async def _write(self, response: web.StreamResponse, data: bytes, protocol: str) -> None:
        if data:
            await response.write(data)
            self.metrics.bytes.labels(protocol).inc(len(data))

    async def _check(self, digest: str, file: File) -> bool:
        """Read the whole of it once, however many ask; who stops waiting stops nothing."""
        key = (digest, file.mark)
        if key not in self._checks:
            self._checks[key] = asyncio.create_task(asyncio.to_thread(self._whole, digest, file.mark))
            self._checks[key].add_done_callback(lambda _: self._checks.pop(key, None))
        return await asyncio.shield(self._checks[key])

    def _whole(self, digest: str, mark: Mark) -> bool:
        hashed, at = hashlib.sha256(), 0
        with File(self.layout.path(digest)) as file:
            if file.mark != mark:
                raise NotFound(f"{digest} was replaced in this moment: ask again")
            while piece := _piece(file, at, CHUNK_BYTES, hashed):
                at += len(piece)
        self._remember(digest, mark, "sha256:" + hashed.hexdigest() == digest)
        return self._sound[digest, mark]

    def _remember(self, digest: str, mark: Mark, sound: bool) -> None:
        if len(self._sound) >= KNOWN:
            self._sound.clear()
        self._sound[digest, mark] = sound

    def _damaged(self, digest: str) -> Corrupt:
        return Corrupt(f"{self.layout.path(digest)}: its bytes are not those of its digest; restore it from another copy")


def _piece(file: File, at: int, count: int, hashed: "hashlib._Hash | None") -> bytes:
    piece = file.read(at, count)
    if hashed is not None:
        hashed.update(piece)
    return piece
