"""One HTTP request: libcurl under asyncio.

libcurl does HTTP/1.1 and HTTP/2, TLS with one store of authorities for the process, and a pool of connections, at half of the processor
time that a client written in Python takes (LOG.md).  What it is kept from: other protocols than http and https, redirects (each is judged
anew by the client), proxies, cookies, credentials, decompression (images are not compressed in transit; a gzip bomb is then just a small
non-image), and addresses that the guard refuses: it is asked for every socket, after names are resolved.
"""

import asyncio
import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pycurl

from ingest.fetch.guard import MARK, AddressRefused, Guard

BUFFER = 2**17  # bytes handed over at a time
_READ, _WRITE = pycurl.CSELECT_IN, pycurl.CSELECT_OUT
_BAD_URL = {pycurl.E_URL_MALFORMAT, pycurl.E_UNSUPPORTED_PROTOCOL}


class BadUrl(ValueError):
    """libcurl cannot make a request of it."""


class Broken(OSError):
    """No whole answer: the name, the connection, TLS or the protocol failed."""


class Headers:
    """As they came, names in lower case.  Bytes that are no UTF-8 become U+FFFD: what is kept of them goes into JSON and parquet."""

    def __init__(self) -> None:
        self._pairs: list[tuple[str, str]] = []

    def add(self, line: bytes) -> None:
        name, colon, value = line.partition(b":")
        if colon:
            self._pairs.append((name.decode(errors="replace").strip().lower(), value.decode(errors="replace").strip()))
        elif self._pairs and line[:1] in (b" ", b"\t"):  # folded
            last, before = self._pairs[-1]
            self._pairs[-1] = (last, f"{before} {line.decode(errors='replace').strip()}")

    def get(self, name: str) -> str:
        """The first of a name; empty where there is none."""
        return next((value for key, value in self._pairs if key == name), "")

    def items(self) -> Iterator[tuple[str, str]]:
        return iter(self._pairs)


@dataclass
class Answer:
    status: int = 0
    headers: Headers = field(default_factory=Headers)
    body: bytes = b""
    cut: bool = False  # the body went on beyond what was asked for

    @property
    def length(self) -> int:
        """As announced, in bytes; 0 where it was not."""
        text = self.headers.get("content-length")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


@dataclass(eq=False)
class _Transfer:
    """One request on its way."""

    cap: Callable[[Answer], int]
    done: "asyncio.Future[Answer]"
    answer: Answer = field(default_factory=Answer)
    chunks: list[bytes] = field(default_factory=list)
    received: int = 0  # bytes of the body
    limit: int = -1  # bytes of the body that are wanted; -1: not asked yet
    refused: str = ""  # an address that the guard refused

    def on_header(self, line: bytes) -> None:
        if line.startswith(b"HTTP/"):  # also of the answer that follows an interim one
            code = line.partition(b" ")[2].split(None, 1)[:1]
            self.answer = Answer(status=int(code[0]) if code and code[0].isdigit() and len(code[0]) == 3 else 0)
        else:
            self.answer.headers.add(line)

    def on_body(self, data: bytes) -> int | None:
        if self.limit < 0:
            self.limit = self.cap(self.answer)
        room = self.limit - self.received
        self.received += len(data)
        self.chunks.append(data[: max(0, room)])
        if len(data) > room:
            self.answer.cut = True
            return -1  # libcurl ends the transfer and closes the connection
        return None


