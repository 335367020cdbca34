"""Every number the project exports, with its labels and unit.  Dashboards and alerts may use these names and no others (tests/ops).

Classes take a registry, so importing registers nothing.  Labels are closed sets, made in advance: never a host, a URL or a digest.
A role has one exporting process, and every role a heartbeat: gauges go on showing their last value when a loop hangs.
Times are `_timestamp_seconds` since the epoch, 0 where it has not happened yet; ratios are 0 to 1.
"""

import platform
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from streamlearn.contract.orders import ACTIONS
from streamlearn.contract.shards import OUTCOMES

STEPS = (
    "take over",
    "recover",
    "read",
    "spool",
    "seal",
)  # of the fetcher, that may have to wait: for the log, the store, the catalog, a disk
WAITS_ON = ("broker", "store", "catalog", "disk", "other")  # what a role waits for (errors.Retryable.on)
API_ROUTES = (
    *("/", "/health", "/connectors", "/connector-plugins", "/connector-plugins/{name}/config", "/connector-plugins/{name}/config/validate"),
    *("/connectors/{name}", "/connectors/{name}/config", "/connectors/{name}/status", "/connectors/{name}/topics"),
    *("/connectors/{name}/tasks", "/connectors/{name}/tasks/{task}/status", "/connectors/{name}/tasks/{task}/restart"),
    *("/connectors/{name}/pause", "/connectors/{name}/resume", "/connectors/{name}/stop", "/connectors/{name}/restart"),
    *("/connectors/{name}/offsets", "other"),
)  # of the connectors' REST API (ingest/api.py); other: no such path, or a method it has not
CONNECTOR_STATES = ("UNASSIGNED", "RUNNING", "PAUSED", "STOPPED", "FAILED")  # Kafka Connect's words
OTHER = "other"  # a source or bank that the configuration does not name
EVALUATED = (
    *("effective_rank", "rankme", "participation_ratio", "alpha_req", "uniformity", "alignment", "lidar"),
    *("code_entropy", "prototype_perplexity"),
)  # label-free measures
PULLED_BY = ("oci", "hf")  # protocols
SERVED = (*PULLED_BY, "page")  # what was asked for: pulls, and the page for people
ANSWERED = ("2xx", "3xx", "4xx", "5xx")
PULLED_AS = ("candidate", "stable", "best", "version", "digest", "other")  # how a snapshot was named
REFUSED_FOR = ("unauthorized", "forbidden", "unknown", "malformed", "read_only", "out_of_range")


WAITS = ("probe", "floor", "hold")  # why a plateau of the loss does not halve the learning rate

SIGNS = ("loss", "codes", "rank", "spread", "prototypes")  # of collapse (learn/guard.py)
CHANNELS = ("stable", "best")
VERDICTS = ("promoted", "refused", "waiting")  # of the gate (probes/gate.py)
REASONS = (
    *("bad_url", "bad_record", "no_record", "private_address", "too_many_redirects", "gone", "too_large", "empty", "not_an_image"),
    *("truncated", "corrupt", "animated", "too_small", "too_many_pixels", "no_answer", "outside_folder", "robots_txt", "crawl_delay"),
    *("opt_out", "taken_down"),
)  # why a candidate is refused (ingest/fetch/screen.py)
FRESH_S = 1800.0  # an image that is stored later than this after its discovery is late: the objective of ops/prometheus/rules/slo.yml
_QUICK = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # s: requests, steps
_WAITED = "How long {} has waited, by what the longest wait is for; 0: it does not"


def role_metrics(registry: CollectorRegistry, role: str, home: Path) -> None:
    """What every role exports: its version, the process (CPU, memory, files, start), and the room on the disk of its home."""
    ProcessCollector(registry=registry)
    try:
        ours = version("streamlearn")
    except PackageNotFoundError:
        ours = "unknown"  # run from a source tree
    build = Info("streamlearn_build", "What runs here", registry=registry)
    build.info({"version": ours, "python": platform.python_version(), "role": role})
    free = Gauge("streamlearn_home_free_bytes", "Room on the disk of the role's home", registry=registry)
    size = Gauge("streamlearn_home_bytes", "Size of that disk", registry=registry)
    free.set_function(lambda: shutil.disk_usage(home).free)
    size.set_function(lambda: shutil.disk_usage(home).total)


