"""The audit of a server's log finds each kind of impoliteness; with it the other tests judge the fetchers."""

import re

import pytest

from tests.ingest.manners import Hit, Rules, audit, changes_of_asker

RULES = Rules(rate=1.0, burst=3, per_host=2, delays={"slow": 5.0})


def hits(*began, host="h", takes=0.1, askers="a", **more):
    return [Hit(host, askers[i % len(askers)], at, at + takes, path=f"/{i}", **more) for i, at in enumerate(began)]


@pytest.mark.parametrize(
    "log",
    [
        hits(0, 0.2, 0.4, 1.0, 2.0, 3.0),
        hits(0, 0.2, 0.4, 10, 10.2, 10.4, 11),
        hits(0, 0.2, 0.4, 0.6),  # within what may lie between a start and its line in the log
        hits(0, 5, 10, 14.6, host="slow"),
        hits(0, 0.5, 3, 3.5, takes=2.0),
        hits(0, 0.3, takes=9.0) + hits(5.0, 5.3, takes=1.0, host="another"),
        hits(0, takes=1.0, retry_after_s=7.0) + hits(0.5, 8.1, 9.1),  # one was on its way when it was told
        hits(0, takes=3.0, aborted=True) + hits(0, takes=3.0) + hits(2.8),
    ],
)
def test_who_keeps_the_rules_is_not_complained_of(log):
    assert audit(log, RULES) == []


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (hits(0, 0.1, 0.2, 0.3), r"h: /3 came 0.70 s too early"),
        (hits(0, 0.1, 0.2, 1, 2, 2.1, 2.2, askers="aaaaabb"), r"h: /6 came 1.80 s too early, from b"),  # a burst of the next owner
        (hits(0, 4, host="slow"), r"slow: /1 after 4.00 s, its Crawl-delay is 5 s"),
        (hits(0, 0.01, 0.02, takes=0.5), r"h: 3 at once when /2 came"),
        (hits(0, 1, takes=9.0) + hits(3.0, askers="b"), r"h: 3 at once when /0 came from b"),
        (hits(0, 1, takes=3.0, aborted=True) + hits(2.2, askers="b"), r"h: 3 at once"),
        (hits(0, retry_after_s=7.0) + hits(4.0, askers="b"), r"came 3.10 s before Retry-After was over, from b; told to a"),
    ],
)
def test_each_broken_rule_is_named(log, complaint):
    assert re.search(complaint, audit(log, RULES)[-1])


def test_it_is_seen_how_often_the_asker_changes():
    log = hits(0, 1, 2, 3, 4, askers="aabba") + hits(0, 1, host="another")
    assert changes_of_asker(log) == {"h": 2, "another": 0}
