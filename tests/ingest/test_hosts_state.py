"""What the scheduler of hosts remembers, forgets, and takes up after a restart; in virtual time."""

import asyncio
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from ingest.fetch.hosts import BREAKER_MAX_S, DAY_S, Busy, Hosts, Turn, retry_after_s
from streamlearn.contract.candidate import host_of, politeness_key
from tests.ingest.test_hosts import TakenOver, ask, config, failing
from tests.ingest.virtual import run


def test_idle_hosts_are_forgotten_and_those_that_matter_never():
    async def main(clock):
        hosts = Hosts(config(hosts=10), clock=clock)
        await ask(hosts, clock, "slow", delay=3000.0)
        await ask(hosts, clock, "held")
        hosts.hold("held", 3000.0)
        for _ in range(5):
            await ask(hosts, clock, "broken", ok=False)
        await asyncio.sleep(1.0)
        for i in range(1000):
            assert isinstance(await ask(hosts, clock, f"h{i}"), float)
            assert len(hosts) <= 10
            if i == 500:  # its breaker is still open
                assert isinstance(await ask(hosts, clock, "broken"), Busy)
            await asyncio.sleep(0.1)  # a bucket is full again after 0.5 s
        return [await ask(hosts, clock, name, delay=None) for name in ("slow", "held")]

    assert [type(t) for t in run(main)] == [Busy, Busy]


def test_a_table_full_of_hosts_that_matter_turns_new_ones_away():
    async def main(clock):
        hosts = Hosts(config(hosts=3), clock=clock)
        for name in "abc":
            await ask(hosts, clock, name)
            hosts.hold(name, 50.0)
        assert isinstance(await ask(hosts, clock, "d"), Busy) and len(hosts) == 3
        await asyncio.sleep(50.1)
        assert isinstance(await ask(hosts, clock, "d"), float) and len(hosts) <= 3

    run(main)


def test_a_bucket_that_is_not_full_again_is_not_forgotten():
    async def main(clock):
        hosts = Hosts(config(hosts=1, host_rate=0.1), clock=clock)
        await ask(hosts, clock, "a")
        assert isinstance(await ask(hosts, clock, "b"), Busy)
        await asyncio.sleep(10.1)
        assert isinstance(await ask(hosts, clock, "b"), float)

    run(main)


# -- restarts --


class Wall:
    """A wall clock that can be set."""

    def __init__(self, at=1.8e9):
        self.at = at

    def __call__(self):
        return self.at


def exported(clock_now=1.8e9):
    """What is told of the hosts of a process that ends: one held for 500 s, one open, one with a Crawl-delay of 20 s."""

    async def main(clock):
        hosts = Hosts(config(), clock=clock, wall=Wall(clock_now))
        await ask(hosts, clock, "slow", delay=20.0)
        await asyncio.sleep(5.0)
        for _ in range(5):
            await ask(hosts, clock, "broken", ok=False)
        await ask(hosts, clock, "plain")
        hosts.hold("held", 500.0)
        assert hosts.news == {"slow", "broken", "held"} and hosts.changed.is_set()
        return {name: hosts.kept(name) for name in hosts.news}

    return json.loads(json.dumps(run(main)))


def after_restart(state, wall):
    """How long the next owner leaves each host alone; it takes over 0.5 s before it asks."""

    async def main(clock):
        hosts = Hosts(config(max_wait_s=0.001), TakenOver(clock()), clock=clock, wall=Wall(wall))
        for name, kept in state.items():
            hosts.take_up(name, kept)
        await asyncio.sleep(0.5)
        found = {}
        for name in ("slow", "broken", "held", "plain"):
            turn = await hosts.turn(name)
            found[name] = 0.0 if isinstance(turn, Turn) else round(turn.after_s, 3)
        return found

    return run(main)


def test_what_matters_is_taken_up_after_a_restart():
    state = exported()
    now = after_restart(state, 1.8e9)
    assert now == {"slow": 19.5, "broken": 59.5, "held": 499.5, "plain": 0.0}
    assert after_restart(state, 1.8e9 + 10) == {"slow": 19.5, "broken": 49.5, "held": 489.5, "plain": 0.0}
    assert after_restart(state, 1.8e9 + 1000) == {"slow": 19.5, "broken": 0.0, "held": 0.0, "plain": 0.0}
    assert after_restart(state, 1.8e9 + 3 * DAY_S) == {"slow": 0.0, "broken": 0.0, "held": 0.0, "plain": 0.0}


def test_what_is_over_is_nothing_to_take_up():
    state = exported()

    async def main(clock):
        hosts = Hosts(config(), clock=clock, wall=Wall(1.8e9 + 1000))
        return {name: hosts.take_up(name, kept) for name, kept in state.items()}

    assert run(main) == {"slow": True, "broken": False, "held": False}


def test_a_crawl_delay_is_told_once_and_again_before_it_is_forgotten():
    async def main(clock):
        hosts, told = Hosts(config(), clock=clock), []
        for wait_s in (0, 100, DAY_S, 100, DAY_S):
            await asyncio.sleep(wait_s)
            await ask(hosts, clock, delay=20.0)
            told.append(set(hosts.news))
            hosts.news.clear()
        await ask(hosts, clock, delay=0.0)
        return told, hosts.news, hosts.kept("h")

    assert run(main) == ([{"h"}, set(), {"h"}, set(), {"h"}], {"h"}, {})


