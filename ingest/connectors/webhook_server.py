"""The HTTP side of the webhook: an aiohttp server in a daemon thread, and the pushes that wait.

All that two threads share is `Server._waiting`, under its lock; answers are given in the loop's own thread.
"""

import asyncio
import json
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from ingest.connectors.base import BATCH
from streamlearn.contract.errors import Retryable

logger = logging.getLogger(__name__)
BODIES = 16  # that are read at once: with max_body_bytes, what hostile senders may take of memory


class Limits(Protocol):
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def queue(self) -> int: ...
    @property
    def max_body_bytes(self) -> int: ...
    @property
    def body_s(self) -> float: ...
    @property
    def settle_s(self) -> float: ...


@dataclass(frozen=True)
class Item:
    url: str
    id: str
    license: object
    alt: object


@dataclass(eq=False)
class Push:
    items: list[Item]
    answer: "asyncio.Future[web.Response]"
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    accepted: int = 0
    known: int = 0
    refused: list[dict[str, Any]] = field(default_factory=list)


class Server:
    def __init__(self, limits: Limits, allowed: Callable[[bytes], bool], answered: Callable[[int, float], None]):
        """Listens once this returns.  `answered` is told of each push, in the server's thread.  Raises Retryable where it cannot listen."""
        self.limits, self.allowed, self.answered, self.port = limits, allowed, answered, 0
        self._waiting: deque[Push] = deque()
        self._lock, self._closing = threading.Lock(), False
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        self._error: OSError | None = None
        self._open: set[Push] = set()  # whose senders wait; the loop's own
        self._thread = threading.Thread(target=self._run, args=(started,), name="connector-webhook", daemon=True)
        self._thread.start()
        if not started.wait(10) or self._error is not None:
            raise Retryable(
                f"webhook: {limits.host}:{limits.port} cannot be listened on: {self._error}; free the port or set another", after_s=10.0
            )

    def take(self, most: int) -> list[Push]:
        """Pushes of at most `most` candidates together, oldest first; whose senders have given up are left out."""
        taken: list[Push] = []
        with self._lock:
            while self._waiting and sum(len(p.items) for p in taken) + len(self._waiting[0].items) <= most:
                push = self._waiting.popleft()
                if not push.answer.done():
                    taken.append(push)
        return taken

    def put_back(self, pushes: list[Push]) -> None:
        with self._lock:
            self._waiting.extendleft(reversed(pushes))

    def settle(self, pushes: list[Push]) -> None:
        for push in pushes:
            body = {"accepted": push.accepted, "known": push.known, "refused": push.refused}
            self._loop.call_soon_threadsafe(_answer, push, 202, body)

    def close(self) -> None:
        """503 to all who wait or come; then it listens no more."""
        self._closing = True
        self._loop.call_soon_threadsafe(self._turn_away)
        self._thread.join(10)

    def _turn_away(self) -> None:
        for push in self._open:
            _answer(push, 503, {"error": "shutting down"})
        self._loop.call_later(0.2, self._loop.stop)  # the answers go out first

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1.0)
        try:
            self._loop.run_until_complete(runner.setup())
            self._loop.run_until_complete(web.TCPSite(runner, self.limits.host, self.limits.port).start())
            self.port = runner.addresses[0][1]
            logger.info("webhook listens on %s port %d", self.limits.host, self.port)
            started.set()
            self._loop.run_forever()
        except OSError as e:
            self._error = e
            started.set()
        finally:
            self._loop.run_until_complete(runner.cleanup())
            self._loop.close()

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=self.limits.max_body_bytes)
        app.router.add_post("/v1/candidates", self._counted)
        app.router.add_get("/healthz", self._healthz)
        self._bodies = asyncio.Semaphore(BODIES)
        return app

    async def _healthz(self, request: web.Request) -> web.Response:
        return _json(200, {"status": "ok", "waiting": self._num_waiting()})

    def _num_waiting(self) -> int:
        return sum(len(p.items) for p in self._open)

    async def _counted(self, request: web.Request) -> web.Response:
        began, status = time.monotonic(), 500
        try:
            answer = await self._push(request)
            status = answer.status
            return answer
        except web.HTTPException as e:  # aiohttp's own: a body that is no HTTP
            status = e.status
            raise
        finally:  # one that is given up by its sender, too
            self.answered(status, time.monotonic() - began)

    async def _push(self, request: web.Request) -> web.Response:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if not self.allowed(given.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""):
            return _json(401, {"error": "Authorization: Bearer <token> is missing or wrong"}, {"WWW-Authenticate": "Bearer"})
        if self._closing:
            return _json(503, {"error": "shutting down"})
        if self._bodies.locked():
            return _full()
        try:
            async with self._bodies, asyncio.timeout(self.limits.body_s):
                items = parse(await request.read(), request.content_type)
        except web.HTTPRequestEntityTooLarge:
            return _json(413, {"error": f"over {self.limits.max_body_bytes} bytes"})
        except TimeoutError:
            return _json(408, {"error": f"no whole body within {self.limits.body_s:g} s"})
        except ValueError as e:
            return _json(400, {"error": str(e)})
        if len(items) > BATCH:
            return _json(413, {"error": f"{len(items)} items, at most {BATCH} in one push"})
        if self._num_waiting() + len(items) > self.limits.queue:
            return _full()
        return await self._settled(Push(items, self._loop.create_future()))

    async def _settled(self, push: Push) -> web.Response:
        """The answer, once the candidates are durable."""
        self._open.add(push)
        try:
            with self._lock:
                self._waiting.append(push)
            async with asyncio.timeout(self.limits.settle_s):
                return await push.answer
        except TimeoutError:
            return _json(503, {"error": "not durable yet; push again, with the same ids"}, {"Retry-After": "5"})
        finally:
            self._open.discard(push)
            push.answer.cancel()  # whoever has not been taken need not be


def parse(body: bytes, content_type: str) -> list[Item]:
    """Raises ValueError that says what is wrong, and where."""
    if content_type in ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"):
        lines = [(f"line {n}", line) for n, line in enumerate(body.split(b"\n"), 1) if line.strip()]
        return [_item(where, _load(where, line)) for where, line in lines]
    whole = _load("body", body)
    return [_item(f"item {n}", one) for n, one in enumerate(whole)] if isinstance(whole, list) else [_item("body", whole)]


def _load(where: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: not JSON: {str(e)[:200]}") from e


def _item(where: str, value: Any) -> Item:
    if not isinstance(value, dict) or not isinstance(value.get("url"), str):
        raise ValueError(f'{where}: expected an object with a url, such as {{"url": "https://..."}}')
    for key in ("id", "license", "alt"):
        if not isinstance(value.get(key, ""), str | None):
            raise ValueError(f"{where}: {key}: expected text")
    if len(value.get("id") or "") > 500:
        raise ValueError(f"{where}: id: over 500 characters")
    return Item(value["url"], value.get("id") or "", value.get("license"), value.get("alt"))


def _answer(push: Push, status: int, body: dict[str, Any]) -> None:
    if not push.answer.done():
        push.answer.set_result(_json(status, body))


def _full() -> web.Response:
    return _json(429, {"error": "full: others wait to be appended"}, {"Retry-After": "1"})


def _json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response(body, status=status, headers=headers)
