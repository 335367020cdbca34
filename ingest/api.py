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
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from ingest.connectors import book, definitions, plugins
from ingest.connectors.base import Cursor, load
from ingest.connectors.configure import from_connect, local_paths, to_connect
from ingest.connectors.worker import Workers
from streamlearn.contract.config import Config, ConnectConfig
from streamlearn.contract.errors import ConfigError, NotFound, Retryable
from streamlearn.contract.event_log import CANDIDATES, SOURCE_STATE, EventLog
from streamlearn.contract.metrics import OTHER, ConnectMetrics

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

    def tasks(self, entry: book.Entry) -> list[dict[str, Any]]:
        name, config = entry.config.name, to_connect(entry.config)["config"]
        return [{"id": {"connector": name, "task": 0}, "config": config}]

    def task(self, name: str, number: str) -> dict[str, Any]:
        tasks: list[dict[str, Any]] = self.status(name, self.entry(name))["tasks"]
        found = next((task for task in tasks if str(task["id"]) == number), None)
        if found is None:
            raise NotFound(f"no status of task {number} of connector {name}")
        return found

    def topics(self, entry: book.Entry) -> dict[str, Any]:
        return {entry.config.name: {"topics": [CANDIDATES, entry.config.dead_letter_topic]}}

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name, flat, target = body.get("name"), body.get("config"), body.get("initial_state", book.RUNNING)
        if not isinstance(name, str) or not isinstance(flat, dict):
            raise Wrong(422, 'a connector is {"name": "...", "config": {"connector.class": "...", ...}}')
        if target not in book.TARGETS:
            raise Wrong(400, f"initial_state = {target!r}: one of {', '.join(book.TARGETS)}")
        with self.lock:
            if name in book.entries(self.config, self.log):
                raise Wrong(409, f"Connector {name} already exists")
            self._put(name, flat, target)
        return self.info(self.entry(name))

    def configure(self, name: str, flat: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            before = book.entries(self.config, self.log).get(name)
            if before is not None and before.in_file:
                raise Wrong(409, _in_file(name))
            self._put(name, flat)
        return 201 if before is None else 200, self.info(self.entry(name))

    def change(self, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        """As RFC 7396 merges: null takes a key away."""
        with self.lock:
            before = self.entry(name)
            if before.in_file:
                raise Wrong(409, _in_file(name))
            merged = to_connect(before.config)["config"] | patch
            self._put(name, {key: value for key, value in merged.items() if value is not None})
        return self.info(self.entry(name))

    def _put(self, name: str, flat: dict[str, Any], target: str = book.RUNNING) -> None:
        if flat.get("name", name) != name:
            raise Wrong(400, f"the config says name = {flat['name']!r}, the request {name!r}")
        config = from_connect({"name": name} | flat, where="request")
        for key, value in local_paths(config).items():
            if not value.startswith("/"):
                raise ConfigError(f"connector {name}: {key} = {value!r}: give the whole path, a request has no folder of its own")
        book.put(self.config, self.log, config, target)

    def aim(self, name: str, target: str) -> None:
        with self.lock:
            book.aim(self.config, self.log, name, target)

    def restart(self, name: str, *, only_failed: bool = False, tasks: bool = False) -> tuple[int, dict[str, Any] | None]:
        """A connector and its one task are one thread, so they are restarted together; asked in the newer way, it is told how they are."""
        with self.lock:
            entry = self.entry(name)
            if not only_failed or self.workers.states({name: entry})[name]["state"] == "FAILED":
                book.restart(self.config, self.log, name)
        return (202, self.status(name, entry)) if only_failed or tasks else (204, None)

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
        self._move(name, None)
        return {"message": "The offsets for this connector have been reset successfully"}

    def alter(self, name: str, body: dict[str, Any]) -> dict[str, str]:
        """A source of ours has one partition, so one offset: its cursor."""
        match body.get("offsets"):
            case [{"partition": {"connector": str(said)}, "offset": dict() | None as cursor}] if said == name:
                self._move(name, cursor)
            case _:
                raise Wrong(400, f'an offset is {{"offsets": [{{"partition": {{"connector": "{name}"}}, "offset": {{...}} or null}}]}}')
        return {"message": "The offsets for this connector have been altered successfully"}

    def _move(self, name: str, cursor: Cursor | None) -> None:
        with self.lock:
            if self.entry(name).target != book.STOPPED or not self.workers.idle(name):
                raise Wrong(409, f"Connector {name} is not stopped: PUT /connectors/{name}/stop, and wait until its status says STOPPED")
            book.move(self.log, name, cursor)

    def classes(self) -> list[dict[str, str]]:
        return [{"class": p.name, "type": "source", "version": p.version} for p in plugins.plugins().values()]

    def validate(self, name: str, flat: dict[str, Any]) -> dict[str, Any]:
        if name not in plugins.plugins():
            raise NotFound(f"no connector class {name}")
        return definitions.validate(name, {"connector.class": name} | flat)

    def keys(self, name: str) -> list[dict[str, Any]]:
        return [one["definition"] for one in self.validate(name, {})["configs"]]

    def health(self) -> dict[str, str]:
        """Whether orders can be read; how each connector does is /connectors?expand=status."""
        self.names([])
        return {"status": "healthy", "message": "Worker has completed startup and is ready to handle requests."}


def routes(api: Api) -> list[web.RouteDef]:
    """Connect's paths."""

    def get(call: Callable[[web.Request], Any], status: int = 200) -> Handler:
        return functools.partial(_answer, lambda request: (status, call(request)))

    def put(call: Callable[[web.Request, dict[str, Any]], Any], status: int = 200) -> Handler:
        return functools.partial(_with_body, lambda request, body: (status, call(request, body)))

    def restart(request: web.Request) -> tuple[int, Any]:
        return api.restart(_name(request), only_failed=_flag(request, "onlyFailed"), tasks=_flag(request, "includeTasks"))

    def restart_task(request: web.Request) -> None:
        api.task(_name(request), request.match_info["task"])
        api.restart(_name(request))

    one, plugin = "/connectors/{name}", "/connector-plugins/{name}"
    return [
        web.get("/", get(lambda _: api.root())),
        web.get("/health", get(lambda _: api.health())),
        web.get("/connectors", get(lambda r: api.names(r.query.getall("expand", [])))),
        web.post("/connectors", put(lambda _, body: api.create(body), 201)),
        web.get(one, get(lambda r: api.info(api.entry(_name(r))))),
        web.delete(one, get(lambda r: api.delete(_name(r)), 204)),
        web.get(f"{one}/config", get(lambda r: to_connect(api.entry(_name(r)).config)["config"])),
        web.put(f"{one}/config", functools.partial(_with_body, lambda r, body: api.configure(_name(r), body))),
        web.patch(f"{one}/config", put(lambda r, body: api.change(_name(r), body))),
        web.get(f"{one}/status", get(lambda r: api.status(_name(r), api.entry(_name(r))))),
        web.get(f"{one}/tasks", get(lambda r: api.tasks(api.entry(_name(r))))),
        web.get(f"{one}/tasks/{{task}}/status", get(lambda r: api.task(_name(r), r.match_info["task"]))),
        web.post(f"{one}/tasks/{{task}}/restart", get(restart_task, 204)),
        web.get(f"{one}/topics", get(lambda r: api.topics(api.entry(_name(r))))),
        web.put(f"{one}/pause", get(lambda r: api.aim(_name(r), book.PAUSED), 202)),
        web.put(f"{one}/resume", get(lambda r: api.aim(_name(r), book.RUNNING), 202)),
        web.put(f"{one}/stop", get(lambda r: api.aim(_name(r), book.STOPPED), 204)),
        web.post(f"{one}/restart", functools.partial(_answer, restart)),
        web.get(f"{one}/offsets", get(lambda r: api.offsets(_name(r)))),
        web.patch(f"{one}/offsets", put(lambda r, body: api.alter(_name(r), body))),
        web.delete(f"{one}/offsets", get(lambda r: api.forget(_name(r)))),
        web.get("/connector-plugins", get(lambda _: api.classes())),
        web.get(f"{plugin}/config", get(lambda r: api.keys(_name(r)))),
        web.put(f"{plugin}/config/validate", put(lambda r, body: api.validate(_name(r), body))),
    ]


def _flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "").lower() == "true"


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


def route_of(request: web.Request) -> str:
    """Of metrics.API_ROUTES: never a connector's name."""
    resource = request.match_info.route.resource
    return OTHER if resource is None else resource.canonical


def application(api: Api, metrics: ConnectMetrics) -> web.Application:
    @web.middleware
    async def counted(request: web.Request, handler: Handler) -> web.StreamResponse:
        began, route, code = time.monotonic(), route_of(request), "5xx"
        try:
            answer = await handler(request)
            code = f"{answer.status // 100}xx"
            return answer
        finally:  # one that is given up by its sender, too
            metrics.requests.labels(route, code).inc()
            metrics.seconds.labels(route).observe(time.monotonic() - began)

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not api.token and not _loopback(request.url.host or ""):  # a page whose name a browser was told to find here
            raise Wrong(403, "without a token only requests to localhost or a loopback address are answered")
        given = request.headers.get("Authorization", "")
        if api.token and not hmac.compare_digest(given.encode(), f"Bearer {api.token}".encode()):
            raise Wrong(401, "send Authorization: Bearer, with the token of STREAMLEARN_REST_TOKEN")
        return await handler(request)

    app = web.Application(middlewares=[counted, _errors, guarded], client_max_size=MAX_BODY)
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


def serve(api: Api, config: ConnectConfig, metrics: ConnectMetrics) -> Server:
    """Raises ConfigError: the port is taken, or anybody could give orders."""
    if not api.token and not _loopback(config.rest_host):
        raise ConfigError(
            f"connect.rest_host = {config.rest_host!r} can be reached by others, and no token is asked of them: "
            "set the environment variable STREAMLEARN_REST_TOKEN, or rest_host = '127.0.0.1'"
        )
    return Server(application(api, metrics), config.rest_host, config.rest_port)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
