"""A Kafka to test against: librdkafka's mock cluster, real protocol on loopback sockets, in this process; or a real broker.

The mock is in the library that the confluent-kafka wheel brings, and is spoken to through ctypes.  What it is not: it cannot make topics
over the protocol, it does not de-duplicate, it has no transactions.  Calling it after `close` would end the interpreter: calls are no-ops then.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import confluent_kafka

from streamlearn.adapters.kafka_log import KafkaLog
from streamlearn.contract.config import KafkaConfig

API = {"Produce": 0, "Fetch": 1, "ListOffsets": 2, "Metadata": 3, "OffsetCommit": 8, "OffsetFetch": 9, "JoinGroup": 11}
DROP = -195  # the broker drops the connection
_POINTER, _INT, _LONG, _TEXT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p, ctypes.c_size_t
_SIGNATURES = {
    "rd_kafka_conf_new": (_POINTER, []),
    "rd_kafka_new": (_POINTER, [_INT, _POINTER, _TEXT, _SIZE]),
    "rd_kafka_destroy": (None, [_POINTER]),
    "rd_kafka_mock_cluster_new": (_POINTER, [_POINTER, _INT]),
    "rd_kafka_mock_cluster_destroy": (None, [_POINTER]),
    "rd_kafka_mock_cluster_bootstraps": (_TEXT, [_POINTER]),
    "rd_kafka_mock_topic_create": (_INT, [_POINTER, _TEXT, _INT, _INT]),
    "rd_kafka_mock_partition_delete_records": (_INT, [_POINTER, _TEXT, ctypes.c_int32, _LONG]),
    "rd_kafka_mock_partition_set_leader": (_INT, [_POINTER, _TEXT, ctypes.c_int32, ctypes.c_int32]),
    "rd_kafka_mock_broker_set_down": (_INT, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_broker_set_up": (_INT, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_broker_set_rtt": (_INT, [_POINTER, ctypes.c_int32, _INT]),
    "rd_kafka_mock_push_request_errors_array": (None, [_POINTER, ctypes.c_int16, _SIZE, ctypes.POINTER(_INT)]),
    "rd_kafka_mock_clear_request_errors": (None, [_POINTER, ctypes.c_int16]),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [_POINTER, ctypes.c_int32]),
}


def _library() -> ctypes.CDLL:
    (path,) = (Path(confluent_kafka.__file__).parent.parent / "confluent_kafka.libs").glob("librdkafka*.so*")
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class MockCluster:
    def __init__(self, brokers: int = 3) -> None:
        self._library = _library()
        error = ctypes.create_string_buffer(512)
        self._owner = self._library.rd_kafka_new(0, self._library.rd_kafka_conf_new(), error, 512)
        assert self._owner, error.value
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._owner, brokers)
        self.servers = tuple(self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode().split(","))
        self._call("group_initial_rebalance_delay_ms", 100)

    def _call(self, name: str, *arguments: Any) -> None:
        if self._cluster is None:
            return
        result = getattr(self._library, f"rd_kafka_mock_{name}")(self._cluster, *arguments)
        assert not result, f"mock {name}: error {result}"

    def make_topic(self, name: str, partitions: int) -> None:
        self._call("topic_create", name.encode(), partitions, 1)

    def delete_records(self, name: str, partition: int, before: int) -> None:
        self._call("partition_delete_records", name.encode(), partition, before)

    def set_leader(self, name: str, partition: int, broker: int) -> None:
        self._call("partition_set_leader", name.encode(), partition, broker)

    def down(self, broker: int = -1) -> None:
        self._call("broker_set_down", broker)

    def up(self, broker: int = -1) -> None:
        self._call("broker_set_up", broker)

    def round_trip_ms(self, ms: int, broker: int = -1) -> None:
        self._call("broker_set_rtt", broker, ms)

    def fail(self, api: str, *codes: int) -> None:
        """The next requests of a kind are answered with these error codes."""
        self._call("push_request_errors_array", API[api], len(codes), (_INT * len(codes))(*codes))

    def close(self) -> None:
        if self._cluster is not None:
            cluster, self._cluster = self._cluster, None
            self._library.rd_kafka_mock_cluster_destroy(cluster)
            self._library.rd_kafka_destroy(self._owner)


class MockedLog(KafkaLog):
    """Topics are made and trimmed behind the protocol, where the mock cannot do it over the wire."""

    cluster: MockCluster

    def _create(self, name, topic, partitions):
        self.cluster.make_topic(name, partitions)

    def trim(self, topic, partition, before):
        first, _ = self.bounds(topic, partition)
        self.cluster.delete_records(self._name(topic), partition, before)
        return before - first


def mock_config(cluster, **more):
    settings = {
        "servers": cluster.servers,
        "api_version": (2, 3),
        "request_timeout_s": 5.0,
        "delivery_timeout_s": 10.0,
        "session_timeout_s": 3.0,
    }
    return KafkaConfig(**settings | more)


def open_mocked(cluster, kind=MockedLog, **more):
    """A log on the mock cluster."""
    log = kind(mock_config(cluster, **more))
    log.cluster = cluster
    return log


def real_servers():
    """Brokers that STREAMLEARN_TEST_KAFKA names, host:port with commas."""
    return tuple(filter(None, os.environ.get("STREAMLEARN_TEST_KAFKA", "").split(",")))
