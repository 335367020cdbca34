"""The whole configuration as frozen models: every key with its meaning, range and default.  Read by contract/config_file.py.

Nothing is ever written back: derived values are properties.  The resolved config travels in every checkpoint and snapshot.
"""

import hashlib
import json
from ipaddress import ip_network
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_serializer, model_validator

from streamlearn.contract.config_learn import ModelConfig, ObjectiveConfig, OptimConfig, PlateauConfig, TrainConfig
from streamlearn.contract.config_probe import BankConfig, ProbeConfig
from streamlearn.contract.config_serve import ServeConfig
from streamlearn.contract.config_snapshots import SnapshotsConfig
from streamlearn.contract.config_stream import CropConfig, StreamConfig
from streamlearn.contract.event_log import OURS
from streamlearn.contract.object_store import is_key
from streamlearn.contract.section import Fraction, Section

__all__ = [
    "BankConfig", "Config", "ConnectConfig", "ConnectorConfig", "CropConfig", "DatasetConfig", "DemoConfig", "FetchConfig", "Fraction",
    "KafkaConfig", "LogConfig", "ModelConfig", "ObjectiveConfig", "OptimConfig", "PlateauConfig", "ProbeConfig", "Section", "ServeConfig", "ShardConfig",
    "SnapshotsConfig", "StoreConfig", "StreamConfig", "SuperviseConfig", "TrainConfig",
]  # fmt: skip


class ConnectorConfig(Section):
    """A source of candidates.  The class's own options stand flat beside these keys (docs/connectors.md)."""

    model_config = ConfigDict(extra="allow")  # the options: whoever looks at the connector validates them by its class

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")  # names its cursor: keep it
    kind: str = Field(alias="class", min_length=1)  # `streamlearn connectors list --plugins` names them
    tasks_max: int = Field(default=1, ge=1)  # threads; only 1 for a class that does not split its work
    errors_tolerance: Literal["none", "all"] = "all"  # none: a refused entry fails the connector; all: it is a dead letter, and on it goes
    errors_retry_delay_max_s: float = Field(default=60.0, gt=0)  # between tries after a fault; begins at half a second and doubles
    errors_log: bool = False  # say each refused entry in the role's log too
    dead_letter_topic: str = Field(default="dead-letters", pattern=r"^[A-Za-z0-9._-]{1,200}$")  # where refused entries go
    poll_s: float = Field(default=1.0, gt=0)  # between looks at the source

    @field_validator("dead_letter_topic")
    @classmethod
    def _not_ours(cls, value: str) -> str:
        if value in OURS or value.startswith("retry."):
            raise ValueError("this topic holds other things; name another, such as dead-letters")
        return value

    @classmethod
    def of(cls, name: str, kind: str, **settings: Any) -> Self:
        """The same from code, where `class` is no name.  Raises pydantic's ValidationError."""
        return cls.model_validate({"name": name, "class": kind} | settings)

    @property
    def options(self) -> dict[str, Any]:
        """What the class is to validate."""
        return dict(self.model_extra or {})

    def with_options(self, **options: Any) -> Self:
        return self.model_validate(self.given() | options)

    def given(self) -> dict[str, Any]:
        """As the user wrote it: without defaults."""
        own = {field.alias or name: getattr(self, name) for name, field in type(self).model_fields.items() if name in self.model_fields_set}
        return own | self.options

    @model_serializer(mode="plain")
    def plain(self) -> dict[str, Any]:
        """As the file may have it, whole: `class`, and the options flat."""
        return {field.alias or name: getattr(self, name) for name, field in type(self).model_fields.items()} | self.options


class ConnectConfig(Section):
    """The role that runs the connectors, and its REST API (docs/connectors.md)."""

    rest_port: int = Field(default=0, ge=0, le=65535)  # 0: no REST API
    rest_host: str = "127.0.0.1"  # any but a loopback address needs a token in the environment variable STREAMLEARN_REST_TOKEN


