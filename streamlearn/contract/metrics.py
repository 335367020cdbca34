"""Every number the project exports, with its labels and unit.  Dashboards and alerts may use these names and no others.

Classes take a registry, so importing registers nothing.  Labels are closed sets, made in advance: never a host, a URL or a digest.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from streamlearn.contract.orders import ACTIONS
from streamlearn.contract.shards import OUTCOMES

STEPS = (
    "take over",
    "recover",
    "read",
    "spool",
    "seal",
)  # of the fetcher, that may have to wait: for the log, the store, the catalog, a disk
OTHER = "other"  # a source or bank that the configuration does not name
EVALUATED = (
    *("effective_rank", "rankme", "participation_ratio", "alpha_req", "uniformity", "alignment", "lidar"),
    *("code_entropy", "prototype_perplexity"),
)  # label-free measures
PULLED_BY = ("oci", "hf")  # protocols
PULLED_AS = ("candidate", "stable", "best", "version", "digest", "other")  # how a snapshot was named
REFUSED_FOR = ("unauthorized", "forbidden", "unknown", "malformed", "read_only", "out_of_range")


WAITS = ("probe", "floor", "hold")  # why a plateau of the loss does not halve the learning rate

SIGNS = ("loss", "codes", "rank", "spread", "prototypes")  # of collapse (learn/guard.py)


class ConnectMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.candidates = Counter("connect_candidates", "Candidates appended to the log", registry=registry)
        self.refused = Counter("connect_refused", "Entries of a source that are no candidates, dead-lettered", registry=registry)
        self.connectors = Gauge("connect_connectors", "Connectors by state", ["state"], registry=registry)
        self.failures = Counter("connect_failures", "Times a connector went to FAILED", registry=registry)
        self.heartbeat = Gauge("connect_heartbeat_timestamp_seconds", "When the role last went round its loop", registry=registry)


class FetchMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.outcomes = Counter("fetch_outcomes", "Offsets by how they ended", ["outcome"], registry=registry)
        for outcome in OUTCOMES:
            self.outcomes.labels(outcome)  # a counter that starts at 0 shows its first increase
        self.rejected = Counter("fetch_rejected", "Refused candidates by reason (a closed set)", ["reason"], registry=registry)
        self.bytes = Counter("fetch_received_bytes", "Bytes of image bodies received", registry=registry)
        self.seconds = Histogram("fetch_duration_seconds", "One fetch, redirects included", registry=registry)
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
        for step in STEPS:
            self.waits.labels(step)
        self.waiting = Gauge(
            "fetch_waiting_seconds", "How long the fetcher has waited for a store, a broker or a disk; 0: it does not", registry=registry
        )
        self.heartbeat = Gauge("fetch_heartbeat_timestamp_seconds", "When the role last went round its loop", registry=registry)


class LearnerMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.steps = Counter("learner_steps", "Optimizer steps taken by this process", registry=registry)
        self.step = Gauge("learner_step_number", "Optimizer steps since the beginning", registry=registry)
        self.images = Counter("learner_images", "Images learnt by this process", ["kind"], registry=registry)
        for kind in ("fresh", "replay"):
            self.images.labels(kind)
        self.step_seconds = Histogram("learner_step_seconds", "One step, waiting for data excluded", registry=registry)
        self.wait_seconds = Counter("learner_data_wait_seconds", "Time spent waiting for batches", registry=registry)
        self.loss = Gauge("learner_loss_nats", "Loss of the last step", registry=registry)
        self.lr = Gauge("learner_learning_rate", "Learning rate of the last step", registry=registry)
        self.halvings = Gauge("learner_learning_rate_halvings", "Halvings so far", registry=registry)
        self.plateau = Gauge(
            "learner_plateau_waiting",
            "1: the loss is proved to be flat, and the rate is not halved, for this reason",
            ["why"],
            registry=registry,
        )
        for why in WAITS:
            self.plateau.labels(why)
        self.orders = Counter("learner_orders", "Orders about the learning rate that were taken", ["action"], registry=registry)
        for action in ACTIONS:
            self.orders.labels(action)
        self.grad_norm = Gauge("learner_gradient_norm", "Norm of the last gradient", registry=registry)
        self.code_entropy = Gauge("learner_code_entropy_ratio", "Mean entropy of the codes over ln K; 1 means collapse", registry=registry)
        self.perplexity = Gauge("learner_prototype_perplexity_ratio", "Perplexity of prototype use over K", registry=registry)
        self.rank = Gauge("learner_effective_rank", "Effective rank of the embeddings; near 1 means collapse", registry=registry)
        self.bad_steps = Counter("learner_nonfinite_steps", "Steps skipped because loss or gradient was not finite", registry=registry)
        self.skipped = Counter("learner_skipped_steps", "Steps of a bad stretch, taken and not learnt after a rollback", registry=registry)
        self.rollbacks = Counter("learner_rollbacks", "Times the learner went back to a sound checkpoint", registry=registry)
        self.sign = Gauge("learner_collapse_sign", "1: this is a sign of collapse", ["measure"], registry=registry)
        for measure in SIGNS:
            self.sign.labels(measure)
        self.corrupt = Counter("learner_corrupt_samples", "Stored samples that could not be decoded", registry=registry)
        self.unseen = Gauge("learner_expired_unseen_samples", "Samples that expired before they were learnt", registry=registry)
        self.batches_ahead = Gauge("learner_batches_ahead", "Batches made, or in the making, ahead of the learner", registry=registry)
        self.shards_ahead = Gauge("learner_shards_ahead", "Shards on this disk that only later batches need", registry=registry)
        self.downloads = Counter("learner_downloads", "Shards downloaded by this process", registry=registry)
        self.download_bytes = Counter("learner_download_bytes", "Their bytes", registry=registry)
        self.stream_failures = Counter("learner_stream_failures", "Tries of the stream that failed and are waited out", registry=registry)
        self.waiting = Gauge(
            "learner_waiting_seconds",
            "How long the stream has waited for the store, the catalog or a disk; 0: it does not",
            registry=registry,
        )
        self.cache_bytes = Gauge("learner_cache_bytes", "Local copies of shards, of all learners of the folder", registry=registry)
        self.cache_hits = Counter("learner_cache_hits", "Shards that were there when they were wanted", registry=registry)
        self.cache_evictions = Counter("learner_cache_evictions", "Copies that made room for others", registry=registry)
        self.checkpoints = Counter("learner_checkpoints", "Checkpoints committed", registry=registry)
        self.checkpoint_failures = Counter("learner_checkpoint_failures", "Checkpoints that could not be written", registry=registry)
        self.snapshots = Counter("learner_snapshots", "Snapshots published", registry=registry)
        self.snapshot_at = Gauge("learner_snapshot_timestamp_seconds", "When the last snapshot was published", registry=registry)
        self.heartbeat = Gauge("learner_heartbeat_timestamp_seconds", "When the role last went round its loop", registry=registry)


class EvaluatorMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.evaluated = Counter("evaluator_snapshots", "Snapshots measured", registry=registry)
        self.failed = Counter("evaluator_failures", "Snapshots that could not be measured", registry=registry)
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
        # closed sets: the channels, and what the gate (probes/gate.py) can say
        self.verdicts = Counter("evaluator_gate_verdicts", "Verdicts of the gate", ["channel", "verdict"], registry=registry)
        for channel in ("stable", "best"):
            for verdict in ("promoted", "refused", "waiting"):
                self.verdicts.labels(channel, verdict)
        self.channel_step = Gauge("evaluator_channel_step_number", "Step of the snapshot that it points to", ["channel"], registry=registry)
        self.cache_bytes = Gauge("evaluator_feature_cache_bytes", "Features on disk", registry=registry)
        self.cache_hits = Counter("evaluator_feature_cache_hits", "Features found there", registry=registry)
        self.cache_misses = Counter("evaluator_feature_cache_misses", "Features that had to be computed", registry=registry)
        self.yielded = Counter("evaluator_yielded_seconds", "Time the device was left to the learner", registry=registry)
        self.seconds = Histogram(
            "evaluator_duration_seconds", "One snapshot on all banks", registry=registry, buckets=(1, 5, 15, 60, 300, 1800)
        )
        self.heartbeat = Gauge("evaluator_heartbeat_timestamp_seconds", "When the role last went round its loop", registry=registry)


class ServeMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.pulls = Counter("serve_pulls", "Snapshots pulled, by how they were named", ["protocol", "tag"], registry=registry)
        self.bytes = Counter("serve_sent_bytes", "Bytes of files and manifests sent", ["protocol"], registry=registry)
        for protocol in PULLED_BY:
            self.bytes.labels(protocol)
            for tag in PULLED_AS:
                self.pulls.labels(protocol, tag)
        self.refused = Counter("serve_refused", "Requests refused, by reason", ["reason"], registry=registry)
        for reason in REFUSED_FOR:
            self.refused.labels(reason)
        self.corrupt = Counter("serve_corrupt", "Answers withheld or broken off because the bytes on disk are damaged", registry=registry)
        self.snapshots = Gauge("serve_snapshots", "Versions that can be pulled", registry=registry)
        self.heartbeat = Gauge("serve_heartbeat_timestamp_seconds", "When the role last went round its loop", registry=registry)


class DemoMetrics:
    def __init__(self, registry: CollectorRegistry):
        self.announced = Counter("demo_urls_announced", "URLs written to the list", registry=registry)
        self.requests = Counter("demo_requests", "Images served", registry=registry)
        self.heartbeat = Gauge("demo_heartbeat_timestamp_seconds", "When the role last went round its loop", registry=registry)


def declared() -> set[str]:
    """Names of all metrics, as Prometheus shows them without suffixes."""
    registry = CollectorRegistry()
    for role in (ConnectMetrics, FetchMetrics, LearnerMetrics, EvaluatorMetrics, ServeMetrics, DemoMetrics):
        role(registry)
    return {metric.name for metric in registry.collect()}
