"""A registry to test against: Debian's docker-registry as a process of its own, with its data in a folder; and what stands between."""

import base64
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamlearn.adapters.oci_registry import OciRegistry
from streamlearn.contract.config import SnapshotsConfig

USER, PASSWORD = "trainer", "s3cret-of-the-test"
HTPASSWD = f"{USER}:$2b$04$hultUgTDZzZo9ZgwGu7Wb.QgNQMC3b0Y2ukXvTq6936vpClvA0FdW\n"
DEADLINE_S = 60.0


class DockerRegistry:
    """`with DockerRegistry(folder) as server:`; stopped and started again it is the same one, on the same port."""

    def __init__(self, folder: Path, auth: str = "", tls: tuple[Path, Path] | None = None):
        self.folder, self.port, self.process = folder, free_port(), None
        folder.mkdir(parents=True)
        secured = f", tls: {{certificate: {tls[0]}, key: {tls[1]}}}" if tls else ""
        (folder / "config.yml").write_text(
            f"version: 0.1\nlog: {{level: warn}}\nstorage: {{delete: {{enabled: true}}, filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}', secret: of-the-test{secured}}}\n{auth}"
        )

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> "DockerRegistry":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            argv = ["docker-registry", "serve", str(self.folder / "config.yml")]
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin"})
        end = time.monotonic() + DEADLINE_S
        while not listens(self.port):
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "log").read_text()
            time.sleep(0.02)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(DEADLINE_S)

    def blob(self, digest: str) -> Path:
        return self.folder / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256" / digest[7:9] / digest[7:] / "data"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def require(tool: str) -> None:
    from tests.conftest import missing  # which has this module's fixtures

    if shutil.which(tool) is None:
        missing(f"{tool} is not installed")


@pytest.fixture(scope="session")
def docker_registry(tmp_path_factory) -> Iterator[DockerRegistry]:
    """One for the session: tests keep to repositories of their own."""
    require("docker-registry")
    with DockerRegistry(tmp_path_factory.mktemp("docker-registry") / "served") as server:
        yield server


def settings(host: str, **more) -> SnapshotsConfig:
    fields = dict(registry=f"oci://{host}/tests/{uuid.uuid4().hex}", plain_http=True, attempts=3, max_pause_s=1.0, chunk_bytes=2**16)
    return SnapshotsConfig(**fields | more)


def remote(host: str, spool: Path, **more) -> OciRegistry:
    return OciRegistry(settings(host, **more), spool)


class Choke:
    """A wire that passes `after` bytes of a connection in one direction, says so in `choked`, and then nothing more."""

    def __init__(self, server: tuple[str, int], *, up: int = -1, down: int = -1):
        self.server, self.limits, self.choked = server, (up, down), threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = []

    def __enter__(self) -> "Choke":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.close()
        self.cut()

    def let_pass(self) -> None:
        """What was choked is cut off; what comes passes."""
        self.limits = (-1, -1)
        self.cut()

    def cut(self) -> None:
        for s in self.open:
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.server)
            self.open += [client, server]
            for source, target, limit in ((client, server, self.limits[0]), (server, client, self.limits[1])):
                threading.Thread(target=self._pass, args=(source, target, limit), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, limit: int) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if 0 <= limit < passed + len(data):
                    target.sendall(data[: limit - passed])
                    self.choked.set()
                    return  # both ends stay open, and nothing comes
                passed += len(data)
                target.sendall(data)
        for s in (source, target):  # one side has ended
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)


def docker_config(path: Path, host: str, user: str = USER, password: str = PASSWORD) -> Path:
    """As `docker login` writes it."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return path


@contextmanager
def htpasswd_registry(folder: Path) -> Iterator[DockerRegistry]:
    require("docker-registry")
    folder.mkdir(parents=True)
    (folder / "htpasswd").write_text(HTPASSWD)
    with DockerRegistry(folder / "served", f"auth: {{htpasswd: {{realm: tests, path: {folder / 'htpasswd'}}}}}\n") as server:
        yield server
