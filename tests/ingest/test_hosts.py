"""A host is asked no faster, no wider and no sooner than it may be; in virtual time."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.fetch.hosts import DAY_S, SPREAD_S, Busy, Hosts
from streamlearn.contract.config import FetchConfig
from tests.ingest.virtual import run


class TakenOver:
    """All hosts are ours since then; `when` may be changed, infinite: they are another's."""

    def __init__(self, when):
        self.when, self.certain = when, True

    def since(self, host):
        return self.when

    def sure(self):
        return self.certain


EDGE = 1e-6  # s; times are sums of floats


def config(**more):
    return FetchConfig(**{"host_rate": 2.0, "host_burst": 1, "per_host": 100, "max_wait_s": 30.0} | more)


async def ask(hosts, clock, name="h", *, delay=0.0, takes=0.0, ok=True, starts=None):
    """One request: its start, or Busy."""
    turn = await hosts.turn(name, delay)
    if isinstance(turn, Busy):
        return turn
    with turn:
        started = clock()
        if starts is not None:
            starts.append(started)
        await asyncio.sleep(takes)
        turn.ok = ok
    return started


def starts_of(count, *, delay=0.0, takes=0.0, **more):
    """Start times of requests that all come at once, from zero."""

    async def main(clock):
        hosts = Hosts(config(**more), clock=clock)
        began = clock()
        got = await asyncio.gather(*(ask(hosts, clock, delay=delay, takes=takes) for _ in range(count)))
        return [t if isinstance(t, Busy) else round(t - began, 6) for t in got]

    return run(main)


def test_starts_are_spaced_by_the_rate():
    assert starts_of(5) == [0, 0.5, 1.0, 1.5, 2.0]


def test_an_idle_host_takes_a_burst_and_then_the_rate():
    assert starts_of(6, host_burst=3) == [0, 0, 0, 0.5, 1.0, 1.5]


def test_a_burst_comes_again_only_after_the_bucket_is_full_again():
    async def main(clock):
        hosts, began = Hosts(config(host_burst=3), clock=clock), clock()
        await asyncio.gather(*(ask(hosts, clock) for _ in range(3)))
        await asyncio.sleep(1.0)  # two tokens of three
        got = await asyncio.gather(*(ask(hosts, clock) for _ in range(4)))
        return [round(t - began, 6) for t in got]

    assert run(main) == [1.0, 1.0, 1.5, 2.0]


def test_a_crawl_delay_spaces_starts_without_a_burst():
    assert starts_of(4, delay=5.0, host_burst=8) == [0, 5, 10, 15]


def test_the_longer_of_rate_and_crawl_delay_counts():
    assert starts_of(3, delay=0.1, host_burst=8) == [0, 0.5, 1.0]


def test_a_delay_that_is_not_known_is_as_last_said():
    async def main(clock):
        hosts = Hosts(config(), clock=clock)
        first = await ask(hosts, clock, delay=7.0)
        return await ask(hosts, clock, delay=None) - first

    assert run(main) == pytest.approx(7.0)


def test_no_rate_is_no_limit():
    assert starts_of(500, host_rate=0) == [0] * 500


@pytest.mark.parametrize(("per_host", "want"), [(1, [0, 3, 6, 9]), (2, [0, 0, 3, 3])])
def test_no_more_in_flight_than_slots(per_host, want):
    assert starts_of(4, host_rate=0, per_host=per_host, takes=3.0) == want


def test_slots_that_free_up_together_do_not_bunch_the_starts():
    """Two long downloads end at once while others wait: the waiting ones still start half a second apart."""
    assert starts_of(5, per_host=2, takes=4.0) == [0, 0.5, 4.0, 4.5, 8.0]


def test_hosts_do_not_wait_for_each_other():
    async def main(clock):
        hosts, began = Hosts(config(), clock=clock), clock()
        return [await ask(hosts, clock, name) - began for name in "abc"]

    assert run(main) == [0, 0, 0]


