"""The REST API of the role `connect`, in the shape of Kafka Connect's, so that what speaks to that speaks to this.

Every request that changes something is a record of the log before it is answered (connectors/book.py); the role obeys it on its next
round.  Errors are {"error_code", "message"}: 400 what is wrong with the configuration, 401 no token, 403 a
name that is not this machine's, 404 no such connector, 409 it is
there already, or in the configuration file, or must be stopped first, 415 a body that is not called JSON, 422 JSON of another shape.
"""

import asyncio
import functools
import hmac
import ipaddress
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ingest.connectors import book, definitions, plugins
from ingest.connectors.base import dump, load
from ingest.connectors.configure import from_connect, local_paths, to_connect
from ingest.connectors.worker import Workers
from streamlearn.contract.config import Config, ConnectConfig
from streamlearn.contract.errors import ConfigError, NotFound, Retryable
from streamlearn.contract.event_log import CANDIDATES, SOURCE_STATE, EventLog, NewRecord

MAX_BODY = 2**18  # bytes
logger = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Wrong(Exception):
    """What the client is told."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Api:
    """What the requests do.  Blocking; one that changes something at a time."""

    def __init__(self, config: Config, log: EventLog, workers: Workers, *, token: str = ""):
        self.config, self.log, self.workers, self.token = config, log, workers, token
        self.worker_id = f"{config.connect.rest_host}:{config.connect.rest_port}"
        self.lock = threading.Lock()

    def entry(self, name: str) -> book.Entry:
        return book.find(self.config, self.log, name)

    def root(self) -> dict[str, Any]:
        return {"version": plugins.version(), "commit": "", "kafka_cluster_id": self.log.log_id}

    def names(self, expand: list[str]) -> Any:
        entries = book.entries(self.config, self.log)
        if not expand:
            return sorted(entries)
        views: dict[str, Callable[[str, book.Entry], Any]] = {"info": lambda _, e: self.info(e), "status": self.status}
        return {name: {what: views[what](name, entry) for what in expand if what in views} for name, entry in entries.items()}

    def info(self, entry: book.Entry) -> dict[str, Any]:
        name = entry.config.name
        return to_connect(entry.config) | {"tasks": [{"connector": name, "task": 0}], "type": "source"}

    def status(self, name: str, entry: book.Entry) -> dict[str, Any]:
        found = self.workers.states({name: entry})[name]
        of = {"state": found["state"], "worker_id": self.worker_id} | {k: found[k] for k in ("trace", "retrying") if k in found}
        tasks = [] if found["state"] in (book.STOPPED, "UNASSIGNED") else [{"id": 0} | of]
        return {"name": name, "connector": of, "tasks": tasks, "type": "source"}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name, flat = body.get("name"), body.get("config")
        if not isinstance(name, str) or not isinstance(flat, dict):
            raise Wrong(422, 'a connector is {"name": "...", "config": {"connector.class": "...", ...}}')
        with self.lock:
            if name in book.entries(self.config, self.log):
                raise Wrong(409, f"Connector {name} already exists")
            self._put(name, flat)
        return self.info(self.entry(name))

    def configure(self, name: str, flat: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            before = book.entries(self.config, self.log).get(name)
            if before is not None and before.in_file:
                raise Wrong(409, _in_file(name))
            self._put(name, flat)
        return 201 if before is None else 200, self.info(self.entry(name))

    def _put(self, name: str, flat: dict[str, Any]) -> None:
        if flat.get("name", name) != name:
            raise Wrong(400, f"the config says name = {flat['name']!r}, the request {name!r}")
        config = from_connect({"name": name} | flat, where="request")
        for key, value in local_paths(config).items():
            if not value.startswith("/"):
                raise ConfigError(f"connector {name}: {key} = {value!r}: give the whole path, a request has no folder of its own")
        book.put(self.config, self.log, config)

    def aim(self, name: str, target: str) -> None:
        with self.lock:
            book.aim(self.config, self.log, name, target)

    def restart(self, name: str, *, only_failed: bool) -> None:
        with self.lock:
            entry = self.entry(name)
            if only_failed and self.workers.states({name: entry})[name]["state"] != "FAILED":
                return
            book.restart(self.config, self.log, name)

    def delete(self, name: str) -> None:
        with self.lock:
            if self.entry(name).in_file:
                raise Wrong(409, _in_file(name))
            book.delete(self.config, self.log, name)

    def offsets(self, name: str) -> dict[str, Any]:
        self.entry(name)
        state = load(name, self.log.latest(SOURCE_STATE, name.encode()))
        cursor = state and state[0]
        return {"offsets": [] if cursor is None else [{"partition": {"connector": name}, "offset": cursor}]}

    def forget(self, name: str) -> dict[str, str]:
        """The connector begins anew; what it announces again is announced anew too."""
        with self.lock:
            if self.entry(name).target != book.STOPPED or not self.workers.idle(name):
                raise Wrong(409, f"Connector {name} is not stopped: PUT /connectors/{name}/stop, and wait until its status says STOPPED")
            ends = {p: self.log.bounds(CANDIDATES, p)[1] for p in range(self.log.partitions(CANDIDATES))}
            self.log.append([NewRecord(SOURCE_STATE, name.encode(), dump({"cursor": None, "ends": ends}))])
        return {"message": "The offsets for this connector have been reset successfully"}

    def classes(self) -> list[dict[str, str]]:
        return [{"class": p.name, "type": "source", "version": p.version} for p in plugins.plugins().values()]

    def validate(self, name: str, flat: dict[str, Any]) -> dict[str, Any]:
        if name not in plugins.plugins():
            raise NotFound(f"no connector class {name}")
        return definitions.validate(name, {"connector.class": name} | flat)


def routes(api: Api) -> list[web.RouteDef]:
    """Connect's paths."""

    def get(call: Callable[[web.Request], Any], status: int = 200) -> Handler:
        return functools.partial(_answer, lambda request: (status, call(request)))

    return [
        web.get("/", get(lambda _: api.root())),
        web.get("/connectors", get(lambda r: api.names(r.query.getall("expand", [])))),
        web.post("/connectors", functools.partial(_with_body, lambda _, body: (201, api.create(body)))),
        web.get("/connectors/{name}", get(lambda r: api.info(api.entry(_name(r))))),
        web.delete("/connectors/{name}", get(lambda r: api.delete(_name(r)), 204)),
        web.get("/connectors/{name}/config", get(lambda r: to_connect(api.entry(_name(r)).config)["config"])),
        web.put("/connectors/{name}/config", functools.partial(_with_body, lambda r, body: api.configure(_name(r), body))),
        web.get("/connectors/{name}/status", get(lambda r: api.status(_name(r), api.entry(_name(r))))),
        web.get("/connectors/{name}/tasks", get(lambda r: api.info(api.entry(_name(r)))["tasks"])),
        web.put("/connectors/{name}/pause", get(lambda r: api.aim(_name(r), book.PAUSED), 202)),
        web.put("/connectors/{name}/resume", get(lambda r: api.aim(_name(r), book.RUNNING), 202)),
        web.put("/connectors/{name}/stop", get(lambda r: api.aim(_name(r), book.STOPPED), 204)),
        web.post(
            "/connectors/{name}/restart",
            get(lambda r: api.restart(_name(r), only_failed=r.query.get("onlyFailed", "").lower() == "true"), 204),
        ),
        web.get("/connectors/{name}/offsets", get(lambda r: api.offsets(_name(r)))),
        web.delete("/connectors/{name}/offsets", get(lambda r: api.forget(_name(r)))),
        web.get("/connector-plugins", get(lambda _: api.classes())),
        web.put(
            "/connector-plugins/{name}/config/validate", functools.partial(_with_body, lambda r, body: (200, api.validate(_name(r), body)))
        ),
    ]


