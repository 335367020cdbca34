"""Uploading one blob, in chunks, and going on after anything.

  1. POST            the registry opens an upload and says where             noted in the spool
  2. PATCH           a chunk; the registry says how far it has got           noted in the spool
  3. PUT ?digest=    the registry checks the digest                          <- THE COMMIT POINT
  4. HEAD            the blob is there, whole; the note is removed

Killed or cut off after   what is left                    who mends it
  1, 2                    an upload no one sees, a note   the next try asks the upload for its offset (GET, Range) and goes on there; where
                                                          the registry has forgotten it, a new one begins; registries purge old ones
  3                       the blob                        the next try finds it (HEAD) and sends nothing

Not every registry can go on within a chunk: distribution 2.8 forgets an upload whose chunk broke off.  That costs time, not bytes: the blob
is sent anew.  Its offsets are the registry's word; if they were wrong, the digest at 3 tells, and the blob is sent anew, once.
Blobs up to one chunk go whole, with the PUT.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from streamlearn.adapters.oci_spool import Spool
from streamlearn.adapters.oci_wire import REDIRECTS, Reply, Slice, Wire
from streamlearn.contract import durable
from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, NotFound, Retryable

BYTES = {"Content-Type": "application/octet-stream"}
logger = logging.getLogger("streamlearn")


@dataclass(frozen=True)
class Session:
    """An open upload."""

    url: str
    offset: int
    chunk: int  # bytes, as the registry wants them


class _Gone(Exception):
    """The registry has forgotten the upload."""


class Upload:
    """One blob on its way: bytes, or a file that stays as it is."""

    def __init__(self, wire: Wire, api: str, scopes: frozenset[str], spool: Spool, blob: tuple[str, int], content: bytes | Path):
        """`api`: the repository's address; `blob`: digest and size of `content`; `scopes`: of tokens, to push."""
        self.wire, self.api, self.scopes, self.spool, self.content = wire, api, scopes, spool, content
        self.digest, self.size = blob

    def run(self) -> None:
        """Raises Corrupt where the registry twice got another digest."""
        name = hashlib.sha256(f"{self.api} {self.digest}".encode()).hexdigest() + ".upload"
        with self.spool.claim(name) as note:
            for again in (True, False):
                try:
                    self._send(note)
                    break
                except Corrupt as e:
                    note.unlink(missing_ok=True)  # nothing of it is to be gone on with
                    if not again:
                        raise
                    logger.warning("%s; it is sent anew", e)
            note.unlink(missing_ok=True)

    def present(self) -> bool:
        """The registry has it, whole."""
        try:
            found = self.wire.ask("HEAD", f"{self.api}/blobs/{self.digest}", self.scopes, good=(200, *REDIRECTS))
        except NotFound:
            return False
        return found.status != 200 or found.headers.get("Content-Length", str(self.size)) == str(self.size)

    def _send(self, note: Path) -> None:
        session, failures, begun = self._resumed(note), 0, 0
        while True:
            try:
                if session is None:
                    session, begun = self._begun(note), begun + 1
                while self.size > session.chunk and session.offset < self.size:
                    session, failures = self._chunk(session, note), 0
                self._finish(session)
                break
            except (Retryable, _Gone) as e:
                failures = max(failures + 1, begun)  # a line that breaks after some chunks, each time, is no progress
                fault = (
                    e if isinstance(e, Retryable) else Retryable(f"{self.api}: uploads of {self.digest} are forgotten: {e}", after_s=1.0)
                )
                self.wire.pause(fault, failures, self.wire.config.attempts)
                if self.present():  # the reply to the PUT was lost
                    return
                resumable = session is not None and self.size > session.chunk and not isinstance(e, _Gone)
                session = self._state(session) if session is not None and resumable else None
        if not self.present():
            raise Corrupt(f"{self.api}: blob {self.digest} was taken, but is not there with its {self.size} bytes")

    def _begun(self, note: Path) -> Session:
        reply = self.wire.ask("POST", f"{self.api}/blobs/uploads/", self.scopes, body=b"", good=(202,))
        least = reply.headers.get("OCI-Chunk-Min-Length", "0")
        chunk = max(self.wire.config.chunk_bytes, int(least) if least.isdigit() else 0)
        return self._noted(Session(reply.location(), 0, chunk), note)

    def _resumed(self, note: Path) -> Session | None:
        try:
            told = json.loads(note.read_bytes())
            session = Session(told["url"], told["offset"], told["chunk"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return self._state(session)

    def _state(self, session: Session) -> Session | None:
        """How far the registry has got; None where it has forgotten, or says what cannot be."""
        try:
            reply = self.wire.ask("GET", session.url, self.scopes, good=(204, 200, 202))
        except (NotFound, ConfigError, Conflict, Corrupt) as e:
            logger.info("an upload cannot be resumed: %s", e)
            return None
        offset = _offset(reply)
        if not offset or offset > self.size:  # nothing of it, or one byte: both are "0-0"
            return None
        logger.info("%s: goes on at %d of %d bytes of %s", self.api, offset, self.size, self.digest)
        return Session(reply.location() if "Location" in reply.headers else session.url, offset, session.chunk)

    def _chunk(self, session: Session, note: Path) -> Session:
        size = min(session.chunk, self.size - session.offset)
        headers = {**BYTES, "Content-Range": f"{session.offset}-{session.offset + size - 1}"}
        reply = self._ask("PATCH", session.url, self._part(session.offset, size), headers, (202, 204, 201))
        told = _offset(reply)
        offset = session.offset + size if told is None else told
        if not session.offset < offset <= self.size:
            raise _Gone(f"after a chunk it says it has {offset} of {self.size} bytes, and had {session.offset}")
        return self._noted(Session(reply.location(), offset, session.chunk), note)

    def _finish(self, session: Session) -> None:
        whole = session.offset == 0
        url = session.url + ("&" if "?" in session.url else "?") + "digest=" + quote(self.digest, safe="")
        self._ask("PUT", url, self._part(0, self.size) if whole else b"", BYTES, (201, 204))

    def _ask(self, method: str, url: str, body: bytes | Slice, headers: dict[str, str], good: tuple[int, ...]) -> Reply:
        """Once: how far it came is asked before it is sent again."""
        try:
            return self.wire.ask(method, url, self.scopes, body=body, headers=headers, good=good, tries=1)
        except NotFound as e:
            raise _Gone(str(e)) from e
        except ConfigError as e:
            if any(code in str(e) for code in ("status 416", "BLOB_UPLOAD_INVALID", "BLOB_UPLOAD_UNKNOWN", "RANGE_INVALID")):
                raise _Gone(str(e)) from e
            raise

    def _part(self, start: int, size: int) -> bytes | Slice:
        return self.content[start : start + size] if isinstance(self.content, bytes) else Slice(self.content, start, size)

    def _noted(self, session: Session, note: Path) -> Session:
        if self.size > session.chunk:
            durable.write(note, json.dumps({"url": session.url, "offset": session.offset, "chunk": session.chunk}).encode())
        return session


def _offset(reply: Reply) -> int | None:
    """Bytes that the registry has, by its Range: 0-<last>."""
    found = re.fullmatch(r"(?:bytes=)?0-(\d+)", reply.headers.get("Range", ""))
    return None if found is None else int(found[1]) + 1 if found[1] != "0" else 0