def _heartbeat(role: str, registry: CollectorRegistry) -> Gauge:
    beat = Gauge(f"{role}_heartbeat_timestamp_seconds", "When the role last went round its loop", registry=registry)
    beat.set_to_current_time()  # one that never gets round it is silent since it was started
    return beat


def _each(metric: Counter | Gauge | Histogram, *sets: Iterable[str]) -> None:
    """All children: a counter that starts at 0 shows its first increase."""
    names = [()] if not sets else [(one,) for one in sets[0]]
    for more in sets[1:]:
        names = [(*name, one) for name in names for one in more]
    for name in names:
        metric.labels(*name)


def _waiting(role: str, who: str, registry: CollectorRegistry) -> Gauge:
    gauge = Gauge(f"{role}_waiting_seconds", _WAITED.format(who), ["on"], registry=registry)
    _each(gauge, WAITS_ON)
    return gauge


def set_waiting(gauge: Gauge, on: str, seconds: float) -> None:
    """The longest wait of a role; 0 seconds: it does not wait.  `on`: Retryable.on of what failed last, "" where nothing did."""
    on = on if on in WAITS_ON else OTHER  # never silent about a wait
    for each in WAITS_ON:
        gauge.labels(each).set(seconds if each == on else 0.0)


class ConnectMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.candidates = Counter("connect_candidates", "Candidates appended to the log", registry=registry)
        self.refused = Counter("connect_refused", "Entries of a source that are no candidates, dead-lettered", registry=registry)
        self.connectors = Gauge("connect_connectors", "Connectors by state", ["state"], registry=registry)
        _each(self.connectors, CONNECTOR_STATES)
        self.failures = Counter("connect_failures", "Times a connector went to FAILED", registry=registry)
        self.waiting = _waiting("connect", "the role that runs the connectors", registry)
        self.requests = Counter("connect_requests", "Requests to the REST API, by how they ended", ["route", "code"], registry=registry)
        _each(self.requests, API_ROUTES, ANSWERED)
        self.seconds = Histogram("connect_request_duration_seconds", "One request", ["route"], registry=registry, buckets=_QUICK)
        _each(self.seconds, API_ROUTES)
        self.pushes = Counter("connect_webhook_requests", "Pushes to webhook connectors, by how they ended", ["code"], registry=registry)
        _each(self.pushes, ANSWERED)
        self.push_seconds = Histogram(
            "connect_webhook_request_duration_seconds", "One push, until what it brings is durable", registry=registry, buckets=_QUICK
        )
        self.heartbeat = _heartbeat("connect", registry)


class FetchMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.outcomes = Counter("fetch_outcomes", "Offsets by how they ended", ["outcome"], registry=registry)
        _each(self.outcomes, OUTCOMES)
        self.rejected = Counter("fetch_rejected", "Refused candidates by reason (a closed set)", ["reason"], registry=registry)
        _each(self.rejected, REASONS)
        self.bytes = Counter("fetch_received_bytes", "Bytes of image bodies received", registry=registry)
        self.seconds = Histogram("fetch_duration_seconds", "One fetch, redirects included", registry=registry, buckets=_QUICK)
        self.fresh = Histogram(
            "fetch_discovery_to_stored_seconds",
            "From the discovery of an image to the commit of its shard",
            registry=registry,
            buckets=(5, 15, 30, 60, 300, 600, FRESH_S, 3600, 10800, 86400),
        )
        self.in_flight = Gauge("fetch_requests_waiting", "Candidates asked for, or waiting for those before them", registry=registry)
        self.partitions = Gauge("fetch_partitions", "Partitions that this fetcher owns, of all topics", registry=registry)
        self.lag = Gauge("fetch_lag_records", "Records in the log that the catalog does not cover yet", registry=registry)
        self.oldest = Gauge(
            "fetch_oldest_uncommitted_age_seconds", "Age of the oldest record the catalog does not cover", registry=registry
        )
        self.spool = Gauge("fetch_spool_bytes", "Bytes of the open units on local disk", registry=registry)
        self.shards = Counter("fetch_shards_sealed", "Shards committed to the catalog", registry=registry)
        self.fenced = Counter("fetch_units_fenced", "Units dropped because another writer was first", registry=registry)
        self.sealed_at = Gauge("fetch_shard_sealed_timestamp_seconds", "When the last shard was sealed", registry=registry)
        self.waits = Counter(
            "fetch_waits", "Tries that failed and are waited out, by the step that cannot go on", ["step"], registry=registry
        )
        _each(self.waits, STEPS)
        self.waiting = _waiting("fetch", "the fetcher", registry)
        self.heartbeat = _heartbeat("fetch", registry)


class LearnerMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.steps = Counter("learner_steps", "Optimizer steps taken by this process", registry=registry)
        self.step = Gauge("learner_step_number", "Optimizer steps since the beginning", registry=registry)
        self.images = Counter("learner_images", "Images learnt by this process", ["kind"], registry=registry)
        _each(self.images, ("fresh", "replay"))
        self.step_seconds = Histogram("learner_step_seconds", "One step, waiting for data excluded", registry=registry, buckets=_QUICK)
        self.wait_seconds = Counter("learner_data_wait_seconds", "Time spent waiting for batches", registry=registry)
        self.loss = Gauge("learner_loss_nats", "Loss of the last step", registry=registry)
        self.prequential = Gauge("learner_prequential_loss_nats", "Loss on the last fresh images, before the update", registry=registry)
        self.chance = Gauge("learner_chance_loss_nats", "ln K: the loss of a model that knows nothing", registry=registry)
        self.lr = Gauge("learner_learning_rate", "Learning rate of the last step", registry=registry)
        self.halvings = Gauge("learner_learning_rate_halvings", "Halvings so far", registry=registry)
        self.plateau = Gauge(
            "learner_plateau_waiting",
            "1: the loss is proved to be flat, and the rate is not halved, for this reason",
            ["why"],
            registry=registry,
        )
        _each(self.plateau, WAITS)
        self.gain = Gauge("learner_plateau_gain_ratio", "What the loss gains over the next horizon, as the window says", registry=registry)
        self.doubt = Gauge("learner_plateau_doubt_ratio", "Standard error of that", registry=registry)
        self.window = Gauge("learner_plateau_window_steps", "Steps since the window of the loss began", registry=registry)
        self.orders = Counter("learner_orders", "Orders about the learning rate that were taken", ["action"], registry=registry)
        _each(self.orders, ACTIONS)
        self.grad_norm = Gauge("learner_gradient_norm", "Norm of the last gradient", registry=registry)
        self.code_entropy = Gauge("learner_code_entropy_ratio", "Mean entropy of the codes over ln K; 1 means collapse", registry=registry)
        self.perplexity = Gauge("learner_prototype_perplexity_ratio", "Perplexity of prototype use over K", registry=registry)
        self.rank = Gauge("learner_effective_rank", "Effective rank of the embeddings; near 1 means collapse", registry=registry)
        self.bad_steps = Counter("learner_nonfinite_steps", "Steps skipped because loss or gradient was not finite", registry=registry)
        self.skipped = Counter("learner_skipped_steps", "Steps of a bad stretch, taken and not learnt after a rollback", registry=registry)
        self.rollbacks = Counter("learner_rollbacks", "Times the learner went back to a sound checkpoint", registry=registry)
        self.sign = Gauge("learner_collapse_sign", "1: this is a sign of collapse", ["measure"], registry=registry)
        _each(self.sign, SIGNS)
        self.corrupt = Counter("learner_corrupt_samples", "Stored samples that could not be decoded", registry=registry)
        self.watermark = Gauge("learner_watermark_timestamp_seconds", "When the newest image learnt was fetched", registry=registry)
        self.worker_deaths = Counter("learner_worker_deaths", "Workers of the loader that died", registry=registry)
        self.unseen = Gauge("learner_expired_unseen_samples", "Samples that expired before they were learnt", registry=registry)
        self.batches_ahead = Gauge("learner_batches_ahead", "Batches made, or in the making, ahead of the learner", registry=registry)
        self.shards_ahead = Gauge("learner_shards_ahead", "Shards on this disk that only later batches need", registry=registry)
        self.downloads = Counter("learner_downloads", "Shards downloaded by this process", registry=registry)
        self.download_bytes = Counter("learner_download_bytes", "Their bytes", registry=registry)
        self.stream_failures = Counter("learner_stream_failures", "Tries of the stream that failed and are waited out", registry=registry)
        self.waiting = _waiting("learner", "the stream", registry)
        self.cache_bytes = Gauge("learner_cache_bytes", "Local copies of shards, of all learners of the folder", registry=registry)
        self.cache_hits = Counter("learner_cache_hits", "Shards that were there when they were wanted", registry=registry)
        self.cache_evictions = Counter("learner_cache_evictions", "Copies that made room for others", registry=registry)
        self.checkpoints = Counter("learner_checkpoints", "Checkpoints committed", registry=registry)
        self.checkpoint_failures = Counter("learner_checkpoint_failures", "Checkpoints that could not be written", registry=registry)
        self.checkpoint_at = Gauge("learner_checkpoint_timestamp_seconds", "When the last checkpoint was committed", registry=registry)
        self.withheld = Counter("learner_snapshots_withheld", "Snapshots not published, for the learner was ill", registry=registry)
        self.snapshots = Counter("learner_snapshots", "Snapshots published", registry=registry)
        self.snapshot_at = Gauge("learner_snapshot_timestamp_seconds", "When the last snapshot was published", registry=registry)
        # only where there is a GPU, and for the one that this process uses
        self.gpu_busy = Gauge(
            "learner_gpu_utilisation_ratio", "Share of the time in which the GPU did anything", ["device"], registry=registry
        )
        self.gpu_memory = Gauge("learner_gpu_memory_bytes", "Memory of the GPU in use, by anybody", ["device"], registry=registry)
        self.gpu_memory_size = Gauge("learner_gpu_memory_size_bytes", "Memory of the GPU", ["device"], registry=registry)
        self.heartbeat = _heartbeat("learner", registry)


class EvaluatorMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.evaluated = Counter("evaluator_snapshots", "Snapshots measured", registry=registry)
        self.failed = Counter("evaluator_failures", "Snapshots that could not be measured", registry=registry)
        self.evaluated_at = Gauge("evaluator_snapshot_timestamp_seconds", "When the last measurement was made", registry=registry)
        self.pending = Gauge("evaluator_pending_snapshots", "Snapshots not measured yet", registry=registry)
        self.refused_banks = Gauge(
            "evaluator_refused_banks", "Banks that cannot be read, or are not what was registered", registry=registry
        )
        # closed sets: the banks of the config and `other` (the registered ones); names in probes/
        self.accuracy = Gauge(
            "evaluator_accuracy_ratio", "Accuracy (mAP of a multi-label bank) of the newest snapshot", ["bank", "probe"], registry=registry
        )
        self.rank = Gauge("evaluator_effective_rank", "Effective rank of the features on the bank", ["bank"], registry=registry)
        self.label_free = Gauge(
            "evaluator_label_free", "Label-free measures of the newest snapshot", ["bank", "measure"], registry=registry
        )
        self.alarm = Gauge(
            "evaluator_collapse_alarm", "1: this measure says that the features have collapsed", ["bank", "measure"], registry=registry
        )
        self.transfer = Gauge(
            "evaluator_transfer_ratio", "Forgetting and transfer over the generations", ["measure", "probe"], registry=registry
        )
        self.prequential = Gauge(
            "evaluator_prequential_loss_nats", "Average loss on images before they were learnt, as the report draws it", registry=registry
        )
        # closed set: the sources of the config, and `other`
        self.drift = Gauge(
            "evaluator_drift_frechet", "Fréchet-64 distance of the last window from the first", ["source"], registry=registry
        )
        self.drift_threshold = Gauge("evaluator_drift_threshold", "What it may be without drift (bootstrap)", ["source"], registry=registry)
        self.drift_windows = Counter("evaluator_drift_windows", "Windows by what was found", ["source", "found"], registry=registry)
        self.verdicts = Counter("evaluator_gate_verdicts", "Verdicts of the gate", ["channel", "verdict"], registry=registry)
        _each(self.verdicts, CHANNELS, VERDICTS)
        self.channel_step = Gauge("evaluator_channel_step_number", "Step of the snapshot that it points to", ["channel"], registry=registry)
        self.cache_bytes = Gauge("evaluator_feature_cache_bytes", "Features on disk", registry=registry)
        self.cache_hits = Counter("evaluator_feature_cache_hits", "Features found there", registry=registry)
        self.cache_misses = Counter("evaluator_feature_cache_misses", "Features that had to be computed", registry=registry)
        self.yielded = Counter("evaluator_yielded_seconds", "Time the device was left to the learner", registry=registry)
        self.seconds = Histogram(
            "evaluator_duration_seconds", "One snapshot on all banks", registry=registry, buckets=(1, 5, 15, 60, 300, 1800)
        )
        self.heartbeat = _heartbeat("evaluator", registry)


class ServeMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.pulls = Counter("serve_pulls", "Snapshots pulled, by how they were named", ["protocol", "tag"], registry=registry)
        self.bytes = Counter("serve_sent_bytes", "Bytes of files and manifests sent", ["protocol"], registry=registry)
        _each(self.bytes, PULLED_BY)
        _each(self.pulls, PULLED_BY, PULLED_AS)
        self.requests = Counter(
            "serve_requests", "Requests by what was asked for and how it ended", ["protocol", "code"], registry=registry
        )
        _each(self.requests, SERVED, ANSWERED)
        self.seconds = Histogram(
            "serve_request_duration_seconds", "One request, its body included", ["protocol"], registry=registry, buckets=_QUICK
        )
        _each(self.seconds, SERVED)
        self.refused = Counter("serve_refused", "Requests refused, by reason", ["reason"], registry=registry)
        _each(self.refused, REFUSED_FOR)
        self.corrupt = Counter("serve_corrupt", "Answers withheld or broken off because the bytes on disk are damaged", registry=registry)
        self.snapshots = Gauge("serve_snapshots", "Versions that can be pulled", registry=registry)
        self.heartbeat = _heartbeat("serve", registry)


class RefreshMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.rounds = Counter("refresh_rounds", "Rounds of upkeep by how they ended", ["outcome"], registry=registry)
        _each(self.rounds, ("done", "waiting"))
        self.done_at = Gauge("refresh_done_timestamp_seconds", "When the last whole round ended", registry=registry)
        self.requeued = Counter("refresh_requeued", "Candidates that were queued again, to be asked for anew", registry=registry)
        self.taken = Counter("refresh_taken_down", "Samples taken out of shards", registry=registry)
        self.expired = Counter("refresh_expired_shards", "Shards that ended with the window", registry=registry)
        self.purged = Counter("refresh_purged_bytes", "Bytes of ended shards deleted", registry=registry)
        self.heartbeat = _heartbeat("refresh", registry)


class DemoMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.announced = Counter("demo_urls_announced", "URLs written to the list", registry=registry)
        self.requests = Counter("demo_requests", "Images served", registry=registry)
        self.heartbeat = _heartbeat("demo", registry)


ROLES = {
    "demo": DemoMetrics,
    "connect": ConnectMetrics,
    "fetch": FetchMetrics,
    "train": LearnerMetrics,
    "evaluate": EvaluatorMetrics,
    "serve": ServeMetrics,
    "refresh": RefreshMetrics,
}


def declared(*roles: str) -> dict[str, set[str]]:
    """Series as Prometheus has them (with _total, _bucket and so on) -> their labels; of these roles, or of all."""
    found: dict[str, set[str]] = {}
    for role in roles or ROLES:
        registry = CollectorRegistry()
        role_metrics(registry, role, Path("/"))
        ROLES[role](registry)
        for metric in registry.collect():
            labels = set().union(*(sample.labels for sample in metric.samples)) | set(_labels_of(registry, metric.name))
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}.get(metric.type, ("",))
            found |= {f"{metric.name}{suffix}": labels for suffix in suffixes}
    return found


def _labels_of(registry: CollectorRegistry, name: str) -> tuple[str, ...]:
    """Those of children that only a running role makes."""
    metric = registry._names_to_collectors.get(name)
    return tuple(getattr(metric, "_labelnames", ()))
