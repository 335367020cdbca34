"""What roles export and log is what they did: figures against what is recorded elsewhere."""

import dataclasses
import math
import threading
import time
from collections import Counter
from datetime import UTC, datetime

import pytest
from prometheus_client import CollectorRegistry

from streamlearn.contract.durable import read_lines
from streamlearn.contract.metrics import WAITS_ON, LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat, read_status
from streamlearn.learn.run import run_train
from tests.crash.sealing import feed, fetch_until, rows_of, settled
from tests.ingest.server import Place, Site, serving
from tests.learn.test_run import Shelf
from tests.learn.world import PlainStream, batch, small_config

COUNTERS = {  # of the stream -> what they are exported as
    "corrupt": "learner_corrupt_samples_total",
    "downloads": "learner_downloads_total",
    "download_bytes": "learner_download_bytes_total",
    "failures": "learner_stream_failures_total",
    "worker_deaths": "learner_worker_deaths_total",
    "cache_hits": "learner_cache_hits_total",
    "cache_evictions": "learner_cache_evictions_total",
}
GAUGES = {
    "expired_unseen": "learner_expired_unseen_samples",
    "batches_ahead": "learner_batches_ahead",
    "shards_ahead": "learner_shards_ahead",
    "cache_bytes": "learner_cache_bytes",
}
WAIT_S, NEWEST = 0.25, "2026-11-21T00:00:10+00:00"


class Counting(PlainStream):
    """Each of its figures is another multiple of the batches it has made; some of these are not finite."""

    made, nan = 0, range(14, 17)

    def batches(self):
        for i in range(self.place, self.end):
            self.made += 1
            made = batch(i, spoil=i in self.nan)
            yield dataclasses.replace(made, wait_s=WAIT_S, state=made.state | {"window": ["", NEWEST]})

    def counters(self):
        return {name: n * self.made for n, name in enumerate([*COUNTERS, *GAUGES], 1)}


