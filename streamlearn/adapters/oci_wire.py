"""HTTP as an OCI registry speaks it: one request, with its tries, its tokens, its redirects and its errors.

* NotFound      404
* Conflict      409, 412: a precondition was not met
* ConfigError   the address, the certificate, the credentials, or something the registry does not do: trying again cannot help
* StoreFull     507
* Retryable     429, 5xx, no answer, half an answer: the tries are used up, or the registry asks for more than `snapshots.max_pause_s`
* Corrupt       the registry found another digest in what it got (DIGEST_INVALID)

An Authorization header goes to the registry's own scheme, host and port and nowhere else: not to where a redirect leads, not to an upload
on another host.  TLS is always verified; an http:// address, wherever it comes from, is refused unless `snapshots.plain_http` is set.
Messages name addresses without their query, which may be a key.
"""

import json
import logging
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, SSLError
from urllib3.response import BaseHTTPResponse

from streamlearn.adapters.oci_auth import Keys, Secret
from streamlearn.contract.config_snapshots import SnapshotsConfig
from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, NotFound, Retryable, StoreFull, StreamlearnError

MAX_ANSWER = 16 * 2**20  # bytes of a manifest, an index, a list of tags; distribution's servers take manifests of 4 MiB
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
BACK_OFF_S = 5.0  # for the role, where the registry does not say
BLOCK_BYTES = 2**16  # of a body as it is sent
logger = logging.getLogger("streamlearn")


@dataclass(frozen=True)
class Slice:
    """A part of a file, as a body: read when it is sent, and again if it must be sent again."""

    path: Path
    start: int
    size: int


Body = bytes | Slice | None


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str  # that was asked

    def location(self) -> str:
        """Absolute.  Raises Retryable where it is missing."""
        if "Location" not in self.headers:
            raise Retryable(f"{bare(self.url)}: status {self.status} without a Location", after_s=BACK_OFF_S)
        return urljoin(self.url, self.headers["Location"])


