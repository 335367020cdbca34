"""The Kafka adapter under faults of the brokers and of its user."""

import threading
import time
import uuid

import pytest

from streamlearn.adapters.kafka_client import connection_settings
from streamlearn.adapters.kafka_log import KafkaLog
from streamlearn.contract.config import KafkaConfig
from streamlearn.contract.config_file import load
from streamlearn.contract.errors import ConfigError, OffsetGap, Retryable, Stuck
from streamlearn.contract.event_log import CANDIDATES, NewRecord
from tests.adapters.kafka import DROP, MockCluster, open_mocked

NOT_LEADER, TIMED_OUT, TOO_FEW_REPLICAS, TOO_FEW_AFTER_APPEND, STORAGE = 6, 7, 19, 20, 56


@pytest.fixture
def cluster():
    cluster = MockCluster()
    yield cluster
    cluster.close()


@pytest.fixture
def open_log(cluster):
    opened, prefix = [], f"t{uuid.uuid4().hex[:8]}."

    def open_it(**more):
        opened.append(open_mocked(cluster, topic_prefix=prefix, **more))
        return opened[-1]

    yield open_it
    for log in opened:
        log.close()


@pytest.fixture
def log(open_log):
    log = open_log()
    log.ensure_topic(CANDIDATES, 2)
    return log


def values(log, partition=0):
    found, at = [], 0
    while records := log.read(CANDIDATES, partition, at, 100):
        found += [r.value for r in records]
        at = records[-1].offset + 1
    return found


def batch(start, count=20):
    return [NewRecord(CANDIDATES, b"k", b"%d" % i, 0) for i in range(start, start + count)]


@pytest.mark.parametrize("code", [NOT_LEADER, TIMED_OUT, TOO_FEW_REPLICAS, TOO_FEW_AFTER_APPEND, STORAGE, DROP])
def test_an_append_through_a_fault_of_a_broker_is_there_once_and_in_order(log, cluster, code):
    log.append(batch(0))
    cluster.fail("Produce", code, code, code)
    positions = log.append(batch(20))
    assert positions == [(0, 20 + i) for i in range(20)] and values(log) == [b"%d" % i for i in range(40)]


def test_an_append_while_all_brokers_are_down_arrives_when_they_are_back(log, cluster):
    log.append(batch(0))
    cluster.down()
    back = threading.Timer(1.5, cluster.up)
    back.start()
    try:
        log.append(batch(20))
    finally:
        back.join()
    assert values(log) == [b"%d" % i for i in range(40)]


def test_a_change_of_leaders_loses_nothing(log, cluster):
    log.append(batch(0))
    name = log._name(CANDIDATES)
    for broker in (2, 3, 1):
        cluster.set_leader(name, 0, broker)
        log.append(batch(broker * 100))
    assert values(log) == [b"%d" % i for start in (0, 200, 300, 100) for i in range(start, start + 20)]


def test_who_only_reads_hears_of_another_leader(open_log, log, cluster):
    """kafka-python asks the former leader for offsets again and again."""
    reader, name = open_log(request_timeout_s=10.0, delivery_timeout_s=20.0), log._name(CANDIDATES)
    for round_, broker in enumerate((2, 3, 1)):
        assert reader.bounds(CANDIDATES, 0) == (0, 20 * round_)
        cluster.set_leader(name, 0, broker)
        log.append(batch(20 * round_))
        assert reader.bounds(CANDIDATES, 0) == (0, 20 * round_ + 20)
        assert [r.value for r in reader.read(CANDIDATES, 0, 20 * round_, 99)] == [b"%d" % i for i in range(20 * round_, 20 * round_ + 20)]


def test_brokers_that_stay_away_end_in_retryable_or_in_a_new_process_never_in_silence(open_log, cluster):
    log = open_log(delivery_timeout_s=2.0, request_timeout_s=1.0)
    log.ensure_topic(CANDIDATES, 2)
    log.append(batch(0))
    cluster.down()
    with pytest.raises((Retryable, Stuck), match="Kafka"):
        log.append(batch(20))
    cluster.up()


