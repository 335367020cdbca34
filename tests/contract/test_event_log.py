"""The suite every event log passes."""

import subprocess
import sys
import threading

import pytest

from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, OffsetGap
from streamlearn.contract.event_log import CANDIDATES, SOURCE_STATE, NewRecord, SqliteLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.sqlite"


@pytest.fixture
def log(path):
    log = SqliteLog(path)
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


def test_a_key_always_goes_to_the_same_partition(log, path):
    first = {key: log.append([new(b"x", key)])[0][0] for key in (b"a.example", b"b.example", b"c.example", b"")}
    assert {key: SqliteLog(path).append([new(b"y", key)])[0][0] for key in first} == first


def test_an_append_over_several_topics_is_all_or_none(log):
    with pytest.raises(NotFound):
        log.append([new(b"1"), new(b"cursor", topic="nowhere")])
    with pytest.raises(NotFound, match="no partition 9"):
        log.append([new(b"1", partition=0), new(b"2", partition=9)])
    assert [log.bounds(CANDIDATES, p) for p in range(3)] == [(0, 0)] * 3


def test_the_newest_value_of_a_key_is_what_a_compacted_topic_keeps(log):
    log.append([new(b"1", b"c", SOURCE_STATE), new(b"2", b"c", SOURCE_STATE)])
    log.append([new(b"3", b"c", SOURCE_STATE)])
    assert log.latest(SOURCE_STATE, b"c") == b"3" and log.latest(SOURCE_STATE, b"other") is None


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


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "log.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at by sqlite" * 20)
    with pytest.raises(Corrupt, match=r"log\.sqlite.*not a database.*backup"):
        SqliteLog(path)


def test_processes_that_append_at_once_lose_and_double_nothing(log, path):
    code = (
        "import sys; from pathlib import Path; from streamlearn.contract.event_log import *\n"
        "log = SqliteLog(Path(sys.argv[1]))\n"
        "for i in range(50): log.append([NewRecord('candidates', b'k', b'%s-%d' % (sys.argv[2].encode(), i), 0) for _ in range(2)])"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(3)]
    assert [c.wait() for c in children] == [0, 0, 0]
    records = log.read(CANDIDATES, 0, 0, 1000)
    assert [r.offset for r in records] == list(range(300))
    assert len({r.value for r in records}) == 150


def test_killed_while_appending_the_log_holds_whole_batches_only(log, path):
    code = (
        "import sys; from pathlib import Path; from streamlearn.contract.event_log import *\n"
        "log = SqliteLog(Path(sys.argv[1]))\n"
        "i = 0\nwhile True:\n"
        "    batch = [NewRecord('candidates', b'k', b'%d' % i, 0) for _ in range(20)]\n"
        "    log.append([*batch, NewRecord('source-state', b'c', b'%d' % i)])\n"
        "    i += 1"
    )
    for pause in (0.3, 0.45, 0.6):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)])
        before = log.bounds(CANDIDATES, 0)[1]
        while log.bounds(CANDIDATES, 0)[1] == before:
            pass
        threading.Event().wait(pause / 3)
        child.kill()
        child.wait()
        records = log.read(CANDIDATES, 0, 0, 10**6)
        assert len(records) % 20 == 0 and log.latest(SOURCE_STATE, b"c") == records[-1].value


def test_a_recreated_log_has_another_name(tmp_path):
    assert SqliteLog(tmp_path / "a").log_id != SqliteLog(tmp_path / "b").log_id
    assert SqliteLog(tmp_path / "a").log_id == SqliteLog(tmp_path / "a").log_id