@given(
    waits=st.lists(st.floats(0, 3), min_size=2, max_size=30),
    delay=st.sampled_from([0.0, 0.7]),
    burst=st.integers(1, 4),
    takes=st.sampled_from([0.0, 1.1]),
)
@settings(max_examples=60, deadline=None)
def test_whenever_requests_come_no_window_holds_more_starts_than_it_may(waits, delay, burst, takes):
    async def main(clock):
        hosts, starts, tasks = Hosts(config(host_burst=burst, per_host=3), clock=clock), [], []
        for wait in waits:
            await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(ask(hosts, clock, delay=delay, takes=takes, starts=starts)))
        await asyncio.gather(*tasks)
        return starts

    starts, spacing = run(main), max(0.5, delay)
    allowed = 1 if delay else burst
    for i in range(len(starts)):
        for j in range(i + 1, len(starts)):
            assert j - i + 1 <= allowed + (starts[j] - starts[i]) / spacing + EDGE


def test_a_place_too_far_off_is_told_at_once_and_nobody_sleeps_for_it():
    got = starts_of(8, delay=10.0)
    assert got[:4] == [0, 10, 20, 30]
    assert all(isinstance(busy, Busy) for busy in got[4:])


def test_callers_turned_away_are_given_times_of_their_own_up_to_an_hour():
    got = starts_of(600, delay=10.0)
    after = [busy.after_s for busy in got[4:]]
    assert after[:3] == pytest.approx([40, 50, 60]) and max(after) == pytest.approx(SPREAD_S) and sorted(after) == after


def test_a_slot_that_does_not_come_free_is_not_waited_for_for_ever():
    async def main(clock):
        hosts, began = Hosts(config(per_host=1), clock=clock), clock()
        long = asyncio.create_task(ask(hosts, clock, takes=1000.0))
        await asyncio.sleep(0)
        got = await ask(hosts, clock)
        waited = clock() - began
        await long
        assert isinstance(await ask(hosts, clock), float)  # and nothing is left behind
        return got, waited

    got, waited = run(main)
    assert isinstance(got, Busy) and got.after_s == 30.0 and waited <= 32


def test_a_caller_that_is_cancelled_leaves_its_place_to_the_next():
    async def main(clock):
        hosts, began = Hosts(config(per_host=1), clock=clock), clock()
        tasks = [asyncio.create_task(ask(hosts, clock, takes=2.0)) for _ in range(4)]
        await asyncio.sleep(1.0)
        tasks[0].cancel()  # in flight
        tasks[1].cancel()  # at the head of the queue
        got = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(t) for t in got[:2]] == [asyncio.CancelledError] * 2
        return [round(t - began, 6) for t in got[2:]]

    assert run(main) == [1.0, 3.0]


# -- the breaker --


def failing(hosts, clock, count, **more):
    return asyncio.gather(*(ask(hosts, clock, ok=False, **more) for _ in range(count)))


def test_the_breaker_opens_is_tried_once_and_closes():
    async def main(clock):
        hosts = Hosts(config(host_rate=0), clock=clock)
        for _ in range(4):
            assert isinstance(await ask(hosts, clock, ok=False), float)
        assert isinstance(await ask(hosts, clock, ok=False), float)  # the fifth
        busy = await ask(hosts, clock)
        assert isinstance(busy, Busy) and busy.after_s == pytest.approx(60.0)
        await asyncio.sleep(59.9)
        assert isinstance(await ask(hosts, clock), Busy)
        await asyncio.sleep(0.2)
        got = await asyncio.gather(*(ask(hosts, clock, takes=1.0) for _ in range(3)))
        assert [type(t) for t in got] == [float, Busy, Busy]  # one trial, alone
        got = await asyncio.gather(*(ask(hosts, clock) for _ in range(3)))
        assert [type(t) for t in got] == [float] * 3  # closed
        await failing(hosts, clock, 4)
        assert isinstance(await ask(hosts, clock), float)  # and it counts from nothing again

    run(main)


def test_a_success_between_failures_keeps_it_closed():
    async def main(clock):
        hosts = Hosts(config(host_rate=0), clock=clock)
        for _ in range(5):
            await failing(hosts, clock, 4)
            assert isinstance(await ask(hosts, clock), float)

    run(main)


