"""HTTP for connectors: whole answers, small, soon, and with an honest name.

What can go wrong, and who acts:

* Answer       whatever the server says with a status that will not pass by itself: the connector decides (200, 206, 304, 404, 410, ...)
* Retryable    unreachable, late, cut off, redirected too often, or busy (408, 425, 429, 5xx), then with the Retry-After it asks for

The host of the URL that is asked for was named by the user, and may be a neighbour. Where it redirects to was not: another host is connected
to only at a public address, looked at before the connection is made (`Guarded`), so that no feed reads this machine's metadata service.

A server may drip its headers a byte at a time, and no time-out of a single read ends that.  So every request has a thread of its own, and
whoever is late is left behind (`Patience`); there is room for a few of those, and while it is taken nothing more is asked.
"""

import email.utils
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3
from pydantic import Field
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NameResolutionError, NewConnectionError

from ingest.fetch.guard import MARK, Guard, complaint
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


class Guarded(HTTPConnection):
    """Connects to public addresses alone: to the very one that was looked at, whatever the name says the next time."""

    def _new_conn(self) -> socket.socket:
        name = self._dns_host
        try:
            addresses = [str(found[4][0]) for found in socket.getaddrinfo(name, self.port or 0, type=socket.SOCK_STREAM)]
        except socket.gaierror as e:
            raise NameResolutionError(name, self, e) from e
        for address in addresses:
            if not Guard().allows(address):
                raise NewConnectionError(self, f"{MARK}: {name} is {address}, which is not public; name it in the options if it is meant")
        try:
            self._dns_host = addresses[0]
            return super()._new_conn()
        finally:
            self._dns_host = name  # what TLS has to prove


class GuardedTls(Guarded, HTTPSConnection):
    pass


class GuardedPool(urllib3.HTTPConnectionPool):
    ConnectionCls = Guarded


class GuardedTlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = GuardedTls


class Web:
    def __init__(self, options: HttpOptions):
        self.options = options
        self.pool, self.guarded = self._pool(), self._pool()
        self.guarded.pool_classes_by_scheme = {"http": GuardedPool, "https": GuardedTlsPool}
        self.patience = Patience()

    def _pool(self) -> urllib3.PoolManager:
        timeout = urllib3.Timeout(connect=self.options.timeout_s, read=self.options.timeout_s)
        return urllib3.PoolManager(num_pools=16, maxsize=2, timeout=timeout, retries=False)

    def get(self, url: str, headers: Mapping[str, str] | None = None) -> Answer:
        """The answer within `total_s`.  Raises Retryable."""
        return self.patience.call(f"{url}: a whole answer", lambda: self._get(url, dict(headers or {})), self.options.total_s)

    def open(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """An answer whose body is still to be read.  Raises Retryable unless its status is 200."""
        try:
            response, _ = self._ask(url, headers)
        except HTTPError as e:
            raise Retryable(f"{url}: {e}") from e
        if response.status != 200:
            response.close()
            raise Retryable(f"{url}: HTTP {response.status}", after_s=retry_after_s(response.headers) or 5.0)
        return response

    def close(self) -> None:
        self.pool.clear()
        self.guarded.clear()

    def _ask(self, url: str, headers: Mapping[str, str]) -> tuple[urllib3.BaseHTTPResponse, str]:
        """The first answer that is no redirect, unread, and where it came from.  Raises Retryable, HTTPError."""
        at, named = url, urlsplit(url).hostname
        for _ in range(REDIRECTS + 1):
            pool = self.pool if urlsplit(at).hostname == named else self.guarded
            told = {"User-Agent": self.options.user_agent} | dict(headers)
            response = pool.request("GET", at, headers=told, preload_content=False, redirect=False, decode_content=True)
            target = response.get_redirect_location()
            if not target:
                return response, at
            response.close()
            at = urljoin(at, target)
            if why := complaint(at):
                raise Retryable(f"{url} redirects to {at[:200]!r}: {why}")
        raise Retryable(f"{url}: more than {REDIRECTS} redirects")

    def _get(self, url: str, headers: dict[str, str]) -> Answer:
        deadline = time.monotonic() + self.options.total_s
        try:
            response, at = self._ask(url, headers)
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
        return Answer(response.status, response.headers, bytes(body), at, whole)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, whether as a number or as a date; None where it is absent or garbage."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_WAIT_S)
    try:
        return min(max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time()), MAX_WAIT_S)
    except (ValueError, TypeError, OverflowError):
        return None
