"""What the scheduler of hosts remembers, forgets, and takes up after a restart; in virtual time."""

import asyncio
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from ingest.fetch.hosts import BREAKER_MAX_S, DAY_S, Busy, Hosts, Turn, host_of, retry_after_s
from tests.ingest.test_hosts import ask, config, failing
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
    """The state of a process that ends: one host held for 500 s, one open, one with a Crawl-delay of 20 s, asked 5 s ago."""

    async def main(clock):
        hosts = Hosts(config(), clock=clock, wall=Wall(clock_now))
        await ask(hosts, clock, "slow", delay=20.0)
        await asyncio.sleep(5.0)
        for _ in range(5):
            await ask(hosts, clock, "broken", ok=False)
        await ask(hosts, clock, "plain")
        hosts.hold("held", 500.0)
        return hosts.export(), clock()

    state, _ = run(main)
    return json.loads(json.dumps(state))


def after_restart(state, wall):
    """What each host says in a new process."""

    async def main(clock):
        hosts = Hosts(config(max_wait_s=0.001), clock=clock, wall=Wall(wall))
        hosts.restore(state)
        found = {}
        for name in ("slow", "broken", "held", "plain"):
            turn = await hosts.turn(name)
            found[name] = 0.0 if isinstance(turn, Turn) else round(turn.after_s, 3)
        return found

    return run(main)


def test_what_matters_is_taken_up_after_a_restart():
    state = exported()
    assert set(state["hosts"]) == {"slow", "broken", "held"}
    now = after_restart(state, 1.8e9)
    assert now == {"slow": pytest.approx(13, abs=0.01), "broken": pytest.approx(60), "held": pytest.approx(500), "plain": 0.0}
    assert after_restart(state, 1.8e9 + 10) == {
        "slow": pytest.approx(3, abs=0.01),
        "broken": pytest.approx(50),
        "held": pytest.approx(490),
        "plain": 0.0,
    }
    assert after_restart(state, 1.8e9 + 1000) == {"slow": 0.0, "broken": 0.0, "held": 0.0, "plain": 0.0}


def test_a_wall_clock_that_was_set_back_makes_nobody_wait_longer():
    state = exported()
    assert after_restart(state, 1.8e9 - 10**6) == after_restart(state, 1.8e9)


def test_a_breaker_taken_up_goes_on_doubling():
    async def main(clock):
        first = Hosts(config(host_rate=0), clock=clock, wall=Wall())
        await failing(first, clock, 5)
        second = Hosts(config(host_rate=0), clock=clock, wall=Wall())
        second.restore(first.export())
        await asyncio.sleep(60.1)
        assert isinstance(await ask(second, clock, ok=False), float)  # the trial
        return (await ask(second, clock)).after_s

    assert run(main) == pytest.approx(120.0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEPT = st.dictionaries(st.sampled_from(["hold_until", "open_until", "opened", "failures", "last", "delay_s"]), JSON, max_size=6)


@given(state=JSON | st.fixed_dictionaries({"at": JSON, "hosts": JSON | st.dictionaries(st.text(max_size=3), KEPT | JSON, max_size=4)}))
@settings(max_examples=200, deadline=None)
def test_garbage_is_taken_up_as_nothing_much(state):
    async def main(clock):
        hosts = Hosts(config(hosts=3), clock=clock)
        hosts.restore(state)
        assert len(hosts) <= 3
        json.dumps(hosts.export(), allow_nan=False)
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
    assert host_of(URL(url)) == "xn--bcher-kva.example"


def test_an_hour_is_the_longest_that_a_breaker_is_open():
    assert BREAKER_MAX_S == 3600