def test_each_failed_trial_doubles_the_time_up_to_an_hour():
    async def main(clock):
        hosts, waits = Hosts(config(host_rate=0), clock=clock), []
        await failing(hosts, clock, 5)
        for _ in range(9):
            busy = await ask(hosts, clock)
            waits.append(round(busy.after_s, 3))
            await asyncio.sleep(busy.after_s + EDGE)
            assert isinstance(await ask(hosts, clock, ok=False), float)
        return waits

    assert run(main) == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_answers_to_questions_from_before_it_opened_change_nothing():
    async def main(clock):
        hosts = Hosts(config(host_rate=0), clock=clock)
        late = [asyncio.create_task(ask(hosts, clock, takes=5.0, ok=ok)) for ok in (True, False)]
        await asyncio.sleep(0)
        await failing(hosts, clock, 5)
        await asyncio.gather(*late)
        return (await ask(hosts, clock)).after_s

    assert run(main) == pytest.approx(55.0)


def test_a_trial_that_is_cancelled_leaves_the_next_one_to_try():
    async def main(clock):
        hosts = Hosts(config(host_rate=0), clock=clock)
        await failing(hosts, clock, 5)
        await asyncio.sleep(60.1)
        trial = asyncio.create_task(ask(hosts, clock, takes=5.0))
        await asyncio.sleep(1.0)
        assert isinstance(await ask(hosts, clock), Busy)
        trial.cancel()
        await asyncio.wait([trial])
        assert isinstance(await ask(hosts, clock), float)

    run(main)


def test_those_in_the_queue_hear_that_it_opened():
    async def main(clock):
        hosts = Hosts(config(breaker_failures=1), clock=clock)
        return await asyncio.gather(*(ask(hosts, clock, ok=False) for _ in range(4)))

    assert [type(t) for t in run(main)] == [float, Busy, Busy, Busy]


def test_no_breaker_where_it_is_switched_off():
    async def main(clock):
        hosts = Hosts(config(host_rate=0, breaker_failures=0), clock=clock)
        return await failing(hosts, clock, 50)

    assert not any(isinstance(t, Busy) for t in run(main))


# -- holds --


def test_a_held_host_is_left_alone_until_its_time_even_by_those_in_the_queue():
    async def main(clock):
        hosts = Hosts(config(), clock=clock)
        queued = asyncio.create_task(ask(hosts, clock))
        waiting = asyncio.create_task(ask(hosts, clock))
        await asyncio.sleep(0.1)
        assert isinstance(await queued, float)
        hosts.hold("h", 77.0)
        hosts.hold("h", 5.0)  # a shorter one does not end the longer
        busy = await ask(hosts, clock)
        assert isinstance(busy, Busy) and busy.after_s == pytest.approx(77.0)
        assert isinstance(await waiting, Busy)
        assert isinstance(await ask(hosts, clock, "another"), float)
        await asyncio.sleep(77.0)
        assert isinstance(await ask(hosts, clock), float)

    run(main)


def test_nobody_holds_us_for_longer_than_a_day():
    async def main(clock):
        hosts = Hosts(config(), clock=clock)
        hosts.hold("h", 1e9)
        return (await ask(hosts, clock)).after_s

    assert run(main) == pytest.approx(DAY_S)


# -- everyone --


def test_all_hosts_together_keep_the_global_rate():
    async def main(clock):
        hosts, began = Hosts(config(global_rate=4.0), clock=clock), clock()
        got = await asyncio.gather(*(ask(hosts, clock, f"h{i}") for i in range(12)))
        return [round(t - began, 6) for t in got]

    assert run(main) == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]


def test_the_global_rate_turns_away_too():
    async def main(clock):
        hosts = Hosts(config(global_rate=0.5, max_wait_s=10.0), clock=clock)
        got = await asyncio.gather(*(ask(hosts, clock, f"h{i}") for i in range(20)))
        return [type(t) for t in got]

    assert run(main) == [float] * 6 + [Busy] * 14
