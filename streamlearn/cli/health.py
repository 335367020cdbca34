"""What a role answers over HTTP: /metrics for Prometheus, /healthz (is it alive), /readyz (does it make progress).

Health is the role's own word: its last heartbeat, and how long ago that was.  A process whose main loop hangs is not healthy, though its
threads still answer.  A role that waits for a full disk, a store or a broker
is healthy (nothing is lost, and a restart would not help) but not ready, and says what it waits for and since when.
"""

import errno
import json
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from streamlearn.contract.errors import ConfigError
from streamlearn.contract.status import Heartbeat, judged


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Scrapes are not news."""


def answer(heartbeat: Heartbeat, path: str) -> tuple[int, dict[str, Any]]:
    """(HTTP status, body) of /healthz or /readyz."""
    values, silent_s = heartbeat.said()
    alive, ready = judged(values, silent_s)
    body = {"role": heartbeat.role, "healthy": alive, "ready": ready, "silent_s": round(silent_s, 1)} | values
    return (200 if (alive if path == "/healthz" else ready) else 503), body


def serve(port: int, registry: CollectorRegistry, heartbeat: Heartbeat, *, host: str = "127.0.0.1") -> int:
    """Serve in a daemon thread; the port.  Raises ConfigError where it is taken."""
    metrics = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path not in ("/healthz", "/readyz"):
            return metrics(environ, start)
        status, body = answer(heartbeat, path)
        start("200 OK" if status == 200 else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps(body, indent=1).encode()]

    try:
        server = make_server(host, port, app, ThreadingWSGIServer, handler_class=_Quiet)
    except OSError as e:
        if e.errno != errno.EADDRINUSE:
            raise ConfigError(f"metrics_host = {host!r}: no IPv4 address of this machine ({e}); set 127.0.0.1, or 0.0.0.0 for all") from e
        raise ConfigError(f"metrics_port: port {port} for {heartbeat.role} is taken ({e}); choose another, or 0 for any") from e
    assert server.socket.family == socket.AF_INET
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return int(server.server_port)
