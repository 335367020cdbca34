"""Who owns what in a consumer group, and when it passes from hand to hand."""

import threading
import time
import uuid
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.protocol.consumer.metadata import ConsumerProtocolSubscription
from kafka.structs import TopicPartition

from streamlearn.adapters.kafka_assignor import ByNumber
from streamlearn.contract.event_log import CANDIDATES, retry_topic
from tests.adapters.kafka import MockCluster, open_mocked

TOPICS = (CANDIDATES, retry_topic(0), retry_topic(1))


@pytest.fixture
def cluster():
    cluster = MockCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def open_log(cluster):
    opened, prefix = [], f"g{uuid.uuid4().hex[:8]}."

    def open_it(**more):
        opened.append(open_mocked(cluster, topic_prefix=prefix, **more))
        for topic in TOPICS:
            opened[-1].ensure_topic(topic, 4)
        return opened[-1]

    yield open_it
    for log in opened:
        log.close()


def until(what):
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def dealt(owned, partitions, topics=TOPICS):
    """One round of a group: member -> places, from member -> places."""
    cluster = SimpleNamespace(partitions_for_topic=lambda topic: set(range(partitions)), topics=lambda: set(topics))
    members = []
    for name, places in owned.items():
        claims = [
            ConsumerProtocolSubscription.TopicPartition(topic=t, partitions=sorted(p.partition for p in places if p.topic == t))
            for t in topics
        ]
        metadata = ConsumerProtocolSubscription(version=1, topics=sorted(topics), user_data=b"", owned_partitions=claims)
        members.append(SimpleNamespace(member_id=name, metadata=metadata))
    return {name: set(a.partitions()) for name, a in ByNumber().assign(cluster, members).items()}


def settle(owned, partitions):
    """Rounds until nobody gives anything back; of each round, what was dealt to one while another still had it."""
    early = set()
    for _ in range(10):
        new = dealt(owned, partitions)
        for name, places in new.items():
            early |= {p for p in places - owned[name] for other in owned if other != name and p in owned[other]}
        given_back = any(owned[name] - new[name] for name in owned)
        owned = new
        if not given_back:
            return owned, early
    raise AssertionError("the group does not settle")


def whole(partitions):
    return {TopicPartition(t, p) for t in TOPICS for p in range(partitions)}


@given(st.lists(st.sets(st.sampled_from("abcd"), min_size=1), min_size=1, max_size=6), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_whoever_comes_and_goes_a_number_has_one_owner_in_all_topics_and_the_load_is_even(groups, partitions):
    owned = {}
    for names in groups:
        owned, early = settle({name: owned.get(name, set()) for name in names}, partitions)
        numbers = {name: {p.partition for p in places} for name, places in owned.items()}
        assert sum(len(places) for places in owned.values()) == len(whole(partitions)) and set().union(*owned.values()) == whole(partitions)
        assert all(places == {TopicPartition(t, n) for t in TOPICS for n in numbers[name]} for name, places in owned.items())
        assert max(map(len, numbers.values())) - min(map(len, numbers.values())) <= 1 and early == set()


@pytest.mark.parametrize("order", [("back", "heir"), ("heir", "back")])
def test_what_two_members_claim_neither_gets_before_both_have_let_go(order):
    """One was taken for dead, its partitions were given away, and it comes back without having heard of it."""
    both = {TopicPartition(t, n) for t in TOPICS for n in (0, 1)}
    rest = {TopicPartition(t, n) for t in TOPICS for n in (2, 3)}
    claimed = {name: {"back": both, "heir": both | rest}[name] for name in order}
    first = dealt(claimed, 4)
    assert not (first["back"] | first["heir"]) & both
    owned, early = settle(claimed, 4)
    assert early == set() and {n: len(p) for n, p in owned.items()} == {"back": 6, "heir": 6}


def taking_back(member, log, number):
    """The thread in which the group takes a number back, as kafka-python would."""
    places = [TopicPartition(log._name(t), number) for t in TOPICS]
    thread = threading.Thread(target=member.on_partitions_revoked, args=(places,), daemon=True)
    thread.start()
    until(lambda: len(member.owned()) == 9)
    return thread


def test_a_number_that_is_taken_back_is_not_free_before_its_owner_has_let_go(open_log):
    log = open_log(session_timeout_s=60.0)
    member = log.subscribe("g", TOPICS)
    all_of_them = until(lambda: len(member.owned()) == 12 and member.owned())
    thread = taking_back(member, log, 2)
    member.hold_only(all_of_them)
    thread.join(1.0)
    assert thread.is_alive() and (CANDIDATES, 2) not in member.owned()
    member.hold_only(member.owned())
    thread.join(10)
    assert not thread.is_alive()
    member.close()


def test_who_does_not_let_go_is_not_waited_for_for_ever_and_does_not_get_it_back_unawares(open_log):
    log = open_log(session_timeout_s=3.0)
    member = log.subscribe("g", TOPICS)
    until(lambda: len(member.owned()) == 12)
    taking_back(member, log, 2).join(60)
    member.on_partitions_assigned([TopicPartition(log._name(t), 2) for t in TOPICS])  # another had it meanwhile
    assert len(member.owned()) == 9
    member.hold_only(member.owned())
    assert len(member.owned()) == 12
    member.close()


def test_a_member_that_no_broker_confirms_is_not_sure_of_what_it_owns(open_log, cluster):
    log = open_log()
    member = log.subscribe("g", TOPICS)
    until(lambda: len(member.owned()) == 12 and member.sure())
    cluster.down()
    until(lambda: (member.owned(), not member.sure())[1])
    cluster.up()
    until(lambda: (member.owned(), member.sure())[1])
    member.close()
