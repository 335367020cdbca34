"""The suite every event log passes: SQLite, and Kafka (librdkafka's mock cluster; a real broker where STREAMLEARN_TEST_KAFKA names one)."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from streamlearn.adapters.kafka_log import KafkaLog
from streamlearn.contract.config import KafkaConfig
from streamlearn.contract.errors import ConfigError, NotFound, OffsetGap
from streamlearn.contract.event_log import CANDIDATES, CONNECTOR_CONFIGS, SOURCE_STATE, NewRecord, SqliteLog, partition_of
from tests.adapters.kafka import MockCluster, open_mocked, real_servers

KINDS = ["sqlite", "mock kafka", *(["real kafka"] if real_servers() else [])]


@pytest.fixture(scope="module")
def cluster():
    cluster = MockCluster()
    yield cluster
    cluster.close()


@pytest.fixture(params=KINDS)
def connect(request, tmp_path):
    """A function that opens the same log once more."""
    opened, prefix = [], f"t{uuid.uuid4().hex[:8]}."

    def open_it():
        if request.param == "sqlite":
            return SqliteLog(tmp_path / "log.sqlite")
        if request.param == "mock kafka":
            log = open_mocked(request.getfixturevalue("cluster"), topic_prefix=prefix)
        else:
            log = KafkaLog(KafkaConfig(servers=real_servers(), topic_prefix=prefix, replication=1, min_insync=1))
        opened.append(log)
        return log

    yield open_it
    for log in opened:
        log.close()


@pytest.fixture
def log(connect):
    log = connect()
    log.ensure_topic(CANDIDATES, 3)
    log.ensure_topic(SOURCE_STATE, 1)
    return log


def new(value, key=b"k", topic=CANDIDATES, partition=None):
    return NewRecord(topic, key, value, partition)


def test_order_within_a_partition_is_the_order_of_appending(log):
    positions = log.append([new(b"%d" % i, partition=1) for i in range(5)])
    assert positions == [(1, i) for i in range(5)]
    assert [r.value for r in log.read(CANDIDATES, 1, 2, 10)] == [b"2", b"3", b"4"]
    assert log.bounds(CANDIDATES, 1) == (0, 5) and log.read(CANDIDATES, 1, 5, 10) == []


def test_a_key_always_goes_to_the_same_partition_whoever_appends(log, connect):
    keys = (b"a.example", b"b.example", b"c.example", b"d.example", b"")
    first = {key: log.append([new(b"x", key)])[0][0] for key in keys}
    again = connect()
    assert {key: again.append([new(b"y", key)])[0][0] for key in keys} == first
    assert first == {key: partition_of(key, 3) for key in keys} and len(set(first.values())) > 1


def test_any_place_can_be_read_in_any_order_and_again(log, connect):
    for p in range(3):
        log.append([new(b"%d-%d" % (p, i), partition=p) for i in range(30)])
    for reader in (log, connect()):
        for p, offset, most in ((0, 10, 5), (1, 0, 30), (0, 15, 100), (0, 10, 1), (2, 29, 10), (2, 30, 10), (0, 0, 3)):
            found = reader.read(CANDIDATES, p, offset, most)
            assert [r.value for r in found] == [b"%d-%d" % (p, i) for i in range(offset, min(30, offset + most))][: len(found)]
            assert bool(found) == (offset < 30) and all(r.key == b"k" and r.partition == p for r in found)


def test_what_is_appended_while_one_waits_at_the_end_is_read_next(log, connect):
    other = connect()
    assert log.read(CANDIDATES, 1, 0, 10) == []
    for i in range(3):
        other.append([new(b"%d" % i, partition=1)])
        deadline = time.monotonic() + 60
        while not (found := log.read(CANDIDATES, 1, i, 10)) and time.monotonic() < deadline:
            pass
        assert [r.value for r in found] == [b"%d" % i] and abs(found[0].timestamp_ms / 1000 - time.time()) < 3600


def test_a_place_that_does_not_exist_is_not_found(log):
    for call in (lambda: log.read(CANDIDATES, 7, 0, 1), lambda: log.bounds(CANDIDATES, 7), lambda: log.partitions("nowhere")):
        with pytest.raises(NotFound, match="no (partition 7 of topic|topic)"):
            call()


def test_an_append_over_several_topics_is_all_or_none(log):
    with pytest.raises(NotFound):
        log.append([new(b"1"), new(b"cursor", topic="nowhere")])
    with pytest.raises(NotFound, match="no partition 9"):
        log.append([new(b"1", partition=0), new(b"2", partition=9)])
    assert [log.bounds(CANDIDATES, p) for p in range(3)] == [(0, 0)] * 3


def test_the_newest_value_of_a_key_is_what_a_compacted_topic_keeps(log, connect):
    log.append([new(b"1", b"c", SOURCE_STATE), new(b"2", b"c", SOURCE_STATE)])
    log.append([new(b"3", b"c", SOURCE_STATE)])
    assert log.latest(SOURCE_STATE, b"c") == b"3" and log.latest(SOURCE_STATE, b"other") is None
    assert connect().latest(SOURCE_STATE, b"c") == b"3"


def test_a_table_has_the_newest_value_of_every_key_whoever_wrote_it(log, connect):
    log.ensure_topic(CONNECTOR_CONFIGS, 3)
    assert log.table(CONNECTOR_CONFIGS) == {}
    log.append(
        [
            new(b"1", b"a", CONNECTOR_CONFIGS),
            new(b"2", b"b", CONNECTOR_CONFIGS),
            new(b"3", b"a", CONNECTOR_CONFIGS),
            new(b"s", b"a", SOURCE_STATE),
        ]
    )
    assert log.table(CONNECTOR_CONFIGS) == {b"a": b"3", b"b": b"2"} and log.table(SOURCE_STATE) == {b"a": b"s"}
    other = connect()
    other.append([new(b"4", b"%d" % i, CONNECTOR_CONFIGS) for i in range(20)] + [new(b"5", b"b", CONNECTOR_CONFIGS)])  # in every partition
    expected = {b"a": b"3", b"b": b"5"} | {b"%d" % i: b"4" for i in range(20)}
    assert other.table(CONNECTOR_CONFIGS) == expected
    assert log.table(CONNECTOR_CONFIGS) == expected == connect().table(CONNECTOR_CONFIGS)  # at once, though it has looked a moment ago


def test_an_empty_value_forgets_its_key_whoever_looks(log, connect):
    log.append([new(b"1", b"a", SOURCE_STATE), new(b"2", b"b", SOURCE_STATE)])
    other = connect()
    assert other.table(SOURCE_STATE) == {b"a": b"1", b"b": b"2"}
    log.append([new(b"", b"a", SOURCE_STATE), new(b"", b"never told", SOURCE_STATE)])
    for one in (log, other, connect()):
        assert one.table(SOURCE_STATE) == {b"b": b"2"} and one.latest(SOURCE_STATE, b"a") is None
    log.append([new(b"3", b"a", SOURCE_STATE)])
    assert log.table(SOURCE_STATE) == {b"a": b"3", b"b": b"2"} == other.table(SOURCE_STATE)


def test_a_table_of_a_topic_that_is_not_there_is_not_found(log):
    with pytest.raises(NotFound, match="no topic"):
        log.table("nowhere")


def test_threads_may_append_and_read_at_once(log):
    log.ensure_topic(CONNECTOR_CONFIGS, 3)

    def work(number):
        for i in range(10):
            log.append([new(b"%d" % i, b"t%d" % number, CONNECTOR_CONFIGS), new(b"c", b"t%d" % number)])
            assert log.table(CONNECTOR_CONFIGS)[b"t%d" % number] == b"%d" % i == log.latest(CONNECTOR_CONFIGS, b"t%d" % number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert sum(log.bounds(CANDIDATES, p)[1] for p in range(3)) == 40


def test_a_gap_is_an_incident_never_a_silent_jump(log):
    log.append([new(b"%d" % i, partition=0) for i in range(6)])
    assert log.trim(CANDIDATES, 0, 4) == 4
    with pytest.raises(OffsetGap, match=r"begins at 4, asked for 1; 1 to 3 are gone"):
        log.read(CANDIDATES, 0, 1, 10)
    assert [r.offset for r in log.read(CANDIDATES, 0, 4, 10)] == [4, 5]
    assert log.append([new(b"6", partition=0)]) == [(0, 6)]


def test_offsets_of_groups_are_kept_apart(log):
    log.commit("a", {(CANDIDATES, 0): 3})
    log.commit("b", {(CANDIDATES, 0): 5, (CANDIDATES, 1): 1})
    assert log.committed("a", CANDIDATES, 0) == 3 and log.committed("b", CANDIDATES, 0) == 5
    assert log.committed("a", CANDIDATES, 1) is None


def test_another_number_of_partitions_is_refused_with_the_remedy(log):
    with pytest.raises(ConfigError, match=r"has 3 partitions, config says log.partitions = 4"):
        log.ensure_topic(CANDIDATES, 4)


def test_positions_of_another_making_of_the_log_are_not_taken_for_its_own(log, connect):
    assert log.log_id == connect().log_id and log.log_id


def test_all_who_subscribe_own_every_partition_between_them(log):
    member = log.subscribe("readers", [CANDIDATES, SOURCE_STATE])
    every = {(CANDIDATES, 0), (CANDIDATES, 1), (CANDIDATES, 2), (SOURCE_STATE, 0)}
    deadline = time.monotonic() + 60
    while member.owned() != every and time.monotonic() < deadline:
        time.sleep(0.05)
    assert member.owned() == every
    log.commit("readers", {(CANDIDATES, 1): 4})
    assert log.committed("readers", CANDIDATES, 1) == 4
    member.close()
