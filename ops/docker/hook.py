"""A webhook for tests: whatever is posted is printed as one line of JSON; GET answers with all that was.  hook.py PORT, on this machine only."""

import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hook(BaseHTTPRequestHandler):
    heard: list[object] = []  # noqa: RUF012  of the whole server, whose handlers live for a request

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.heard.append(body)
        sys.stdout.write(json.dumps(body) + "\n")
        sys.stdout.flush()
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(json.dumps(self.heard).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process of a container has no default for it
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Hook).serve_forever()
