"""An HTTP proxy on the loopback that goes wrong on order: what a network does to S3, without the wait.

A fault is used up by the requests it matches, in the order the faults were given; all other requests pass.

  answer        says `status` and `code` without asking the server          nothing has happened
  reset_before  drops the connection without asking the server              nothing has happened
  reset_after   asks, waits for the answer, drops the connection            it HAS happened, and the client cannot know
  stall         holds the request, unasked, until `release()`               nothing has happened yet
  delay         holds the request, unasked, for `delay_s`                nothing has happened yet
  truncate      passes the header and `keep` bytes of the body, then closes
  hang          likewise, then holds the connection until `release()`
  unframed      as truncate, and without the Content-Length that would give it away
  whole         asks without the Range header
"""

import asyncio
import re
import ssl
import threading
from dataclasses import dataclass
from typing import Literal

Act = Literal["answer", "reset_before", "reset_after", "stall", "delay", "truncate", "hang", "unframed", "whole"]
HEADER_END = b"\r\n\r\n"


@dataclass
class Fault:
    act: Act
    method: str = "PUT"
    path: str = ""  # a regular expression, searched in path and query
    times: int = 1
    keep: int = 0  # bytes of the body that still come through
    status: int = 503
    code: str = "SlowDown"
    delay_s: float = 0.0

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and self.method == method and re.search(self.path, path) is not None


@dataclass(frozen=True)
class Message:
    """A request or a response, whole."""

    first: str
    header: bytes
    fields: dict[str, str]
    body: bytes = b""


class FaultProxy:
    """`with FaultProxy(server) as proxy:` then `proxy.faults = [Fault(...)]`; `proxy.seen` tells (method, path, act or "")."""

    def __init__(self, server: tuple[str, int], tls: ssl.SSLContext | None = None, *, port: int = 0):
        """`port` of one that is gone: until then connections are refused."""
        self.server, self.tls, self.port = server, tls, port
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, str]] = []
        self.headers: list[dict[str, str]] = []  # of the same requests; names in lower case
        self._loop = asyncio.new_event_loop()
        self._released = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._listener = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._client, "127.0.0.1", self.port, ssl=self.tls, limit=2**20), self._loop
        ).result()
        self.port = self._listener.sockets[0].getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def release(self) -> None:
        self._loop.call_soon_threadsafe(self._released.set)

    def requests(self, method: str) -> list[str]:
        """What became of the requests of one method: "" for those that passed."""
        return [act for seen, _, act in self.seen if seen == method]

    async def _stop(self) -> None:
        self._listener.close()
        clients = asyncio.all_tasks() - {asyncio.current_task()}
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return  # the client hung up, or the test is over
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; False ends the connection."""
        request = await _head(reader)
        method, path, _ = request.first.split(" ", 2)
        fault = next((f for f in self.faults if f.matches(method, path)), None)
        act = fault.act if fault else ""
        if fault:
            fault.times -= 1
        self.seen.append((method, path, act))
        self.headers.append(request.fields)
        if act == "reset_before":
            writer.transport.abort()
            return False
        if request.fields.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request = await _with_body(reader, request)
        if fault and act == "answer":
            writer.write(_refusal(fault, method))
            return True
        if act == "stall":
            await self._released.wait()
        if fault and act == "delay":
            await asyncio.sleep(fault.delay_s)
        response = await self._ask(request, method, without=b"range" if act == "whole" else b"expect")
        if act == "reset_after":
            writer.transport.abort()
            return False
        if fault and act in ("truncate", "hang", "unframed"):
            header = re.sub(rb"(?i)\r\ncontent-length:[^\r]*", b"", response.header) if act == "unframed" else response.header
            writer.write(header + response.body[: fault.keep])
            await writer.drain()
            if act == "hang":
                await self._released.wait()
            return False
        writer.write(response.header + response.body)
        return response.fields.get("connection", "").lower() != "close"

    async def _ask(self, request: Message, method: str, *, without: bytes) -> Message:
        reader, writer = await asyncio.open_connection(*self.server, limit=2**20)
        try:
            # the 100 that an Expect waits for was sent by us
            writer.write(re.sub(rb"(?i)\r\n%s:[^\r]*" % without, b"", request.header) + request.body)
            response = await _head(reader)
            if method == "HEAD" or response.first.split()[1] in ("204", "304"):
                return response
            return await _with_body(reader, response)
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> Message:
    header = await reader.readuntil(HEADER_END)
    first, *lines = header.decode("latin-1").rstrip().split("\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Message(first, header, fields)


async def _with_body(reader: asyncio.StreamReader, message: Message) -> Message:
    if "chunked" in message.fields.get("transfer-encoding", ""):
        body = b""
        while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
            size = await reader.readline()
            body += size + await reader.readexactly(int(size.split(b";")[0], 16) + 2)
    else:
        body = await reader.readexactly(int(message.fields.get("content-length", 0)))
    return Message(message.first, message.header, message.fields, body)


def _refusal(fault: Fault, method: str) -> bytes:
    body = b"" if method == "HEAD" else b"<?xml version='1.0'?><Error><Code>%s</Code></Error>" % fault.code.encode()
    return b"HTTP/1.1 %d Fault\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (fault.status, len(body), body)
