"""HTTP for connectors: whole answers, small, soon, and with an honest name.

What can go wrong, and who acts:

* Answer       whatever the server says with a status that will not pass by itself: the connector decides (200, 206, 304, 404, 410, ...)
* Retryable    unreachable, late, cut off, redirected too often, or busy (408, 425, 429, 5xx), then with the Retry-After it asks for

A server may drip its headers a byte at a time, and no time-out of a single read ends that.  So every request has a thread of its own, and
whoever is late is left behind (`Patience`); there is room for a few of those, and while it is taken nothing more is asked.
"""

import email.utils
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import urllib3
from pydantic import Field
from urllib3.exceptions import HTTPError

from streamlearn.contract.config import Section
from streamlearn.contract.errors import Retryable, StreamlearnError

USER_AGENT = "streamlearn/0.1 (+https://example.org/streamlearn; set user_agent to your contact)"
REDIRECTS = 5
LATE = 8  # requests left behind, at most
MAX_WAIT_S = 24 * 3600.0  # whatever Retry-After says
BUSY = {408, 425, 429}
T = TypeVar("T")


class HttpOptions(Section):
    user_agent: str = Field(default=USER_AGENT, min_length=1)  # honest, with a contact
    timeout_s: float = Field(default=5.0, gt=0, le=60)  # for a connection, and for each read
    total_s: float = Field(default=10.0, gt=0, le=120)  # for a whole answer
    max_bytes: int = Field(default=16 * 2**20, ge=1024)  # of one answer, unpacked; what is larger is refused


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str  # where the redirects ended
    whole: bool  # false: there was more than `max_bytes`


class Late(Retryable):
    """It may end yet, but nobody waits for it."""


class Patience:
    """Calls that may take for ever, each in a thread of its own."""

    def __init__(self) -> None:
        self._room = threading.Semaphore(LATE)

    def call(self, what: str, function: Callable[[], T], seconds: float) -> T:
        """What `function` returns, or the StreamlearnError that it raises.  Raises Late."""
        if not self._room.acquire(blocking=False):
            raise Late(f"{what}: not begun, {LATE} others do not end", after_s=30.0)
        results: list[T] = []
        errors: list[StreamlearnError] = []

        def work() -> None:
            try:
                results.append(function())
            except StreamlearnError as e:
                errors.append(e)
            finally:
                self._room.release()

        thread = threading.Thread(target=work, name="connector-call", daemon=True)
        thread.start()
        thread.join(seconds)
        if errors:
            raise errors[0]
        if not results and thread.is_alive():
            raise Late(f"{what} takes over {seconds:g} s")
        return results[0]  # IndexError: a bug, and the thread has printed its traceback


class Web:
    def __init__(self, options: HttpOptions):
        self.options = options
        self.pool = urllib3.PoolManager(
            num_pools=16,
            maxsize=2,
            timeout=urllib3.Timeout(connect=options.timeout_s, read=options.timeout_s),
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=REDIRECTS, respect_retry_after_header=False),
        )
        self.patience = Patience()

    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Answer:
        """The answer within `total_s`.  Raises Retryable."""
        return self.patience.call(f"{url}: a whole answer", lambda: self._get(url, dict(headers or {})), self.options.total_s)

    def open(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """An answer whose body is still to be read.  Raises Retryable unless its status is 200."""
        try:
            response = self.pool.request(
                "GET", url, headers={"User-Agent": self.options.user_agent} | dict(headers), preload_content=False, decode_content=True
            )
        except HTTPError as e:
            raise Retryable(f"{url}: {e}") from e
        if response.status != 200:
            response.close()
            raise Retryable(f"{url}: HTTP {response.status}", after_s=retry_after_s(response.headers) or 5.0)
        return response

    def close(self) -> None:
        self.pool.clear()

    def _get(self, url: str, headers: dict[str, str]) -> Answer:
        deadline = time.monotonic() + self.options.total_s
        try:
            response = self.pool.request("GET", url, headers={"User-Agent": self.options.user_agent} | headers, preload_content=False)
            try:
                if response.status in BUSY or response.status >= 500:
                    raise Retryable(f"{url}: HTTP {response.status}", after_s=retry_after_s(response.headers) or 5.0)
                body, whole = bytearray(), True
                while whole and (chunk := response.read1(65536, decode_content=True)):
                    body += chunk
                    whole = len(body) <= self.options.max_bytes
                    if time.monotonic() > deadline:
                        raise Retryable(f"{url}: no whole answer within {self.options.total_s:g} s")
            finally:
                response.close()  # with what is unread: an answer that was cut must not be taken for the next one's
        except HTTPError as e:
            raise Retryable(f"{url}: {e}") from e
        except (OSError, ValueError) as e:  # what http.client and the codecs let through
            raise Retryable(f"{url}: {type(e).__name__}: {e}") from e
        return Answer(response.status, response.headers, bytes(body), response.geturl() or url, whole)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, whether as a number or as a date; None where it is absent or garbage."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_WAIT_S)
    try:
        return min(max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()), MAX_WAIT_S)
    except (ValueError, TypeError, OverflowError):
        return None
