"""One file declares what is exported; labels are closed sets, and the series are few."""

import re
import time
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from ingest.connectors import worker
from ingest.connectors.book import PAUSED, RUNNING, STOPPED
from ingest.fetch.screen import Reason
from streamlearn.contract import metrics
from streamlearn.learn.device import Device
from tests.ops.queries import rules

OPEN = {"host", "url", "digest", "sha256", "key", "path", "user", "exception", "error", "offset", "image"}


def exported(role):
    registry = CollectorRegistry()
    metrics.role_metrics(registry, role, Path("/"))
    metrics.ROLES[role](registry)
    return registry


def series(registry):
    return [sample for metric in registry.collect() for sample in metric.samples if not sample.name.endswith("_created")]


@pytest.mark.parametrize("role", metrics.ROLES)
def test_a_role_exports_some_hundreds_of_series_at_most(role):
    """With ten banks and twenty sources, whose children only a running role makes: under a quarter of the scrape's sample_limit."""
    registry = exported(role)
    if role == "evaluate":
        m = registry._names_to_collectors
        for bank in range(11):
            for probe in ("knn", "ridge", "logistic", "low_shot_1", "low_shot_10", "random_knn", "raw_knn"):
                m["evaluator_accuracy_ratio"].labels(f"bank{bank}", probe)
            for measure in metrics.EVALUATED:
                m["evaluator_label_free"].labels(f"bank{bank}", measure)
                m["evaluator_collapse_alarm"].labels(f"bank{bank}", measure)
        for source in range(21):
            for found in ("reference", "same", "drift"):
                m["evaluator_drift_windows"].labels(f"source{source}", found)
            m["evaluator_drift_frechet"].labels(f"source{source}")
            m["evaluator_drift_threshold"].labels(f"source{source}")
    assert 10 < len(series(registry)) < 1250


@pytest.mark.parametrize("role", metrics.ROLES)
def test_no_label_is_an_open_set_and_no_name_is_used_twice(role):
    declared = metrics.declared(role)
    assert {label for labels in declared.values() for label in labels} & OPEN == set()
    shared = {name for name in declared if name.startswith(("process_", "streamlearn_"))}
    others = {name for other in metrics.ROLES if other != role for name in metrics.declared(other)}
    assert (set(declared) - shared) & others == set()


@pytest.mark.parametrize("role", metrics.ROLES)
def test_every_role_has_a_heartbeat_that_begins_when_it_does(role):
    beats = [s for s in series(exported(role)) if s.name.endswith("_heartbeat_timestamp_seconds")]
    assert len(beats) == 1 and abs(beats[0].value - time.time()) < 600


def test_counters_start_at_nought_so_that_their_first_increase_shows():
    seen = {(s.name, *s.labels.values()) for s in series(exported("fetch"))}
    assert ("fetch_rejected_total", "gone") in seen and ("fetch_outcomes_total", "stored") in seen and ("fetch_waits_total", "seal") in seen
    assert ("evaluator_gate_verdicts_total", "best", "waiting") in {(s.name, *s.labels.values()) for s in series(exported("evaluate"))}


def test_closed_sets_are_those_of_the_code():
    assert set(metrics.REASONS) == {str(reason) for reason in Reason}
    assert set(metrics.CONNECTOR_STATES) == {worker.UNASSIGNED, RUNNING, PAUSED, STOPPED, worker.FAILED}


def test_a_name_says_its_unit_once():
    for name in metrics.declared():
        assert not re.search(r"(seconds|bytes)_(seconds|bytes|ms)|_ms$|_percent$", name.replace("timestamp_seconds", "")), name


def test_the_freshness_objective_is_a_bucket_of_its_histogram():
    le = {s.labels["le"] for s in series(exported("fetch")) if s.name == "fetch_discovery_to_stored_seconds_bucket"}
    assert str(metrics.FRESH_S) in le
    late = [r["expr"] for r in rules() if r.get("record", "").startswith("stream_late:")]
    assert len(late) == 7 and all(f'le="{metrics.FRESH_S}"' in expr for expr in late)


def test_without_a_gpu_nothing_is_said_of_one():
    assert Device(torch.device("cpu")).used() is None
    registry = exported("train")
    assert not [s for s in series(registry) if "_gpu_" in s.name]