@pytest.mark.parametrize(("delay", "want"), [(0.0, [0.5, 1.0, 1.5]), (5.0, [5.0, 10.0, 15.0])])
def test_who_takes_a_host_over_begins_a_whole_spacing_later_and_without_a_burst(delay, want):
    async def main(clock):
        rights, began = TakenOver(clock()), clock()
        hosts = Hosts(config(host_burst=8), rights, clock=clock, wall=Wall())
        hosts.take_up("h", {"at": 1.8e9, "delay_s": delay, "delay_until": 1.9e9})
        first = [await ask(hosts, clock, delay=None) - began for _ in range(3)]
        await asyncio.sleep(100.0)
        rights.when = again = clock()  # it was lost, and comes back
        return first, [await ask(hosts, clock, delay=None) - again for _ in range(3)]

    assert run(main) == (pytest.approx(want), pytest.approx(want))


def test_a_host_that_is_taken_away_is_not_asked_even_by_those_in_the_queue():
    async def main(clock):
        rights = TakenOver(clock())
        hosts = Hosts(config(), rights, clock=clock)
        tasks = [asyncio.create_task(ask(hosts, clock)) for _ in range(4)]
        await asyncio.sleep(0.6)
        rights.when = math.inf
        await asyncio.sleep(0.5)
        rights.when = clock()  # and given back: those who waited do not know what happened meanwhile
        got = await asyncio.gather(*tasks)
        turn = await hosts.turn("h", guest=True)
        assert isinstance(turn, Turn)
        return [type(t) for t in got]

    assert run(main) == [float, Busy, Busy, Busy]


def test_while_it_is_not_sure_whose_hosts_they_are_nobody_is_asked():
    async def main(clock):
        rights, began = TakenOver(0.0), clock()
        hosts = Hosts(config(), rights, clock=clock)
        rights.certain = False
        task = asyncio.create_task(ask(hosts, clock))
        await asyncio.sleep(20.0)
        rights.certain = True
        return await task - began

    assert run(main) == pytest.approx(20.0, abs=0.2)


def test_a_request_that_waits_for_room_does_not_make_the_next_one_follow_too_soon():
    """Two starts are half a second apart though the first of them could not begin at its time."""

    async def main(clock):
        hosts, began = Hosts(config(concurrency=1), clock=clock), clock()
        busy = asyncio.create_task(ask(hosts, clock, "another", takes=1.9))
        await asyncio.sleep(0)
        first, second = await asyncio.gather(ask(hosts, clock), ask(hosts, clock))
        await busy
        return [round(first - began, 6), round(second - began, 6)]

    assert run(main) == [1.9, 2.4]


def test_a_wall_clock_that_was_set_back_makes_nobody_wait_longer():
    state = exported()
    assert after_restart(state, 1.8e9 - 10**6) == after_restart(state, 1.8e9)


def test_a_breaker_taken_up_goes_on_doubling():
    async def main(clock):
        first = Hosts(config(host_rate=0), clock=clock, wall=Wall())
        await failing(first, clock, 5)
        second = Hosts(config(host_rate=0), clock=clock, wall=Wall())
        second.take_up("h", first.kept("h"))
        await asyncio.sleep(60.1)
        assert isinstance(await ask(second, clock, ok=False), float)  # the trial
        return (await ask(second, clock)).after_s

    assert run(main) == pytest.approx(120.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TIMES = ["at", "hold_until", "open_until", "opened", "failures", "delay_until", "delay_s"]
KEPT = st.dictionaries(st.sampled_from(TIMES), JSON | st.floats(1e9, 1e10), max_size=7)


@given(state=st.dictionaries(st.text(max_size=3), KEPT | JSON, max_size=4))
@settings(max_examples=200, deadline=None)
def test_garbage_is_taken_up_as_nothing_much(state):
    async def main(clock):
        hosts = Hosts(config(hosts=3), clock=clock)
        for name, kept in state.items():
            hosts.take_up(name, kept)
        assert len(hosts) <= 3
        json.dumps([hosts.kept(name) for name in state], allow_nan=False)
        for name in [*hosts._hosts, "another"]:
            turn = await hosts.turn(name)
            if isinstance(turn, Busy):
                assert 0 < turn.after_s <= 2 * DAY_S and math.isfinite(turn.after_s)
            else:
                with turn:
                    turn.ok = False

    run(main)


# -- the rest --


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("77", 77),
        (" 5 ", 5),
        ("0", 0),
        ("9" * 500, DAY_S),
        ("-5", 0),
        ("", 0),
        ("soon", 0),
        ("1.5", 0),
        ("\u0665", 0),  # a digit, not one of HTTP's
        ("Sat, 21 Nov 2026 12:01:30 GMT", 90),
        ("Sat, 21 Nov 2026 12:01:30", 90),
        ("Saturday, 21-Nov-26 12:01:30 GMT", 90),
        ("Sat, 21 Nov 2026 11:00:00 GMT", 0),
        ("Sat, 21 Nov 2036 11:00:00 GMT", DAY_S),
        ("Sat, 99 Nov 2026 12:01:30 GMT", 0),
        ("Sat, 21 Nov 99999999999 12:01:30 GMT", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert retry_after_s(value, 1795262400.0) == seconds  # 2026-11-21 12:00:00 UTC


@given(st.text())
def test_no_retry_after_raises(value):
    assert 0 <= retry_after_s(value, 1.8e9) <= DAY_S


@pytest.mark.parametrize("url", ["http://Bücher.example/x", "https://xn--bcher-kva.example:8443/y", "http://BÜCHER.EXAMPLE./"])
def test_every_spelling_of_a_host_shares_its_budget(url):
    assert host_of(URL(url)) == "xn--bcher-kva.example" and politeness_key(url) == b"xn--bcher-kva.example"


def test_an_hour_is_the_longest_that_a_breaker_is_open():
    assert BREAKER_MAX_S == 3600
