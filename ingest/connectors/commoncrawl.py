"""The images that Common Crawl's archives name: WAT metadata (what a page links to) and WARC responses (the pages themselves).

The cursor: the file's number in the list and its name, the byte at which its next record begins, how many links of that record were told,
and whether that byte is still to be looked for.  Under 4 KiB.  A record is told from its bytes alone, so it names its candidates as before.

Files over http are read in windows of a megabyte by Range requests; a connection that breaks costs that window.  A record that is broken,
truncated or over the cap is refused, and reading goes on at the next gzip member; a file that is not there is refused, and the next one read.
"""

import gzip
import logging
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from ingest.connectors.archive import Broken, Tape, links, seek, unpack
from ingest.connectors.base import BATCH, Cursor, Found
from ingest.connectors.http import HttpOptions, Web
from ingest.connectors.offer import offer, refuse
from ingest.fetch.guard import complaint
from streamlearn.contract.errors import ConfigError, Retryable, StreamlearnError

logger = logging.getLogger(__name__)
FORBIDDEN = 403  # Common Crawl's answer to whoever asks too often


class CommonCrawlOptions(HttpOptions):
    files: tuple[str, ...] = ()  # .warc.gz and .wat.gz: paths, or http(s) URLs
    paths: str = ""  # a file that lists more of them, one a line, such as wat.paths.gz
    base: str = "https://data.commoncrawl.org/"  # before relative lines of `paths`; empty: they are local
    max_record_bytes: int = Field(default=4 * 2**20, ge=1024, le=64 * 2**20)  # unpacked; what is larger is refused
    read_s: float = Field(default=5.0, gt=0, le=60)  # of one look; the next one goes on behind it


class Missing(StreamlearnError):
    """A file that cannot be had, now or later."""


