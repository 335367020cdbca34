"""Fetch one image, safely.  What can go wrong, and who acts:

* Refused        a value: counted, dead-lettered, the offset moves on (ingest.fetch.screen.Reason)
* Unanswered     a value: every quick try failed in a way that may pass (5xx, 429, resets, time-outs, DNS): deferred to a retry topic
* anything else  a bug: the process ends with its traceback and is restarted

Caps on connect time, total time, redirects, bytes; addresses checked on the socket (guard.py), every redirect like the first URL;
one TLS context and one connection pool for the process; no proxies, no cookies, no credentials.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp

from ingest.fetch.guard import MARK, Guard, complaint
from ingest.fetch.screen import Reason, Refused, Seen, screen
from streamlearn.contract.candidate import Candidate, politeness_key
from streamlearn.contract.config import FetchConfig
from streamlearn.contract.status import now

CHUNK = 2**16  # bytes
_REDIRECTS = {301, 302, 303, 307, 308}
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Fetched:
    body: bytes
    seen: Seen
    final_url: str
    fetched_at: str
    http_status: int = 0
    etag: str = ""
    last_modified: str = ""


@dataclass(frozen=True)
class Unanswered:
    """No answer yet; `after_s` if the server said when to come back."""

    detail: str
    after_s: float = 0.0


class _Again(Exception):
    """This try failed in a way that may pass."""

    def __init__(self, detail: str, after_s: float = 0.0):
        super().__init__(detail)
        self.after_s = after_s


class Client:
    """One per process.  Use as an async context."""

    def __init__(self, config: FetchConfig, folders: tuple[Path, ...] = ()):
        self.config, self.guard = config, Guard(config.allow_networks)
        self.folders = tuple(folder.resolve() for folder in folders)  # what `file:` candidates may name
        self._hosts: dict[bytes, asyncio.Semaphore] = {}

    async def __aenter__(self) -> "Client":
        connector = aiohttp.TCPConnector(
            limit=self.config.concurrency,
            ssl=ssl.create_default_context(),  # one for all: building it costs tens of milliseconds
            socket_factory=self.guard.socket_factory(),
            ttl_dns_cache=60,
        )
        timeout = aiohttp.ClientTimeout(total=self.config.total_timeout_s, sock_connect=self.config.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": self.config.user_agent, "Accept": "image/*"},
            auto_decompress=False,  # images are not compressed in transit; a gzip bomb is then just a small non-image
            max_line_size=16384,
            max_field_size=16384,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()

    async def fetch(self, candidate: Candidate) -> Fetched | Refused | Unanswered:
        """The image of a candidate, or why there is none."""
        if candidate.url.startswith("file:"):
            return await asyncio.to_thread(self._read_file, candidate.url)
        if why := complaint(candidate.url):
            return Refused(Reason.BAD_URL, why)
        detail, after = "", 0.0
        async with self._host(candidate.url):
            for attempt in range(self.config.attempts):
                if attempt:
                    await asyncio.sleep(self.config.backoff_s * 2 ** (attempt - 1))
                try:
                    return await self._try(candidate.url)
                except _Again as e:
                    detail, after = str(e), e.after_s
                    if after:
                        break  # the server named a time: no quick tries before it
        return Unanswered(detail, after)

    def _host(self, url: str) -> asyncio.Semaphore:
        if len(self._hosts) > 65536:  # forget idle hosts: memory stays flat over months
            self._hosts = {host: busy for host, busy in self._hosts.items() if busy.locked()}
        return self._hosts.setdefault(politeness_key(url), asyncio.Semaphore(self.config.per_host))

    async def _try(self, url: str) -> Fetched | Refused:
        deadline = time.monotonic() + self.config.total_timeout_s
        for _ in range(self.config.max_redirects + 1):
            if why := complaint(url):
                return Refused(Reason.BAD_URL, f"{why} (after a redirect)")
            try:
                async with asyncio.timeout(max(0.001, deadline - time.monotonic())):
                    found = await self._ask(url)
            except TimeoutError:
                raise _Again(f"no whole answer within {self.config.total_timeout_s:g} s") from None
            except (aiohttp.ClientError, OSError) as e:
                if MARK in str(e):
                    return Refused(Reason.ADDRESS, str(e)[str(e).index(MARK) :])
                if isinstance(e, aiohttp.InvalidURL):
                    return Refused(Reason.BAD_URL, str(e))
                raise _Again(f"{type(e).__name__}: {e}") from e
            if not isinstance(found, str):
                return found
            url = urljoin(url, found)
        return Refused(Reason.REDIRECTS, f"more than {self.config.max_redirects}")

    async def _ask(self, url: str) -> Fetched | Refused | str:
        """One request: an image, a refusal, or where it redirects to."""
        async with self._session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECTS and "Location" in answer.headers:
                return answer.headers["Location"]
            if answer.status in _MAY_PASS:
                raise _Again(f"HTTP {answer.status}", _retry_after(answer.headers.get("Retry-After", "")))
            if answer.status != 200:
                return Refused(Reason.GONE, f"HTTP {answer.status}", answer.status)
            if (answer.content_length or 0) > self.config.max_bytes:
                return Refused(Reason.TOO_LARGE, f"{answer.content_length} bytes announced, over {self.config.max_bytes}", 200)
            body = bytearray()
            async for chunk in answer.content.iter_chunked(CHUNK):
                body += chunk
                if len(body) > self.config.max_bytes:  # whatever was announced
                    answer.close()
                    return Refused(Reason.TOO_LARGE, f"over {self.config.max_bytes} bytes", 200)
            etag, modified = answer.headers.get("ETag", "")[:256], answer.headers.get("Last-Modified", "")[:64]
        seen = await self._screen(bytes(body))
        if isinstance(seen, Refused):
            return Refused(seen.reason, seen.detail, 200)
        return Fetched(bytes(body), seen, url, now(), 200, etag, modified)

    async def _screen(self, body: bytes) -> Seen | Refused:
        caps = {"max_pixels": self.config.max_pixels, "min_side": self.config.min_side}
        if len(body) < CHUNK:
            return screen(body, **caps)  # a thread's hand-over costs more than a small image
        return await asyncio.to_thread(screen, body, **caps)

    def _read_file(self, url: str) -> Fetched | Refused | Unanswered:
        """A `file:` candidate, only from a watched folder; symbolic links are followed before they are judged."""
        parts = urlsplit(url)
        path = Path(unquote(parts.path))
        try:
            real = path.resolve(strict=True)
            if parts.netloc or not any(real.is_relative_to(folder) for folder in self.folders):
                return Refused(Reason.OUTSIDE, f"{path} is in none of the watched folders")
            if not real.is_file():
                return Refused(Reason.NOT_AN_IMAGE, f"{path} is not a plain file")
            with real.open("rb") as f:
                body = f.read(self.config.max_bytes + 1)
        except FileNotFoundError:
            return Refused(Reason.GONE, f"{path} is not there any more")
        except OSError as e:
            return Unanswered(f"{path}: {e}")
        if len(body) > self.config.max_bytes:
            return Refused(Reason.TOO_LARGE, f"{path}: over {self.config.max_bytes} bytes")
        seen = screen(body, max_pixels=self.config.max_pixels, min_side=self.config.min_side)
        return seen if isinstance(seen, Refused) else Fetched(body, seen, url, now())


def _retry_after(value: str) -> float:
    """Seconds; a date or nonsense counts as none (the retry topics wait long enough)."""
    return min(float(value), 86400.0) if value.isascii() and value.isdigit() else 0.0