def test_the_learners_figures_are_those_of_its_history_and_its_streams(tmp_path):
    numbers, shelf, streams = CollectorRegistry(), Shelf(), []
    config = small_config(checkpoint_steps=10, snapshot_steps=10, bn_images=8, max_bad_steps=3, guard_looks=2, max_steps=50)

    def opened(state):
        streams.append(Counting(state, 1000))
        return streams[-1]

    begun = time.time()
    heart = Heartbeat(tmp_path, "train", period_s=0)
    store = FolderStore(tmp_path / "store")
    state = run_train(config, opened, store, shelf, LearnerMetrics(numbers), heart, stop=threading.Event())
    events = list(read_lines(tmp_path / "history" / "train.jsonl"))
    happened, said, seen = Counter(e.get("event") for e in events), read_status(tmp_path)["train"], numbers.get_sample_value
    batches = sum(stream.made for stream in streams)
    assert batches == 17 + 40 and seen("learner_data_wait_seconds_total") == batches * WAIT_S
    assert (
        seen("learner_steps_total") == batches - 1 == seen("learner_step_seconds_count")
    )  # the third that is not finite ends in the rollback
    assert seen("learner_nonfinite_steps_total") == happened["bad_step"] == 2
    assert seen("learner_rollbacks_total") == happened["rollback"] == 1 and seen("learner_skipped_steps_total") == state.skipped == 7
    assert (
        seen("learner_snapshots_total") == happened["snapshot"] == len(shelf.exports) + 1 == 6
    )  # that of step 10 once more, as it goes on from there
    assert seen("learner_checkpoints_total") == 5 and seen("learner_checkpoint_failures_total") == 0
    for moment in ("checkpoint", "snapshot", "heartbeat"):
        assert begun <= seen(f"learner_{moment}_timestamp_seconds") <= time.time()
    assert seen("learner_watermark_timestamp_seconds") == datetime.fromisoformat(NEWEST).timestamp()
    assert (seen("learner_loss_nats"), seen("learner_learning_rate")) == (said["loss"], said["lr"])
    assert seen("learner_chance_loss_nats") == pytest.approx(math.log(config.objective.prototypes))
    assert round(seen("learner_effective_rank"), 2) == said["effective_rank"]
    last = next(e for e in reversed(events) if "code_entropy" in e)
    told = {"code_entropy": "code_entropy_ratio", "perplexity": "prototype_perplexity_ratio", "grad_norm": "gradient_norm"}
    assert {k: round(seen(f"learner_{v}"), 4) for k, v in told.items()} == {k: last[k] for k in told}
    recorded = [10 * ((stream.made + first) // 10) - first for stream, first in zip(streams, (0, 10), strict=True)]  # every tenth step
    assert {k: seen(v) for k, v in COUNTERS.items()} == {k: n * sum(recorded) for n, k in enumerate(COUNTERS, 1)}
    assert {k: seen(v) for k, v in GAUGES.items()} == {k: n * recorded[-1] for n, k in enumerate(GAUGES, len(COUNTERS) + 1)}


def test_a_learner_without_images_shows_that_it_has_none_and_goes_round(tmp_path):
    """What job:learner_out_of_images:bool (ops/prometheus/rules/learner.yml) goes by."""
    numbers = CollectorRegistry()
    metrics, found = LearnerMetrics(numbers), []

    class Dry(PlainStream):
        ahead = 4

        def batches(self):
            yield from (batch(i) for i in range(10))
            found.append(numbers.get_sample_value("learner_batches_ahead"))
            self.ahead = 0
            metrics.heartbeat.set(0)
            yield None
            found.append(numbers.get_sample_value("learner_batches_ahead"))
            found.append(max(numbers.get_sample_value("learner_waiting_seconds", {"on": what}) for what in WAITS_ON))
            assert numbers.get_sample_value("learner_heartbeat_timestamp_seconds") > 0

        def counters(self):
            return {"batches_ahead": self.ahead}

    config = small_config(checkpoint_steps=10, snapshot_steps=1000, bn_images=8, max_steps=20)
    run_train(config, lambda s: Dry(s, 100), FolderStore(tmp_path), Shelf(), metrics, Heartbeat(tmp_path, "train"), stop=threading.Event())
    assert found == [4, 0, 0]


def test_the_fetchers_figures_and_lines_are_those_of_what_it_has_sealed(tmp_path, caplog):
    numbers, asked = CollectorRegistry(), [*(f"{i}.jpg" for i in range(20)), "trouble/empty", "trouble/noise", "trouble/tiny"]
    with serving(Site()) as base, caplog.at_level("INFO"):
        place = Place(tmp_path)
        feed(place.log, base, asked)
        begun = time.time()
        fetch_until(place, settled(len(asked)), registry=numbers)
    outcomes, rows, seen = [o for _, _, o in rows_of(place)], place.catalog.rows(), numbers.get_sample_value
    for kind, count in Counter(o["outcome"] for o in outcomes).items():
        assert seen("fetch_outcomes_total", {"outcome": kind}) == count, kind
    for reason, count in Counter(o["reason"] for o in outcomes if o["outcome"] == "rejected").items():
        assert seen("fetch_rejected_total", {"reason": reason}) == count, reason
    assert seen("fetch_duration_seconds_count") == len(asked) and seen("fetch_shards_sealed_total") == len(rows)
    assert begun <= seen("fetch_shard_sealed_timestamp_seconds") <= time.time()
    age = begun - datetime(2026, 11, 21, tzinfo=UTC).timestamp()  # as `feed` says that they were discovered
    assert seen("fetch_discovery_to_stored_seconds_count") == 20
    assert age <= seen("fetch_discovery_to_stored_seconds_sum") / 20 <= time.time() - begun + age
    ids = [r.ids for r in caplog.records if "shard" in getattr(r, "ids", {})]
    names = ("topic", "partition", "first_offset", "end_offset")
    assert sorted(i["shard"] for i in ids) == sorted(row.key for row in rows)
    assert all({n: i[n] for n in names} == {n: getattr(row, n) for n in names} for i in ids for row in rows if row.key == i["shard"])