class CommonCrawlConnector:
    Options = CommonCrawlOptions

    def __init__(self, name: str, options: CommonCrawlOptions):
        self.name, self.options, self.web = name, options, Web(options)
        self._list: tuple[tuple[float, int], list[str]] | None = None  # of `paths`, as it was when it was last read
        self._tape: tuple[str, Tape] | None = None  # with its window: looks go on within it

    def check(self) -> None:
        if not self.options.files and not self.options.paths:
            raise ConfigError(f"connector {self.name}: files = (): nothing to read; name archives in files, or a list of them in paths")
        for key, path in [*(("files", f) for f in self.options.files), *([("paths", self.options.paths)] if self.options.paths else [])]:
            if _is_url(path) and key == "files":
                if why := complaint(path):
                    raise ConfigError(f"connector {self.name}: files = {path!r}: {why}; name an http or https URL, or a path")
            elif not Path(path).is_file():
                raise ConfigError(f"connector {self.name}: {key} = {path!r}: no such file; mend it, or name another")

    def close(self) -> None:
        self.web.close()

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        files, found, deadline = self._files(), Found(), time.monotonic() + self.options.read_s
        state = self._place(cursor, files)
        before = dict(state)
        try:
            while state["file"] < len(files) and time.monotonic() < deadline:
                self._step(files, state, found)
                if len(found) >= BATCH:
                    found.cursor = before = dict(state)
                    yield found
                    found = Found()
        except Retryable:
            if len(found) or state != before:  # what was read before it counts
                yield Found(found.candidates, found.refused, dict(state))
            raise
        if len(found) or state != before:
            yield Found(found.candidates, found.refused, dict(state))

    def _place(self, cursor: Cursor | None, files: list[str]) -> dict[str, Any]:
        """Where to go on.  Raises Retryable if the list is no longer the one that the cursor was made by."""
        state: dict[str, Any] = {"file": 0, "path": files[0] if files else "", "offset": 0, "link": 0, "seek": False} | dict(cursor or {})
        at = state["file"]
        # at the list's end the last file's name stands, and it still does once the list has grown
        if state["path"] in files[max(0, at - 1) : at + 1] or (not files and at == 0):
            return state
        raise Retryable(
            f"file {at} of the list was {state['path']!r}: put it back where it was, or give the connector a new name", after_s=60.0
        )

    def _step(self, files: list[str], state: dict[str, Any], found: Found) -> None:
        """One record, or one look for the next one.  Raises Retryable."""
        path, offset = files[state["file"]], state["offset"]
        state["path"] = path
        if self._tape is None or self._tape[0] != path:
            self._tape = (path, Tape(lambda at, size: self._read(path, at, size)))
        tape = self._tape[1]
        try:
            if not tape.piece(offset):
                state |= {"file": state["file"] + 1, "offset": 0, "link": 0, "seek": False}
                state["path"] = files[min(state["file"], len(files) - 1)]
            elif state["seek"]:
                there, state["offset"] = seek(tape, offset)
                state["seek"] = not there
            else:
                record, end = unpack(tape, offset, self.options.max_record_bytes)
                if self._tell(record, path, state, found):
                    state |= {"offset": end, "link": 0}
        except Broken as e:
            refuse(found, f"{path}@{offset}", path, str(e))
            state |= {"offset": offset + 1, "link": 0, "seek": True}
        except Missing as e:
            refuse(found, f"{path}@{offset}", path, str(e))
            state |= {"file": state["file"] + 1, "offset": 0, "link": 0, "seek": False}
            state["path"] = files[min(state["file"], len(files) - 1)]

    def _tell(self, record: bytes, path: str, state: dict[str, Any], found: Found) -> bool:
        """Whether all of the record's links are told; else the batch is full."""
        for link in links(record, self.options.max_record_bytes)[state["link"] :]:
            if len(found) >= BATCH:
                return False
            where = f"{path}@{state['offset']} {link.page}"
            offer(found, self.name, link.url, where, license=link.license, alt=link.alt)
            state["link"] += 1
        return True

    def _read(self, path: str, offset: int, size: int) -> bytes:
        """At most `size` bytes; empty behind the end.  Raises Retryable or Missing."""
        if _is_url(path):
            return self._range(path, offset, size)
        try:
            with Path(path).open("rb") as f:
                f.seek(offset)
                return f.read(size)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as e:
            raise Missing(str(e)) from e
        except OSError as e:
            raise Retryable(f"{path}: cannot be read: {e}") from e

    def _range(self, url: str, offset: int, size: int) -> bytes:
        answer = self.web.get(url, {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"})
        if answer.status == 416:
            return b""
        if answer.status == FORBIDDEN:
            raise Retryable(f"{url}: HTTP 403", after_s=30.0)
        if answer.status == 200 and answer.whole:  # no ranges, but small
            return answer.body[offset : offset + size]
        if answer.status != 206:
            raise Missing("the server does no ranges" if answer.status == 200 else f"HTTP {answer.status}")
        place = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", answer.headers.get("Content-Range", "").strip())
        if place is None or int(place[1]) != offset:
            raise Missing(f"Content-Range: {answer.headers.get('Content-Range', '')[:100]!r} for a range from {offset}")
        if len(answer.body) < min(size, int(place[3]) - offset):
            raise Retryable(f"{url}: {len(answer.body)} bytes of a range of {size}")
        return answer.body[:size]

    def _files(self) -> list[str]:
        """Raises Retryable while the list cannot be read."""
        if not self.options.paths:
            return list(self.options.files)
        path = Path(self.options.paths)
        try:
            stat = path.stat()
            if self._list is None or self._list[0] != (stat.st_mtime, stat.st_size):
                with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as f:
                    lines = [line.decode("utf-8", "replace").strip() for line in f]
                self._list = ((stat.st_mtime, stat.st_size), [self._absolute(line) for line in lines if line and not line.startswith("#")])
        except (OSError, EOFError, zlib.error) as e:
            raise Retryable(f"paths = {self.options.paths!r}: cannot be read: {e}", after_s=10.0) from e
        return [*self.options.files, *self._list[1]]

    def _absolute(self, line: str) -> str:
        return line if _is_url(line) or Path(line).is_absolute() else self.options.base + line


def _is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))