def _name(request: web.Request) -> str:
    return request.match_info["name"]


def _in_file(name: str) -> str:
    return f"Connector {name} stands in the configuration file: change or remove it there; it can be paused, stopped and restarted"


async def _answer(call: Callable[[web.Request], tuple[int, Any]], request: web.Request) -> web.StreamResponse:
    """The log blocks, so not on the event loop."""
    status, body = await asyncio.to_thread(call, request)
    return web.Response(status=status) if body is None else web.json_response(body, status=status)


async def _with_body(call: Callable[[web.Request, dict[str, Any]], tuple[int, Any]], request: web.Request) -> web.StreamResponse:
    if request.content_type != "application/json":  # a browser may send other types to a port of this machine unasked
        raise Wrong(415, "send Content-Type: application/json")
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError) as e:
        raise Wrong(400, f"not JSON: {e}") from None
    if not isinstance(body, dict):
        raise Wrong(422, f"a JSON object is wanted, not {type(body).__name__}")
    return await _answer(lambda r: call(r, body), request)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in Connect's words."""
    try:
        return await handler(request)
    except Wrong as e:
        status, message = e.status, str(e)
    except ConfigError as e:
        status, message = 400, str(e)
    except NotFound as e:
        status, message = 404, str(e)
    except Retryable as e:
        status, message = 503, str(e)
    except web.HTTPException as e:
        status, message = e.status, f"HTTP {e.status} {e.reason}"
    except Exception:
        logger.exception("%s %s", request.method, request.path)
        status, message = 500, "an error of the server; see its log"
    return web.json_response({"error_code": status, "message": message}, status=status)


def application(api: Api) -> web.Application:
    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not api.token and not _loopback(request.url.host or ""):  # a page whose name a browser was told to find here
            raise Wrong(403, "without a token only requests to localhost or a loopback address are answered")
        given = request.headers.get("Authorization", "")
        if api.token and not hmac.compare_digest(given.encode(), f"Bearer {api.token}".encode()):
            raise Wrong(401, "send Authorization: Bearer, with the token of STREAMLEARN_REST_TOKEN")
        return await handler(request)

    app = web.Application(middlewares=[_errors, guarded], client_max_size=MAX_BODY)
    app.add_routes(routes(api))
    return app


class Server:
    """The API in a thread with an event loop of its own."""

    def __init__(self, app: web.Application, host: str, port: int):
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        self._thread = threading.Thread(target=self._loop.run_forever, name="rest", daemon=True)
        self._thread.start()
        try:
            self._call(self._start(host, port))
        except OSError as e:
            self.close()
            raise ConfigError(f"connect.rest_port = {port}: cannot listen on {host} ({e}); choose another, or 0 for no REST API") from e

    async def _start(self, host: str, port: int) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()

    def close(self) -> None:
        try:
            self._call(self._runner.cleanup())
        except TimeoutError:  # a request waits for the log; the process ends all the same
            logger.warning("the REST API did not close in time")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


def serve(api: Api, config: ConnectConfig) -> Server:
    """Raises ConfigError: the port is taken, or anybody could give orders."""
    if not api.token and not _loopback(config.rest_host):
        raise ConfigError(
            f"connect.rest_host = {config.rest_host!r} can be reached by others, and no token is asked of them: "
            "set the environment variable STREAMLEARN_REST_TOKEN, or rest_host = '127.0.0.1'"
        )
    return Server(application(api), config.rest_host, config.rest_port)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