class KafkaConfig(Section):
    """The brokers, where `log.kind` is kafka.  The SASL password comes from a file or from STREAMLEARN_KAFKA_PASSWORD, never from here."""

    servers: tuple[str, ...] = ()  # bootstrap servers, host:port
    topic_prefix: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")  # before the names of topics and groups, where a cluster is shared
    epoch: int = Field(default=0, ge=0)  # raise it when topics were made anew: their offsets begin again, and so do the catalog's positions
    replication: int = Field(default=3, ge=1)  # of topics that streamlearn makes
    min_insync: int = Field(default=2, ge=1)  # likewise: a write is acknowledged by this many replicas
    api_version: tuple[int, ...] | None = None  # unset: asked of the brokers
    security: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"  # Kafka's security.protocol
    ssl_cafile: str = ""  # PEM; empty: the system's authorities
    ssl_certfile: str = ""  # PEM of the client, where brokers ask for one
    ssl_keyfile: str = ""  # PEM of its key
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = ""  # with SASL_PLAINTEXT or SASL_SSL
    sasl_username: str = ""  # likewise
    sasl_password_file: str = ""  # its first line; empty: the environment variable
    start_timeout_s: float = Field(default=60.0, gt=0)  # for the brokers to answer at a role's start
    request_timeout_s: float = Field(default=30.0, gt=0)  # one request
    delivery_timeout_s: float = Field(default=120.0, gt=0)  # an append, with all its tries
    session_timeout_s: float = Field(default=30.0, gt=0)  # a fetcher that is not heard of for so long loses its partitions

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.min_insync > self.replication:
            raise ValueError(f"min_insync = {self.min_insync} is over replication = {self.replication}: nothing could ever be written")
        if self.security.startswith("SASL") and not (self.sasl_mechanism and self.sasl_username):
            raise ValueError(f"security = {self.security!r} needs sasl_mechanism and sasl_username")
        if self.delivery_timeout_s < self.request_timeout_s + 0.5:  # the producer's own rule, with room for its linger
            raise ValueError(
                f"delivery_timeout_s = {self.delivery_timeout_s:g} leaves no time for one request of request_timeout_s = "
                f"{self.request_timeout_s:g}: set it to at least half a second more"
            )
        return self


class LogConfig(Section):
    """The event log: one SQLite file, or Kafka."""

    kind: Literal["sqlite", "kafka"] = "sqlite"  # sqlite is for the roles of one machine
    partitions: int = Field(default=2, ge=1, le=1024)  # of each topic; fixed once the log is made
    kafka: KafkaConfig = KafkaConfig()

    @model_validator(mode="after")
    def _servers(self) -> Self:
        if self.kind == "kafka" and not self.kafka.servers:
            raise ValueError("kind = 'kafka' needs log.kafka.servers, a list of host:port")
        return self


class StoreConfig(Section):
    """Where shards, rounds, checkpoints and the catalog lie.  S3 credentials come from boto3's own chain (environment, files, instance role)."""

    kind: Literal["folder", "s3"] = "folder"  # a folder of the home, or a bucket
    bucket: str = ""  # required for s3; it must exist
    prefix: str = ""  # put before every key, as a folder; empty: the whole bucket
    endpoint_url: str = ""  # of an S3-compatible store; empty: AWS
    region: str = "us-east-1"  # of the bucket
    path_style: bool = False  # the bucket in the path, not in the host name: for stores without wildcard DNS
    ca_bundle: str = ""  # file of CA certificates (PEM) that sign the endpoint's; empty: the system's. The catalog: SSL_CERT_FILE too
    part_bytes: int = Field(default=16 * 2**20, ge=5 * 2**20, le=5 * 2**30)  # of an upload; files under two go in one request
    attempts: int = Field(default=5, ge=1)  # tries of one request, with growing pauses, before the role backs off
    connect_timeout_s: float = Field(default=5.0, gt=0)  # until the socket is open
    read_timeout_s: float = Field(default=30.0, gt=0)  # between two bytes of an answer

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "s3" and not self.bucket:
            raise ValueError("kind 's3' needs store.bucket; set it, or set store.kind to 'folder'")
        if self.prefix and not is_key(self.prefix):
            raise ValueError(f"prefix = {self.prefix!r}: must be a relative path without empty or hidden parts, such as streamlearn/main")
        return self


