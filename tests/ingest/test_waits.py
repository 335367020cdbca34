"""How long a fetcher has waited, while its partitions go from one fetcher to another and back."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from ingest.fetch.waits import CARRIED_S, Waits
from streamlearn.contract.errors import Retryable
from streamlearn.contract.metrics import FetchMetrics


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def waits(clock):
    return Waits(FetchMetrics(CollectorRegistry()), clock)


def out(waits, who, step, on="store"):
    asyncio.run(waits.out(who, step, Retryable(f"{on} is out", on=on), pause_s=0))


def gauge(waits, on="store"):
    waits.told()
    return next(s.value for s in waits.metrics.waiting.collect()[0].samples if s.labels["on"] == on)


def test_a_wait_goes_on_where_the_same_fault_meets_the_next_lane(waits, clock):
    out(waits, "candidates/0", "seal")
    since = waits.told()["waiting_since"]
    for lane in ("candidates/1", "candidates/2"):  # every minute the group shares its partitions out anew
        clock.now += 60
        waits.gone("candidates/0")
        waits.gone("candidates/1")
        assert gauge(waits) == 0 and waits.told()["waiting_since"] == ""
        clock.now += CARRIED_S - 1
        out(waits, lane, "recover")
        assert waits.told()["waiting_since"] == since
    assert gauge(waits) == 2 * (60 + CARRIED_S - 1)


@pytest.mark.parametrize(
    ("meanwhile", "on"),
    [
        (lambda waits, clock: waits.over("candidates/1", "seal"), "store"),  # another lane could
        (lambda waits, clock: None, "broker"),  # another fault
        (lambda waits, clock: setattr(clock, "now", clock.now + CARRIED_S), "store"),  # nobody has met it for long
    ],
    ids=["answered", "other", "long ago"],
)
def test_what_is_over_is_not_counted_on(waits, clock, meanwhile, on):
    out(waits, "candidates/0", "seal")
    clock.now += 60
    waits.gone("candidates/0")
    meanwhile(waits, clock)
    out(waits, "candidates/1", "recover", on)
    assert gauge(waits, on) == 0
    clock.now += 5
    assert gauge(waits, on) == 5


def test_what_another_step_could_do_says_nothing_of_the_one_that_could_not(waits, clock):
    out(waits, "candidates/0", "seal")
    clock.now += 60
    waits.gone("candidates/0")
    waits.over("candidates/1", "read")  # brokers answer; the store may still be out
    out(waits, "candidates/1", "seal")
    assert gauge(waits) == 60


def test_the_longest_of_several_that_went_away_is_counted_on_and_the_longest_open_one_is_told(waits, clock):
    out(waits, "candidates/0", "seal")
    clock.now += 60
    out(waits, "candidates/1", "seal")
    out(waits, "retry-0/0", "read", "broker")
    waits.gone("candidates/0")
    waits.gone("candidates/1")
    clock.now += 10
    assert waits.told()["waiting_on"] == "broker"
    out(waits, "candidates/1", "recover")
    assert gauge(waits) == 70 and waits.told()["waiting_on"] == "store"
    waits.over("candidates/1", "recover")
    assert gauge(waits, "broker") == 10


def test_of_two_steps_that_a_lane_left_behind_the_longer_wait_is_counted_on(waits, clock):
    out(waits, "candidates/0", "seal")
    clock.now += 60
    out(waits, "candidates/1", "recover")
    waits.gone("candidates/0")
    waits.gone("candidates/1")
    out(waits, "candidates/2", "recover")
    assert gauge(waits) == 60


def test_a_wait_that_was_over_long_ago_is_not_what_the_next_lane_leaves_behind(waits, clock):
    out(waits, "candidates/0", "seal")
    waits.gone("candidates/0")
    clock.now += CARRIED_S
    out(waits, "candidates/0", "seal")
    clock.now += 5
    waits.gone("candidates/0")
    out(waits, "candidates/1", "seal")
    assert gauge(waits) == 5
