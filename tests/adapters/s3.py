"""A bucket for tests: moto's S3 server on the loopback, one for the session, and a fresh bucket for every test."""

import functools
import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from streamlearn.contract.config import StoreConfig
from tests.adapters.faultproxy import FaultProxy

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
# nothing of the machine's own may reach a test: neither its profiles nor its proxies nor its role
ISOLATED = {
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
FOREIGN = (
    "AWS_PROFILE",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
)


class OneAtATime:
    """S3 decides a conditional PUT atomically; moto looks, then writes, with other threads in between.  The lock makes up for it."""

    def __init__(self, app):
        self.app, self.lock = app, threading.Lock()

    def __call__(self, environ, start_response):
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self.app(environ, start_response)
        with self.lock:
            return self.app(environ, start_response)


@dataclass(frozen=True)
class Bucket:
    name: str
    server: tuple[str, int]

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server)

    def config(self, **more) -> StoreConfig:
        fields = dict(kind="s3", bucket=self.name, prefix="main", endpoint_url=self.url, path_style=True, attempts=2)
        return StoreConfig(**fields | more)

    @contextmanager
    def behind_faults(self, *faults, tls=None) -> Iterator[FaultProxy]:
        with FaultProxy(self.server, tls) as proxy:
            proxy.faults = list(faults)
            yield proxy

    def client(self) -> Any:
        """The SDK itself, to look at the bucket from outside."""
        return _client(self.url)


@functools.cache  # a client takes a while to make
def _client(url: str) -> Any:
    import boto3

    return boto3.session.Session(**{name.lower(): value for name, value in CREDENTIALS.items()}).client(
        "s3", endpoint_url=url, region_name="us-east-1"
    )


@contextmanager
def s3_serving() -> Iterator[tuple[str, int]]:
    """Its address, while it runs in threads of this process."""
    from moto.server import ThreadedMotoServer  # a second to import, and most tests do without

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request buries what a failed test says
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    server._server.app = OneAtATime(server._server.app)
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    with s3_serving() as address:
        yield address


@pytest.fixture
def s3_environment(monkeypatch) -> None:
    """Credentials where boto3 and delta-rs both look for them."""
    isolate(monkeypatch)


def isolate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    for name, value in (CREDENTIALS | ISOLATED).items():
        monkeypatch.setenv(name, value)


def new_bucket(server: tuple[str, int]) -> Bucket:
    made = Bucket(f"test-{uuid.uuid4().hex}", server)
    made.client().create_bucket(Bucket=made.name)
    return made


@pytest.fixture
def bucket(s3_server, s3_environment) -> Bucket:
    return new_bucket(s3_server)