class Transport:
    """A pool of connections.  Made in a running event loop; not for threads."""

    def __init__(self, guard: Guard, *, user_agent: str, connect_timeout_s: float, connections: int):
        self.guard = guard
        self._loop = asyncio.get_running_loop()
        self._settings = {
            pycurl.USERAGENT: user_agent,
            pycurl.CONNECTTIMEOUT_MS: int(connect_timeout_s * 1000),
            pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
            pycurl.FOLLOWLOCATION: 0,
            pycurl.PROXY: "",  # whatever the environment says
            pycurl.NOSIGNAL: 1,
            pycurl.PATH_AS_IS: 1,  # what robots.txt was asked about is what is requested
            pycurl.HTTP09_ALLOWED: 0,
            pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_2TLS,
            pycurl.DNS_CACHE_TIMEOUT: 60,
            pycurl.BUFFERSIZE: BUFFER,
        } | _authorities()
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_MAXCONNECTS, 4 * connections)
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._timer: asyncio.TimerHandle | None = None
        self._under_way: dict[Any, _Transfer] = {}
        self._idle: list[Any] = []
        self._watched: set[int] = set()

    async def close(self) -> None:
        for handle, transfer in list(self._under_way.items()):
            transfer.done.cancel()
            self._release(handle)
        if self._timer:
            self._timer.cancel()
        for fd in self._watched:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
        for handle in self._idle:
            handle.close()
        self._multi.close()

    async def get(self, url: str, headers: dict[str, str], *, cap: Callable[[Answer], int]) -> Answer:
        """Ask for a URL.  `cap`, told status and headers, says how many bytes of the body are wanted.

        Raises AddressRefused, BadUrl, Broken.  Whoever is cancelled here (a time-out) gives the connection up.
        """
        handle = self._idle.pop() if self._idle else self._new_handle()
        transfer = _Transfer(cap, self._loop.create_future())
        try:
            handle.setopt(pycurl.URL, url)
        except (pycurl.error, UnicodeError) as e:
            self._idle.append(handle)
            raise BadUrl(f"{e!a}") from e
        handle.setopt(pycurl.HTTPHEADER, [f"{name}: {value}" for name, value in headers.items()])
        handle.setopt(pycurl.HEADERFUNCTION, transfer.on_header)
        handle.setopt(pycurl.WRITEFUNCTION, transfer.on_body)
        handle.setopt(pycurl.OPENSOCKETFUNCTION, lambda _, address: self._open_socket(transfer, address))
        self._under_way[handle] = transfer
        self._multi.add_handle(handle)
        try:
            return await transfer.done
        finally:
            self._release(handle)

    def _new_handle(self) -> Any:
        handle = pycurl.Curl()
        for option, value in self._settings.items():
            handle.setopt(option, value)
        return handle

    def _release(self, handle: Any) -> None:
        if self._under_way.pop(handle, None) is not None:
            self._multi.remove_handle(handle)
            self._idle.append(handle)

    def _open_socket(self, transfer: _Transfer, address: Any) -> Any:
        """The very address that is about to be connected."""
        host = str(address.addr[0])
        if not self.guard.allows(host):
            transfer.refused = host
            return pycurl.SOCKET_BAD
        return socket.socket(*address[:3])

    def _watch(self, what: int, fd: int, _multi: object, _data: object) -> None:
        if what in (pycurl.POLL_IN, pycurl.POLL_INOUT):
            self._loop.add_reader(fd, self._act, fd, _READ)
        else:
            self._loop.remove_reader(fd)
        if what in (pycurl.POLL_OUT, pycurl.POLL_INOUT):
            self._loop.add_writer(fd, self._act, fd, _WRITE)
        else:
            self._loop.remove_writer(fd)
        (self._watched.discard if what == pycurl.POLL_REMOVE else self._watched.add)(fd)

    def _set_timer(self, ms: int) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(ms / 1000, self._act, pycurl.SOCKET_TIMEOUT, 0) if ms >= 0 else None

    def _act(self, fd: int, what: int) -> None:
        self._multi.socket_action(fd, what)
        while True:
            left, whole, failed = self._multi.info_read()
            for handle in whole:
                self._finish(handle, 0, "")
            for handle, code, message in failed:
                self._finish(handle, code, message)
            if not left:
                return

    def _finish(self, handle: Any, code: int, message: str) -> None:
        transfer = self._under_way.get(handle)
        if transfer is None or transfer.done.done():
            return
        message = message.encode(errors="replace").decode()[:300]  # it may quote what the server said, byte by byte, and goes into JSON
        if code == 0 or transfer.answer.cut:
            transfer.answer.body = b"".join(transfer.chunks)
            transfer.done.set_result(transfer.answer)
        elif transfer.refused:
            transfer.done.set_exception(AddressRefused(errno.EACCES, f"{MARK}: {transfer.refused} is not a public address"))
        elif code in _BAD_URL:
            transfer.done.set_exception(BadUrl(message))
        else:
            transfer.done.set_exception(Broken(f"{message or 'no answer'} (curl {code})"))


def _authorities() -> dict[int, str]:
    """Where the system keeps them, as Python's ssl does; SSL_CERT_FILE and SSL_CERT_DIR included."""
    paths = ssl.get_default_verify_paths()
    found = {pycurl.CAINFO: paths.cafile, pycurl.CAPATH: paths.capath}
    return {option: path for option, path in found.items() if path}
