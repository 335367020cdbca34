"""Uploads to Wikimedia's wikis, from EventStreams (server-sent events).

The cursor: the id of the last event seen (the text that Last-Event-ID takes, at most 8,192 characters) and a mark of each of the last 1,000
uploads told, 8 bytes each: at most 17 KiB.  A connection stays open between two calls of `discover`; a thread reads it into a queue that
holds 4 MiB, and a full queue stops the sender.  Whoever comes with another cursor than the last one given out gets a new connection from there.

An image's address is its place on upload.wikimedia.org: the first digits of the MD5 of its name, as MediaWiki documents it
($wgHashedUploadDirectory).  Special:FilePath would say the same, for a second request and a redirect on a host whose robots.txt
forbids /wiki/Special: to robots.
"""

import hashlib
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from urllib.parse import quote

import urllib3
from pydantic import Field
from urllib3.exceptions import HTTPError

from ingest.connectors.base import BATCH, Cursor, Found
from ingest.connectors.http import HttpOptions, Web
from ingest.connectors.offer import IMAGE_EXTENSIONS, Marks, mark, offer, refuse
from ingest.connectors.sse import Event, Events
from ingest.fetch.guard import complaint
from streamlearn.contract.errors import ConfigError, Retryable

logger = logging.getLogger(__name__)
TOLD = 1000
ID_CHARS = 8192
CHUNK, CHUNKS = 65536, 64
RECORD_S = 10.0  # how often the place is recorded while nothing is uploaded


class WikimediaOptions(HttpOptions):
    stream: str = "https://stream.wikimedia.org/v2/stream/recentchange"  # another of EventStreams' addresses, or a mirror
    wikis: tuple[str, ...] = Field(default=("commonswiki",), min_length=1)  # database names
    files: str = "https://upload.wikimedia.org/wikipedia/"  # where the files of all wikis lie
    read_s: float = Field(default=2.0, gt=0, le=30)  # of one look at the stream
    timeout_s: float = Field(default=30.0, gt=0, le=600)  # without a byte: the connection is dead (in a thread: nobody waits for it)


class WikimediaConnector:
    Options = WikimediaOptions

    def __init__(self, name: str, options: WikimediaOptions):
        self.name, self.options, self.web = name, options, Web(options)
        self._at: Cursor | None = None  # last given out; _events, _reader and _last_id are beyond it
        self._recorded = 0.0  # monotonic: when it was
        self._reader: Reader | None = None
        self._parser = Events()
        self._events: deque[Event] = deque()
        self._last_id = ""
        self._not_before = 0.0  # monotonic: the next connection

    def check(self) -> None:
        for key, url in (("stream", self.options.stream), ("files", self.options.files)):
            if why := complaint(url):
                raise ConfigError(f"connector {self.name}: {key} = {url!r}: {why}; name an http or https URL")
        for wiki in self.options.wikis:
            if not (wiki.endswith("wiki") and wiki.replace("_", "").isalnum() and wiki.isascii() and len(wiki) > 4):
                raise ConfigError(f"connector {self.name}: wikis = {wiki!r}: no database name; such as commonswiki or dewiki")

    def close(self) -> None:
        if self._reader is not None:
            self._reader.stop()
        self.web.close()

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        if self._at is None or (cursor or {}) != self._at:
            self._go_back_to(cursor or {})
        told, found, deadline = Marks((cursor or {}).get("told"), TOLD), Found(), time.monotonic() + self.options.read_s
        while True:
            while self._events:
                self._take(self._events.popleft(), told, found)
                if len(found) >= BATCH:
                    yield self._place(found, told)
                    found = Found()
            if time.monotonic() >= deadline or not self._read(deadline):
                break
        if len(found) or (self._last_id != (self._at or {}).get("id", "") and time.monotonic() - self._recorded > RECORD_S):
            yield self._place(found, told)
        if self._reader is not None and self._reader.finished():
            self._hang_up(self._reader)

    def _go_back_to(self, cursor: Cursor) -> None:
        """What was read beyond the cursor was not recorded: it is read again."""
        if self._reader is not None:
            self._reader.stop()
        self._reader, self._at, self._last_id = None, dict(cursor), str(cursor.get("id", ""))
        self._events.clear()

    def _place(self, found: Found, told: Marks) -> Found:
        self._at = found.cursor = {"id": self._last_id, "told": told.dump()}
        self._recorded = time.monotonic()
        return found

    def _read(self, deadline: float) -> bool:
        """The next chunk's events, within the time; false if there is none."""
        if self._reader is None:
            if time.monotonic() < self._not_before:
                return False
            self._parser = Events(self._last_id)
            self._reader = Reader(self.web, self.options.stream, self._last_id)
        chunk = self._reader.read(deadline)
        if chunk is not None:
            self._events += self._parser.feed(chunk)
        return chunk is not None

    def _hang_up(self, reader: "Reader") -> None:
        """Raises Retryable if the connection did not simply end.  The next one begins where this one ended."""
        after_s = max((self._parser.retry_ms or 1000) / 1000, reader.error.after_s if reader.error else 0.0)
        self._not_before, self._reader = time.monotonic() + min(after_s, 3600.0), None
        logger.info("connector %s: the stream ended; connecting again in %.1f s", self.name, after_s)
        if reader.error is not None:
            raise Retryable(str(reader.error), after_s=after_s) from reader.error

    def _take(self, event: Event, told: Marks, found: Found) -> None:
        if len(event.id) <= ID_CHARS:
            self._last_id = event.id
        if event.spoilt:
            return refuse(found, self.options.stream, "an event", "over the cap of a line or an event")
        try:
            change = json.loads(event.data)
        except (ValueError, RecursionError) as e:
            return refuse(found, self.options.stream, event.data[:500], f"not JSON: {e}")
        if not isinstance(change, dict):
            return refuse(found, self.options.stream, event.data[:500], "not an object")
        wiki, title = change.get("wiki"), change.get("title")
        if (
            wiki not in self.options.wikis
            or change.get("type") != "log"
            or change.get("log_type") != "upload"
            or change.get("namespace") != 6
        ):
            return None
        if not isinstance(title, str) or not title.lower().endswith(IMAGE_EXTENSIONS):
            return None  # a PDF, a sound, a film
        meta = change.get("meta")
        number = change.get("log_id", meta.get("id") if isinstance(meta, dict) else None)
        if not isinstance(number, int | str):
            return refuse(found, self.options.stream, title, "neither log_id nor meta.id")
        if (made := mark(str(wiki), str(number)[:100])) not in told:
            told.add([made])
            name = title.partition(":")[2] or title  # the namespace has another name in every language
            alt = name.rpartition(".")[0].replace("_", " ")
            offer(found, self.name, file_url(self.options.files, str(wiki), name), f"{wiki} upload {number}", alt=alt)
        return None


