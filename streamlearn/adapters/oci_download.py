"""Downloading one blob, going on where it broke off, and checking it.

  1. GET     from the byte that is lacking (Range)
  2. hash    as it comes, with what was there before
  3. rename  the part becomes the file                    <- THE COMMIT POINT

Killed after 1 or 2 a part stays in the spool; the next pull hashes it and asks for the rest.  A registry that sends the whole when asked for
the rest costs time, not correctness.  A part that turns out wrong is dropped and pulled anew; a whole that is wrong is Corrupt.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from urllib3.response import BaseHTTPResponse

from streamlearn.adapters.oci_spool import Spool
from streamlearn.adapters.oci_wire import Wire, unreachable
from streamlearn.contract import durable
from streamlearn.contract.errors import Corrupt, NotFound, Retryable
from streamlearn.contract.oci import CHUNK_BYTES


class Download:
    """One blob on its way here.  `scopes`: of tokens, to pull."""

    def __init__(self, wire: Wire, url: str, scopes: frozenset[str], digest: str):
        self.wire, self.url, self.scopes, self.digest = wire, url, scopes, digest

    def to_file(self, path: Path, spool: Spool) -> None:
        """Raises NotFound, Corrupt, Retryable, StoreFull."""
        try:
            with spool.claim(self.digest.replace(":", "-") + ".part") as part:
                self._fill(part)
                part.chmod(0o644)  # other users read it too
                if part.stat().st_dev == path.parent.stat().st_dev:
                    durable.publish(part, path)
                else:
                    shutil.copyfile(part, path)
                    part.unlink()
        except OSError as e:
            raise durable.translate(e, path) from e

    def into(self, target: BinaryIO) -> int:
        """From its first byte; the size."""
        check = hashlib.sha256()
        size = self._receive(target, check, 0)
        if not self._is(check):
            raise Corrupt(f"{self.url}: {size} bytes with digest sha256:{check.hexdigest()[:12]}…: damaged; push it again")
        return size

    def _fill(self, part: Path) -> None:
        with part.open("a+b") as f:
            f.seek(0)
            check = hashlib.file_digest(f, "sha256")  # of what a killed pull left there
            had = f.tell()
            try:
                if had:
                    self._receive(f, check, had)
                if not self._is(check):  # nothing was there, or not what it seemed
                    f.truncate(0)
                    self.into(f)
            except (Corrupt, NotFound):
                part.unlink()
                raise

    def _is(self, check: Any) -> bool:
        return "sha256:" + check.hexdigest() == self.digest

    def _receive(self, target: BinaryIO, check: Any, have: int) -> int:
        """The rest of it, after `have` bytes that `check` knows; the whole size."""
        failures = 0
        while True:
            before = have
            try:
                headers = {"Range": f"bytes={have}-"} if have else {}
                with self.wire.stream(self.url, self.scopes, headers, (200, 206, 416) if have else (200,)) as answer:
                    if answer.status == 416:  # nothing is left of it
                        return have
                    for fresh in self._lacking(answer, have):
                        target.write(fresh)
                        check.update(fresh)
                        have += len(fresh)
                    told = "Content-Length" in answer.headers or "Transfer-Encoding" in answer.headers
                    if told or self._is(check):
                        return have
                    raise unreachable("GET", self.url, f"the answer ends after {have} bytes and has not said how long it is")
            except NotFound:
                raise NotFound(f"{self.url}: no blob {self.digest}") from None
            except Retryable as e:
                failures = 1 if have > before else failures + 1
                self.wire.pause(e, failures, self.wire.config.attempts)

    def _lacking(self, answer: BaseHTTPResponse, have: int) -> Iterator[bytes]:
        """What comes after the first `have` bytes, whatever part of the blob is sent."""
        start = 0
        if answer.status == 206:
            told = answer.headers.get("Content-Range", "").removeprefix("bytes").strip().split("-")[0]
            start = int(told) if told.isdigit() else have
        if start > have:
            raise unreachable("GET", self.url, f"it begins at byte {start} where {have} was asked for")
        skip = have - start
        while chunk := answer.read(CHUNK_BYTES, decode_content=False):
            yield chunk[skip:]
            skip = max(0, skip - len(chunk))
