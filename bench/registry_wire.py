"""For bench.registry: Debian's docker-registry as a process, and a wire to it that counts what passes and stops where it is told."""

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def DockerRegistry(folder: Path) -> Iterator[str]:
    """Its host:port, while it runs; its data in `folder`."""
    if shutil.which("docker-registry") is None:
        sys.exit("docker-registry is not installed: apt-get install docker-registry")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder.mkdir(parents=True)
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: of-the-benchmark}}\n"
    )
    with (folder / "log").open("wb") as log:
        argv = ["docker-registry", "serve", str(folder / "config.yml")]
        server = subprocess.Popen(argv, stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin"})
    try:
        while not _listens(port):
            if server.poll() is not None:
                sys.exit((folder / "log").read_text())
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class Wire:
    """Passes everything on, both ways; `passed` counts; after the told number of bytes it holds everything still and sets `stopped`."""

    def __init__(self, host: str):
        name, port = host.split(":")
        self.server, self.passed, self.limit, self.stopped = (name, int(port)), 0, -1, threading.Event()
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> "Wire":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.close()

    def stop_after(self, count: int) -> None:
        """From now on; -1: never."""
        with self.lock:
            self.limit = -1 if count < 0 else self.passed + count
            self.stopped.clear()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                with self.lock:
                    room = len(data) if self.limit < 0 else min(len(data), self.limit - self.passed)
                    self.passed += room
                    if room < len(data):
                        self.stopped.set()
                target.sendall(data[:room])
                if room < len(data):
                    while self.stopped.is_set():  # the client is about to be killed
                        time.sleep(0.05)
                    break
        for s in (source, target):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