def test_what_retention_has_dropped_is_named(log):
    log.append(batch(0))
    assert log.trim(CANDIDATES, 0, 12) == 12
    with pytest.raises(OffsetGap, match=r"begins at 12, asked for 3; 3 to 11 are gone.*retention"):
        log.read(CANDIDATES, 0, 3, 10)
    assert [r.offset for r in log.read(CANDIDATES, 0, 12, 3)] == [12, 13, 14]


def test_reading_through_dropped_connections_goes_on(log, cluster):
    log.append(batch(0, 200))
    found, at = [], 0
    while at < 200:
        cluster.fail("Fetch", DROP)
        records = log.read(CANDIDATES, 0, at, 50)
        found += [r.value for r in records]
        at += len(records)
    assert found == [b"%d" % i for i in range(200)]


@pytest.mark.parametrize("code", [14, 15, 16, 22, 25, 27, DROP])
def test_a_refused_commit_of_offsets_stops_nobody(log, cluster, code):
    """They are for dashboards; of whoever owns the partition next, the catalog tells the position."""
    log.append(batch(0))
    log.commit("g", {(CANDIDATES, 0): 1})
    cluster.fail("OffsetCommit", code)
    log.commit("g", {(CANDIDATES, 0): 2})
    assert log.committed("g", CANDIDATES, 0) in (1, 2)
    log.commit("g", {(CANDIDATES, 0): 3})
    assert log.committed("g", CANDIDATES, 0) == 3


def test_who_does_not_ask_what_it_owns_loses_it(open_log):
    """A role that hangs must not keep its partitions from the others."""
    log, other = open_log(), open_log()
    log.ensure_topic(CANDIDATES, 2)
    hanging, living = log.subscribe("g", [CANDIDATES]), other.subscribe("g", [CANDIDATES])
    deadline = time.monotonic() + 120
    while len(living.owned()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living.owned() == {(CANDIDATES, 0), (CANDIDATES, 1)}
    hanging.close()


def test_servers_that_do_not_answer_are_named_with_the_remedy():
    config = KafkaConfig(servers=("127.0.0.1:1",), start_timeout_s=1.0)
    with pytest.raises(
        ConfigError, match=r"127\.0\.0\.1:1.*no broker answers within log.kafka.start_timeout_s = 1 s.*look at log.kafka.servers"
    ):
        KafkaLog(config)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"ssl_cafile": "/nowhere/ca.pem"}, r"log.kafka.ssl_cafile = '/nowhere/ca.pem': no such file"),
        (
            {"security": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_username": "u"},
            "neither log.kafka.sasl_password_file nor STREAMLEARN_KAFKA_PASSWORD",
        ),
        (
            {"security": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_username": "u", "sasl_password_file": "/nowhere/p"},
            "sasl_password_file = '/nowhere/p'",
        ),
    ],
)
def test_bad_credentials_are_refused_before_anything_connects(settings, complaint, monkeypatch):
    monkeypatch.delenv("STREAMLEARN_KAFKA_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match=complaint):
        connection_settings(KafkaConfig(servers=("127.0.0.1:1",), **settings))


def test_the_password_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("from the file\n")
    sasl = {"servers": ("x:1",), "security": "SASL_PLAINTEXT", "sasl_mechanism": "SCRAM-SHA-512", "sasl_username": "u"}
    monkeypatch.setenv("STREAMLEARN_KAFKA_PASSWORD", "from the environment")
    assert connection_settings(KafkaConfig(**sasl))["sasl_plain_password"] == "from the environment"
    found = connection_settings(KafkaConfig(**sasl, sasl_password_file=str(tmp_path / "secret")))
    assert found["sasl_plain_password"] == "from the file" and found["security_protocol"] == "SASL_PLAINTEXT"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[log]\nkind = "kafka"\n', "needs log.kafka.servers"),
        ('[log.kafka]\nservers = ["a:1"]\nreplication = 1\n', "min_insync = 2 is over replication = 1"),
        (
            '[log.kafka]\nservers = ["a:1"]\nrequest_timeout_s = 10.0\ndelivery_timeout_s = 10.0\n',
            "delivery_timeout_s = 10 leaves no time for one request",
        ),
        ('[log.kafka]\nservers = ["a:1"]\nsecurity = "SASL_SSL"\n', "needs sasl_mechanism and sasl_username"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(tmp_path, text, complaint):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load(tmp_path / "c.toml")
