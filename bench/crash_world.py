"""What the crash benchmark runs against: brokers, an object store and a web server, all of which go wrong now and then."""

import contextlib
import functools
import io
import multiprocessing
import os
import random
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from aiohttp import web
from PIL import Image

from bench import crash_s3
from bench.web import hosts_of
from streamlearn.contract.config import KafkaConfig, StoreConfig
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, DEAD_LETTERS, HOSTS, SHARDS, TAKEDOWNS, retry_topic
from tests.adapters.faultproxy import Act, Fault, FaultProxy
from tests.adapters.kafka import DROP, MockCluster
from tests.adapters.s3 import CREDENTIALS, FOREIGN, ISOLATED, Bucket, s3_serving
from tests.ingest.server import serving

PARTITIONS = 3
ADDRESSES = hosts_of(PARTITIONS)  # of the web server
RETRIES = (0.5, 0.5, 0.5)  # s; a retry topic each
TOPICS = (CANDIDATES, *(retry_topic(i) for i in range(len(RETRIES))))
OTHERS = (DEAD_LETTERS, SHARDS, CONNECTOR_CONFIGS, TAKEDOWNS, HOSTS)  # that the role asks for
Kind = Literal["good", "flaky", "gone", "garbage", "never"]
NOT_LEADER, COORDINATOR_LOADING, NOT_COORDINATOR = 6, 14, 16
S3_FAULTS: tuple[Act, ...] = ("answer", "reset_before", "reset_after", "delay", "truncate")
Context = multiprocessing.context.ForkServerContext


def kind_of(n: int) -> Kind:
    """How the server answers for image n, for ever."""
    if n % 10 == 3:
        return "flaky"  # 503 at first: deferred, then stored
    if n % 50 == 7:
        return "gone"
    if n % 50 == 31:
        return "garbage"
    return "never" if n % 100 == 59 else "good"


@functools.cache
def _templates() -> list[bytes]:
    made = []
    for seed in range(16):
        out = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out, "JPEG", quality=50)
        made.append(out.getvalue())
    return made


def body(n: int) -> bytes:
    """A JPEG like no other, without the cost of encoding one: a comment behind the start marker makes it so."""
    jpeg = _templates()[n % 16]
    comment = f"image {n} ".encode() + bytes(random.Random(n).randrange(900))
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + jpeg[2:]


class Site:
    """Serves /<n>.jpg, each n after its kind."""

    def __init__(self) -> None:
        self.hits: Counter[int] = Counter()

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get(r"/{n:\d+}.jpg", self.picture)
        return app

    async def picture(self, request: web.Request) -> web.Response:
        n = int(request.match_info["n"])
        self.hits[n] += 1
        kind = kind_of(n)
        # fewer failures than there are tries, so that it must be stored in the end
        if kind == "never" or (kind == "flaky" and self.hits[n] <= 1 + n // 10 % len(RETRIES)):
            raise web.HTTPServiceUnavailable
        if kind == "gone":
            raise web.HTTPNotFound
        return web.Response(body=b"\0" * 100 if kind == "garbage" else body(n), content_type="image/jpeg")


def _serve(pipe: Connection) -> None:
    with serving(Site(), ADDRESSES) as base:
        pipe.send(base)
        with contextlib.suppress(EOFError):  # our parent is gone: so are we
            pipe.recv()


@contextlib.contextmanager
def site(context: Context) -> Iterator[str]:
    """The web server, in a process of its own; its address."""
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs,), daemon=True)
    child.start()
    theirs.close()
    yield ours.recv()
    ours.close()
    child.terminate()
    child.join()


class Chance(Fault):
    """A fault at random, whatever is asked; now and then so many that every try of a request meets one."""

    def __init__(self, seed: int, share: float, tally: Counter[str]):
        super().__init__("answer", times=1)
        self.rng, self.share, self.tally, self.storm_until = random.Random(seed), share, tally, 0.0

    def matches(self, method: str, path: str) -> bool:
        share = 0.7 if time.monotonic() < self.storm_until else self.share
        if self.rng.random() >= share:
            return False
        self.act = self.rng.choice(S3_FAULTS)
        self.delay_s, self.keep = self.rng.uniform(0.05, 0.5), self.rng.randrange(100)
        if self.rng.random() < 0.03:
            self.storm_until = time.monotonic() + 0.5
            self.tally["storm"] += 1
        self.tally["503" if self.act == "answer" else self.act] += 1
        return True