def file_url(files: str, wiki: str, name: str) -> str:
    """Where the newest version of a wiki's file lies."""
    name = name.strip().replace(" ", "_")
    digest = hashlib.md5(name.encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
    folder = wiki.removesuffix("wiki").replace("_", "-")
    return f"{files}{folder}/{digest[0]}/{digest[:2]}/{quote(name, safe='', errors='replace')}"


class Reader:
    """A thread that reads one connection into a bounded queue, until it ends or is stopped."""

    def __init__(self, web: Web, url: str, last_id: str):
        self.error: Retryable | None = None
        self._chunks: queue.Queue[bytes | None] = queue.Queue(CHUNKS)
        self._ended, self._stopped = False, threading.Event()
        self._response: urllib3.BaseHTTPResponse | None = None
        threading.Thread(target=self._work, args=(web, url, last_id), name="connector-stream", daemon=True).start()

    def read(self, deadline: float) -> bytes | None:
        """The next chunk; None if there is none until the deadline (monotonic), or none at all any more."""
        if self._ended:
            return None
        try:
            chunk = self._chunks.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        self._ended = chunk is None
        return chunk

    def finished(self) -> bool:
        return self._ended

    def stop(self) -> None:
        self._stopped.set()
        if (response := self._response) is not None:
            _hang_up(response)

    def _work(self, web: Web, url: str, last_id: str) -> None:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if last_id.isascii() and last_id.isprintable() and last_id:  # else it can be no header: from now on, then
            headers["Last-Event-ID"] = last_id
        try:
            with closing(web.open(url, headers)) as response:
                self._response = response
                while not self._stopped.is_set() and (chunk := response.read1(CHUNK)):
                    self._put(chunk)
        except Retryable as e:
            self.error = e
        except (HTTPError, OSError, ValueError) as e:  # ValueError, OSError: what http.client lets through
            self.error = Retryable(f"{url}: {type(e).__name__}: {e}")
        self._put(None)

    def _put(self, chunk: bytes | None) -> None:
        """Waits for room: so the sender waits."""
        while not self._stopped.is_set():
            with suppress(queue.Full):
                return self._chunks.put(chunk, timeout=0.5)
        return None


def _hang_up(response: urllib3.BaseHTTPResponse) -> None:
    """From another thread than the one that reads: closing would wait for it."""
    with suppress(OSError, ValueError, AttributeError):  # it may have ended by itself at this very moment
        response.shutdown()  # type: ignore[attr-defined]