class Wire:
    """One registry, spoken to by any number of threads."""

    def __init__(
        self,
        config: SnapshotsConfig,
        host: str,
        secret: Secret,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        if config.ca_bundle and not Path(config.ca_bundle).is_file():
            raise ConfigError(f"snapshots.ca_bundle = {config.ca_bundle!r}: no such file; name a PEM file of CA certificates")
        self.config, self.host, self._sleep = config, host, sleep
        self._random = random.Random()  # its own: learning has the others
        self.origin = f"{'http' if config.plain_http else 'https'}://{host}"
        self._keys = Keys(secret, self._plain, self.origin, clock=clock)
        self._pool = urllib3.PoolManager(
            maxsize=16,
            retries=False,
            timeout=urllib3.Timeout(connect=config.connect_timeout_s, read=config.read_timeout_s),
            cert_reqs="CERT_REQUIRED",
            ca_certs=config.ca_bundle or None,
            blocksize=BLOCK_BYTES,
        )

    def ask(
        self,
        method: str,
        url: str,
        scopes: frozenset[str],
        *,
        body: Body = None,
        headers: Mapping[str, str] | None = None,
        good: tuple[int, ...] = (200,),
        tries: int = 0,
    ) -> Reply:
        """One of the `good` statuses, the body whole; anything else is an error.  `tries`: 0 for snapshots.attempts."""
        for attempt in range(1, (tries or self.config.attempts) + 1):
            try:
                with self._sent(method, url, scopes, headers or {}, body, good) as answer:
                    return Reply(answer.status, answer.headers, self._whole(answer, method, url), url)
            except Retryable as e:
                self.pause(e, attempt, tries or self.config.attempts)
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def stream(self, url: str, scopes: frozenset[str], headers: Mapping[str, str], good: tuple[int, ...]) -> Iterator[BaseHTTPResponse]:
        """One try of a GET whose body is read by the caller.  Raises as `ask`, also when reading goes wrong."""
        with self._sent("GET", url, scopes, headers, None, good) as answer:
            yield answer

    def pause(self, e: Retryable, attempt: int, attempts: int) -> None:
        """Wait before the next try; raises `e` where there is none, or where the wait is too long to do it here."""
        said = e.after_s if isinstance(e, _Later) else 0.0
        if attempt >= attempts or said > self.config.max_pause_s:
            raise e
        backed_off = min(self.config.max_pause_s, 0.5 * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.0)  # not all roles at once
        logger.info("try %d of %d: %s", attempt, attempts, e)
        self._sleep(said or backed_off)

    @contextmanager
    def _sent(
        self, method: str, url: str, scopes: frozenset[str], headers: Mapping[str, str], body: Body, good: tuple[int, ...]
    ) -> Iterator[BaseHTTPResponse]:
        with self._errors(method, url):
            answer = self._answered(method, url, scopes, headers, body)
            try:
                if answer.status not in good:
                    raise refusal(method, url, answer.status, answer.headers, answer.read(MAX_ANSWER, decode_content=False))
                yield answer
                answer.drain_conn()
            finally:
                answer.close()

    def _answered(self, method: str, url: str, scopes: frozenset[str], headers: Mapping[str, str], body: Body) -> BaseHTTPResponse:
        """Through challenges and redirects."""
        asked_anew, hops = False, 0
        while True:
            ours = origin_of(url) == origin_of(self.origin)
            key = self._keys.header(scopes) if ours else ""
            answer = self._once(method, url, {**headers, **({"Authorization": key} if key else {})}, body)
            if answer.status == 401 and ours and not asked_anew:
                asked_anew = True  # once: a second 401 is the answer
                if self._keys.challenged(", ".join(answer.headers.getlist("WWW-Authenticate")), scopes):
                    self._end(answer)
                    continue
            if answer.status not in REDIRECTS or method != "GET":
                return answer
            hops += 1
            target = answer.headers.get("Location")
            self._end(answer)
            if not target or hops > MAX_REDIRECTS:
                raise ConfigError(f"{bare(url)}: redirected {hops} times, and not to the content; look at the registry's set-up")
            url = urljoin(url, target)

    def _once(self, method: str, url: str, headers: Mapping[str, str], body: Body) -> BaseHTTPResponse:
        if not (url.startswith("https://") or (url.startswith("http://") and self.config.plain_http)):
            raise ConfigError(
                f"{bare(url)}: not https; where the registry stands behind a proxy that ends TLS, let it answer with relative addresses "
                "(distribution: http.relativeurls), or set snapshots.plain_http"
            )
        sent = {"User-Agent": "streamlearn", "Accept-Encoding": "identity", **headers}
        if not isinstance(body, Slice):
            return self._pool.request(method, url, headers=sent, body=body, preload_content=False, redirect=False)
        with body.path.open("rb") as f:
            f.seek(body.start)
            sent["Content-Length"] = str(body.size)
            part = _Part(f, body.size)
            return self._pool.request(method, url, headers=sent, body=part, preload_content=False, redirect=False)  # type: ignore[arg-type]

    def _plain(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> tuple[int, bytes]:
        """For the token server: no keys but those given, no redirects."""
        for attempt in range(1, self.config.attempts + 1):
            try:
                with self._errors(method, url):
                    answer = self._once(method, url, headers, body)
                    found = answer.read(MAX_ANSWER, decode_content=False)
                    self._end(answer)
                    if answer.status == 429 or answer.status >= 500:
                        raise refusal(method, url, answer.status, answer.headers, found)
                    return answer.status, found
            except Retryable as e:
                self.pause(e, attempt, self.config.attempts)
        raise AssertionError("the last try returns or raises")

    def _whole(self, answer: BaseHTTPResponse, method: str, url: str) -> bytes:
        data = b"" if method == "HEAD" else answer.read(MAX_ANSWER + 1, decode_content=False)
        if len(data) > MAX_ANSWER:
            raise Corrupt(f"{bare(url)}: answers more than {MAX_ANSWER} bytes, where a manifest or a list should be")
        return data

    def _end(self, answer: BaseHTTPResponse) -> None:
        answer.drain_conn()
        answer.close()

    @contextmanager
    def _errors(self, method: str, url: str) -> Iterator[None]:
        """Nothing of urllib3's leaves this block."""
        try:
            yield
        except SSLError as e:
            if "CERTIFICATE_VERIFY_FAILED" in str(e):
                raise ConfigError(f"{bare(url)}: its certificate is not trusted; set snapshots.ca_bundle to its CA's file") from None
            raise unreachable(method, url, e) from None
        except HTTPError as e:
            raise unreachable(method, url, e) from None


class _Later(Retryable):
    """The registry said when."""


class _Part:
    """What is left of a slice, as urllib3 reads a body."""

    def __init__(self, f: BinaryIO, size: int):
        self._file, self._left = f, size

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        if self._left and not data:  # the registry would wait for the rest
            raise Corrupt(f"{self._file.name}: ended {self._left} bytes early: it was changed while it was sent")
        self._left -= len(data)
        return data


def origin_of(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def bare(url: str) -> str:
    """An address for people: without a query, which may be a key."""
    return url.partition("?")[0]


def unreachable(method: str, url: str, why: object) -> Retryable:
    told = re.sub(r"\?\S+", "?…", f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why))
    return Retryable(f"{method} {bare(url)} failed: {told}", after_s=BACK_OFF_S)


def refusal(method: str, url: str, status: int, headers: Mapping[str, str], body: bytes) -> StreamlearnError:
    codes, told = _told(body)
    what = f"{method} {bare(url)}: status {status}{told}"
    if status == 429 or (status >= 500 and status not in (501, 507)) or status in (408, 425):
        after_s = _retry_after_s(headers)
        return Retryable(what, after_s=BACK_OFF_S) if after_s is None else _Later(what, after_s=max(after_s, 1.0))
    if status == 507:
        return StoreFull(f"{what}; free some space there, the work goes on by itself", after_s=BACK_OFF_S)
    if "DIGEST_INVALID" in codes:
        return Corrupt(f"{what}: what arrived has another digest than what was sent")
    if status == 404 or "MANIFEST_BLOB_UNKNOWN" in codes:
        return NotFound(what)
    if status in (409, 412):
        return Conflict(what)
    remedies = {
        401: "it refuses us; set snapshots.username and snapshots.password_file, or log in with docker",
        403: "not allowed; ask for the right to push and pull there",
        413: "too large for a proxy on the way; lower snapshots.chunk_bytes, or raise the proxy's limit",
    }
    return ConfigError(f"{what}; {remedies.get(status, 'the registry does not do what is asked of it, see its documentation')}")


def _told(body: bytes) -> tuple[set[str], str]:
    """(codes, the errors as text) of distribution-spec's error body; nothing where it is another."""
    try:
        errors = json.loads(body)["errors"]
        codes = {str(e.get("code")) for e in errors}
        text = "; ".join(f"{e.get('code')}: {e.get('message', '')}" for e in errors)
    except (ValueError, KeyError, TypeError, AttributeError):
        return set(), ""
    return codes, f" ({''.join(c for c in text[:300] if c.isprintable())})"


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    try:
        return urllib3.Retry().get_retry_after(urllib3.HTTPResponse(headers=headers))
    except InvalidHeader:
        return None