@dataclass
class Brokers:
    """The mock cluster, and a thread that troubles it."""

    cluster: MockCluster
    prefix: str
    seed: int
    tally: Counter[str] = field(default_factory=Counter)
    calm: threading.Event = field(default_factory=threading.Event)

    def config(self) -> KafkaConfig:
        return KafkaConfig(
            servers=self.cluster.servers,
            topic_prefix=self.prefix,
            api_version=(2, 3),
            request_timeout_s=4.0,
            delivery_timeout_s=6.0,
            session_timeout_s=1.5,  # the mock lets a group wait so long for a member that was killed
        )

    def trouble(self) -> None:
        rng = random.Random(self.seed)
        while not self.calm.wait(rng.uniform(2, 8)):
            name, act = rng.choice(self._troubles(rng))
            self.tally[name] += 1
            act()

    def _troubles(self, rng: random.Random) -> list[tuple[str, Callable[[], None]]]:
        fail, api = (
            self.cluster.fail,
            rng.choice(["Produce", "Fetch", "Metadata", "OffsetCommit", "OffsetFetch", "JoinGroup", "ListOffsets"]),
        )
        group = rng.choice(["JoinGroup", "OffsetCommit", "OffsetFetch"])
        place = (self.prefix + rng.choice(TOPICS), rng.randrange(PARTITIONS), rng.randint(1, 3))
        return [
            ("connection dropped", lambda: fail(api, *[DROP] * rng.randint(1, 3))),
            ("not leader", lambda: fail(rng.choice(["Produce", "Fetch", "ListOffsets"]), NOT_LEADER)),
            ("coordinator", lambda: fail(group, rng.choice([COORDINATOR_LOADING, NOT_COORDINATOR]))),
            ("leader moved", lambda: self.cluster.set_leader(*place)),
            ("broker down", lambda: self._down(rng.randint(1, 3), heir=rng.randint(1, 3) if rng.random() < 0.8 else 0)),
        ]

    def _down(self, broker: int, heir: int) -> None:
        """For a second; mostly another leads meanwhile, as with real brokers.  Where none does, kafka-python's producer is lost for good:
        it never asks again who leads, and the process must end (Stuck)."""
        for topic in (*TOPICS, *OTHERS) if heir else ():
            for partition in range(PARTITIONS):
                self.cluster.set_leader(self.prefix + topic, partition, heir if heir != broker else broker % 3 + 1)
        self.cluster.down(broker)
        self.calm.wait(1.0)
        self.cluster.up(broker)


@contextlib.contextmanager
def brokers(seed: int) -> Iterator[Brokers]:
    made = Brokers(MockCluster(), "crash.", seed)
    for topic in (*TOPICS, *OTHERS):
        made.cluster.make_topic(made.prefix + topic, PARTITIONS)
    thread = threading.Thread(target=made.trouble, name="trouble", daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.calm.set()
        thread.join(10)
        made.cluster.close()


@dataclass
class S3:
    direct: StoreConfig  # for the audit
    faulty: StoreConfig  # for the workers
    tally: Counter[str]
    proxy: FaultProxy


def environment() -> None:
    """Credentials where boto3 and delta-rs look for them, for this process and all that it starts."""
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(CREDENTIALS | ISOLATED)


@contextlib.contextmanager
def s3(seed: int, context: Context | None, share: float = 0.004) -> Iterator[S3]:
    """moto's, or with a context the small one in a process of its own."""
    with s3_serving() if context is None else crash_s3.serving(context) as address, FaultProxy(address) as proxy:
        bucket, tally = Bucket("crash", address), Counter[str]()
        if context is None:
            bucket.client().create_bucket(Bucket=bucket.name)
        seen: Any = deque(maxlen=1)  # hundreds of thousands of requests: not to be kept
        proxy.seen, proxy.headers, proxy.faults = seen, seen, [Chance(seed, share, tally)]
        timeouts: dict[str, Any] = {"attempts": 3, "read_timeout_s": 10.0}
        yield S3(bucket.config(**timeouts), bucket.config(endpoint_url=proxy.url, **timeouts), tally, proxy)


def spools(home: Path) -> list[Path]:
    """What workers left in their spools."""
    return sorted(p for p in home.glob("worker*/spool/*") if p.is_file())