class FetchConfig(Section):
    """Caps and manners of the fetcher.  Anything over a cap is a refusal, never an error."""

    concurrency: int = Field(default=32, ge=1, le=4096)  # requests in flight
    per_host: int = Field(default=8, ge=1)  # requests in flight to one host
    connect_timeout_s: float = Field(default=5.0, gt=0)  # until the socket is open
    total_timeout_s: float = Field(default=15.0, gt=0)  # one image, all redirects, header to last byte
    max_bytes: int = Field(default=20 * 2**20, ge=1024)  # of one image
    buffer_bytes: int = Field(default=2**28, ge=2**20)  # of images that wait in memory for the ones before them; then no more are asked for
    spool_bytes: int = Field(default=2**33, ge=2**20)  # on local disk, of open shards; then the largest is sealed early
    max_pixels: int = Field(default=64_000_000, ge=1024)  # by its header, before any decoding
    min_side: int = Field(default=16, ge=1)  # px; smaller images are trackers and spacers
    max_redirects: int = Field(default=5, ge=0)  # each checked like the first address
    attempts: int = Field(default=3, ge=1)  # quick tries inside one unit before a candidate is deferred
    backoff_s: float = Field(default=0.5, gt=0)  # before the second quick try; doubles
    retry_delays_s: tuple[float, ...] = (300.0, 3600.0, 86400.0)  # one retry topic each; after the last: dead
    user_agent: str = "streamlearn/0.1 (+https://example.org/streamlearn; set fetch.user_agent to your contact)"  # honest, with a contact
    allow_networks: tuple[str, ...] = ()  # CIDR blocks exempt from the guard against private addresses
    robots: bool = True  # obey robots.txt (RFC 9309), by the product token: user_agent up to its "/"
    robots_ttl_s: float = Field(default=86400.0, gt=0)  # a robots.txt is kept so long, or as its max-age says if shorter (not under 1 h)
    robots_retry_s: float = Field(default=600.0, gt=0)  # until a robots.txt that could not be had (5xx, no answer) is asked for again
    robots_entries: int = Field(default=4096, ge=1)  # origins whose rules are kept; the least lately used goes
    max_crawl_delay_s: float = Field(default=60.0, ge=0)  # a host that asks for more is left alone: refused, not queued for ever
    respect_noindex: bool = True  # X-Robots-Tag noindex, none, noimageindex refuse too; noai, noimageai, noml and TDM-Reservation always do
    host_rate: float = Field(default=2.0, ge=0)  # requests a second to one host; 0: no limit
    host_burst: int = Field(default=8, ge=1)  # requests at once to a host that was idle; none where it names a Crawl-delay
    global_rate: float = Field(default=0.0, ge=0)  # requests a second to all hosts together; 0: no limit
    max_wait_s: float = Field(default=30.0, gt=0)  # for a host's turn; what would wait longer is deferred
    breaker_failures: int = Field(default=5, ge=0)  # failures in a row (5xx, 429, no answer) after which a host is left alone; 0: never
    breaker_s: float = Field(default=60.0, gt=0)  # so long, then one trial; doubles up to an hour
    hosts: int = Field(default=65536, ge=1)  # whose budgets are kept in memory

    @field_validator("allow_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for block in value:
            ip_network(block)  # ValueError names the block
        return value


class ShardConfig(Section):
    """When a unit of offsets is closed and sealed into one shard."""

    max_bytes: int = Field(default=256 * 2**20, ge=2**16)  # of images
    max_samples: int = Field(default=4096, ge=1)  # offsets, whatever their outcome
    max_age_s: float = Field(default=300.0, gt=0)  # since its first record: a slow stream still reaches the learner


class DatasetConfig(Section):
    """How long images are kept, and what `streamlearn dataset` does about it."""

    window_days: float = Field(default=90.0, gt=0)  # since a shard's last image was fetched; then `expire` ends it
    grace_days: float = Field(default=7.0, ge=0)  # from a shard's end to the deletion of its objects: learners may be reading them
    upkeep_s: float = Field(default=3600.0, gt=0)  # between rounds of the role `refresh`: takedowns, expiry, a quarter's end
    refresh_rate: float = Field(default=20.0, ge=0)  # candidates a second that `refresh` re-queues; 0: no limit


class DemoConfig(Section):
    """The image world of the quickstart."""

    enabled: bool = False  # start its web server
    seed: int = 7  # of the world
    size: int = Field(default=48, ge=16)  # px
    rate: float = Field(default=100.0, gt=0)  # new images a second
    quarter_images: int = Field(default=6000, ge=1)  # images in a "quarter": then new concepts appear and styles shift
    max_images: int = Field(default=200_000, ge=1)  # then the world stands still
    port: int = Field(default=0, ge=0, le=65535)  # 0: any free one, kept over restarts
    address: str = "127.0.0.1"  # to listen on
    url: str = Field(default="", pattern=r"^(http://[^/\s]+)?$")  # as fetchers elsewhere reach it; empty: by its address and port


class SuperviseConfig(Section):
    """How `streamlearn up` keeps the roles running."""

    backoff_s: float = Field(default=0.5, gt=0)  # before the first restart; doubles
    backoff_max_s: float = Field(default=30.0, gt=0)  # between restarts, at most
    crash_loop: int = Field(default=5, ge=1)  # deaths ...
    crash_window_s: float = Field(default=60.0, gt=0)  # ... within this time: give up loudly
    grace_s: float = Field(default=30.0, gt=0)  # from SIGTERM to SIGKILL
    refresh_s: float = Field(default=1.0, gt=0)  # of the terminal view
    report_s: float = Field(default=60.0, ge=0)  # between report pages; 0: none


class Config(Section):
    """The whole run.  Relative paths are relative to the file's folder."""

    preset: str = ""  # whose values stand in for the defaults; `streamlearn config presets` names them.  Applied when the file is read
    home: str = ".streamlearn"  # the folder of all state; `--home` wins
    metrics_port: int = Field(default=0, ge=0, le=65000)  # first port of /metrics, one a role; 0: any free port
    metrics_host: str = "127.0.0.1"  # to answer on; "0.0.0.0" in a container, whose network is who may ask
    log_format: Literal["text", "json"] = "text"  # of what roles say in their logs; json: an object a line
    connectors: tuple[ConnectorConfig, ...] = ()
    connect: ConnectConfig = ConnectConfig()
    log: LogConfig = LogConfig()
    store: StoreConfig = StoreConfig()
    fetch: FetchConfig = FetchConfig()
    shard: ShardConfig = ShardConfig()
    dataset: DatasetConfig = DatasetConfig()
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    serve: ServeConfig = ServeConfig()
    probe: ProbeConfig = ProbeConfig()
    demo: DemoConfig = DemoConfig()
    supervise: SuperviseConfig = SuperviseConfig()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for what, names in (("connectors", self.connectors), ("probe.banks", self.probe.banks)):
            seen = [n.name for n in names]
            if len(set(seen)) != len(seen):
                raise ValueError(f"{what}: names must differ, got {seen}")
        return self

    @model_validator(mode="after")
    def _known_bank(self) -> Self:
        names = [bank.name for bank in self.probe.banks]
        if self.train.plateau.probe not in ("auto", "none", *names):
            raise ValueError(
                f"train.plateau.probe = {self.train.plateau.probe!r}: no bank of [[probe.banks]] has this name; there are: "
                f"{', '.join(names) or 'none'}; 'auto' takes the first, 'none' leaves it to the loss"
            )
        return self

    @property
    def plateau_bank(self) -> str:
        """The name of the bank whose error must be flat before the rate is halved; empty: none."""
        wanted = self.train.plateau.probe
        if wanted == "auto":
            return self.probe.banks[0].name if self.probe.banks else ""
        return "" if wanted == "none" else wanted

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON of the whole config."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
