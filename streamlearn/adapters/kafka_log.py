"""The event log on Kafka (kafka-python).

Writing: one producer, acks=all, idempotent; an append returns when every record is acknowledged.  There are no transactions in it: a
process that dies inside an append leaves some of its records, and whoever goes on looks at what is there (connectors/run.py, pack.py).

Reading: one consumer, partitions assigned by hand, positions set by the caller, reset policy none.  All partitions are paused but the one
that is being read, so nothing piles up in memory for a lane that does not ask (one fetch at most): that is the back-pressure.

Sharing out: another consumer, a member of the group, reads nothing; it is there to be told which partitions are ours
(kafka_group.py), and to commit offsets for the lag dashboards.  What decides is the catalog.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors

from streamlearn.adapters.kafka_client import calm, connection_settings, translated
from streamlearn.adapters.kafka_group import Group
from streamlearn.contract.config import KafkaConfig
from streamlearn.contract.errors import ConfigError, NotFound, OffsetGap, Retryable, Stuck
from streamlearn.contract.event_log import COMPACTED, NewRecord, Record, Subscription, partition_of

STALE_S = 0.1  # for so long the end of a partition is believed; it decides only whether there is something to wait for
OFFSETS_MS = 2000  # what a broker that is well takes a hundredth of
EVERYTHING = 10**9  # records
FETCH = 2**18  # bytes of one partition in one fetch: some hundred candidates
MAX_RECORD = 2**20  # bytes; a candidate has at most 8 KiB
logger = logging.getLogger(__name__)


class KafkaLog:
    """Safe for threads: one lock for the reader, one for each group; the producer needs none."""

    def __init__(self, config: KafkaConfig):
        self.config = config
        self.epoch = config.epoch
        self._where = ", ".join(config.servers)
        calm(logging.getLogger("kafka.producer.sender"))
        self._settings = connection_settings(config)
        self._reading = threading.RLock()
        self._ends: dict[TopicPartition, int] = {}
        self._ends_at = 0.0  # monotonic
        self._next: dict[TopicPartition, int] = {}  # what the next read of a place asks for, if it goes on
        self._ahead: dict[TopicPartition, deque[Record]] = {}  # fetched, not read yet: at most one fetch of each place
        self._newest: dict[tuple[str, int], tuple[int, dict[bytes, bytes]]] = {}  # of compacted topics: read up to, value of each key
        self._groups: dict[str, Group] = {}
        with translated(self.config, "start", starting=True):
            self._admin = KafkaAdminClient(**self._settings)
            self._consumer = KafkaConsumer(
                **self._settings,
                group_id=None,
                enable_auto_commit=False,
                auto_offset_reset="none",
                allow_auto_create_topics=False,
                max_partition_fetch_bytes=FETCH,
                fetch_max_wait_ms=10,  # only partitions that have something are asked; a long poll would hold up the next
            )
            self._producer = KafkaProducer(
                **self._settings,
                acks="all",
                enable_idempotence=config.api_version is None or config.api_version >= (0, 11),
                linger_ms=2,
                max_request_size=MAX_RECORD,
                delivery_timeout_ms=int(config.delivery_timeout_s * 1000),
                max_block_ms=int(config.request_timeout_s * 1000),
                allow_auto_create_topics=False,
            )
            self.log_id = str(self._admin.describe_cluster()["cluster_id"])

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._producer.close(timeout=5)
        with self._reading:
            self._consumer.close()
        self._admin.close()

    # topics

    def ensure_topic(self, topic: str, partitions: int) -> None:
        """As contract; also raises ConfigError when the brokers do not let us make it."""
        name = self._name(topic)
        with translated(self.config, f"topic {name}"):
            found = self._partitions(name)
            if not found:
                self._create(name, topic, partitions)
                found = self._await(name)
        if found != partitions:
            raise ConfigError(
                f"Kafka ({self._where}): topic {name} has {found} partitions, config says log.partitions = {partitions}; "
                "set it to that, or name other topics with log.kafka.topic_prefix"
            )

    def partitions(self, topic: str) -> int:
        with translated(self.config, f"topic {topic}"):
            found = self._partitions(self._name(topic))
        if not found:
            raise NotFound(f"Kafka ({self._where}): no topic {self._name(topic)}; a role that writes it makes it at its start")
        return found

    def _partitions(self, name: str) -> int:
        with self._reading:
            return len(self._consumer.partitions_for_topic(name) or ())

    def _create(self, name: str, topic: str, partitions: int) -> None:
        settings = {"min.insync.replicas": str(self.config.min_insync)}
        if topic in COMPACTED:
            settings["cleanup.policy"] = "compact"
        wanted = {name: {"num_partitions": partitions, "replication_factor": self.config.replication, "configs": settings}}
        try:
            self._admin.create_topics(wanted)
        except kafka_errors.TopicAlreadyExistsError:
            logger.info("topic %s was made by another role", name)
        except (kafka_errors.InvalidReplicationFactorError, kafka_errors.PolicyViolationError) as e:
            raise ConfigError(
                f"Kafka ({self._where}): topic {name} with log.kafka.replication = {self.config.replication}: {e}; "
                "set it to at most the number of brokers, or make the topic by hand"
            ) from e

    def _await(self, name: str) -> int:
        """A topic is there once its metadata has come round."""
        deadline = time.monotonic() + self.config.request_timeout_s
        while not (found := self._partitions(name)):
            if time.monotonic() > deadline:
                raise Retryable(f"Kafka ({self._where}): topic {name} was made, but no broker tells of it", after_s=2.0, on="broker")
            time.sleep(0.1)
        return found

    # writing

    def append(self, records: Sequence[NewRecord]) -> list[tuple[int, int]]:
        counts = {topic: self.partitions(topic) for topic in {r.topic for r in records}}
        placed = [(r, partition_of(r.key, counts[r.topic]) if r.partition is None else r.partition) for r in records]
        for record, partition in placed:
            if not 0 <= partition < counts[record.topic]:
                raise NotFound(f"Kafka ({self._where}): no partition {partition} of topic {self._name(record.topic)}")
        with translated(self.config, "append"):
            futures = [self._producer.send(self._name(r.topic), key=r.key, value=_value(r), partition=p) for r, p in placed]
            done = [self._acknowledged(future) for future in futures]
        positions = [(partition, meta.offset) for (_, partition), meta in zip(placed, done, strict=True)]
        with self._reading:  # what we wrote, we can read at once
            for (record, partition), (_, offset) in zip(placed, positions, strict=True):
                place = TopicPartition(self._name(record.topic), partition)
                self._ends[place] = max(self._ends.get(place, 0), offset + 1)
        return positions

    def _acknowledged(self, future: Any) -> Any:
        """Watch over the oldest send that is not resolved: kafka-python has been seen to spin for ever where its own time limit is not looked at."""
        limit = self.config.delivery_timeout_s + self.config.request_timeout_s
        try:
            return future.get(timeout=limit)
        except kafka_errors.KafkaTimeoutError:
            if future.is_done:
                raise  # the producer's own verdict: not delivered in time
            raise Stuck(
                f"Kafka ({self._where}): a send is unresolved after {limit:g} s; the producer hangs, the process starts anew"
            ) from None

    # reading

    def read(self, topic: str, partition: int, offset: int, max_records: int) -> list[Record]:
        place = TopicPartition(self._name(topic), partition)
        with self._reading, translated(self.config, f"read {place.topic}/{partition}"):
            self._turn_to(place, offset)
            ahead = self._ahead[place]
            if not ahead:
                ahead.extend(
                    Record(topic, partition, r.offset, r.key or b"", r.value or b"", r.timestamp) for r in self._fetch(place, offset)
                )
            found = [ahead.popleft() for _ in range(min(max_records, len(ahead)))]
            if found:
                self._next[place] = found[-1].offset + 1
        return found

    def _turn_to(self, place: TopicPartition, offset: int) -> None:
        """Set the position; what was fetched ahead is kept if it is what comes next."""
        assigned = self._consumer.assignment()
        if place not in assigned:
            if place.partition >= self._partitions(place.topic):
                raise NotFound(f"Kafka ({self._where}): no partition {place.partition} of topic {place.topic}")
            self._consumer.assign([*assigned, place])
            self._consumer.pause(place)
        if self._next.get(place) != offset:
            self._consumer.seek(place, offset)
            self._next[place], self._ahead[place] = offset, deque()

    def _fetch(self, place: TopicPartition, offset: int) -> list[Any]:
        """What one fetch brings, whole.  kafka-python 3.0 never delivers again a paused partition of which it gave a part."""
        deadline = time.monotonic() + self.config.request_timeout_s
        self._consumer.resume(place)
        try:
            while offset < self._end(place):
                if got := self._consumer.poll(timeout_ms=100, max_records=EVERYTHING).get(place):
                    return list(got)
                if self._consumer.position(place) >= self._end(place, exact=True):
                    break  # nothing but records of transactions, or compacted away
                if time.monotonic() > deadline:
                    what = f"Kafka ({self._where}): {place.topic}/{place.partition} does not deliver offset {offset}"
                    raise Retryable(what, after_s=2.0, on="broker")
        except kafka_errors.OffsetOutOfRangeError:
            self._gap(place, offset)
        finally:
            self._consumer.pause(place)
        if offset > self._end(place) and offset > self._end(place, exact=True):
            self._gap(place, offset)
        return []

    def _end(self, place: TopicPartition, *, exact: bool = False) -> int:
        """Where a partition ends; asked for all at once, and believed for a moment."""
        if exact or place not in self._ends or time.monotonic() - self._ends_at > STALE_S:
            self._ends = self._offsets(self._consumer.end_offsets, {place, *self._consumer.assignment()})
            self._ends_at = time.monotonic()
        return self._ends[place]

    def _gap(self, place: TopicPartition, offset: int) -> None:
        first, end = self._bounds(place)
        if offset > end:
            raise OffsetGap(
                f"Kafka ({self._where}): {place.topic}/{place.partition} ends at {end}, asked for {offset}: the topic was cut off or made anew. "
                "Restore it; if it was made anew on purpose, raise log.kafka.epoch"
            )
        raise OffsetGap(
            f"Kafka ({self._where}): {place.topic}/{place.partition} begins at {first}, asked for {offset}; {offset} to {first - 1} are gone. "
            "Give the topic a longer retention.ms; to accept the loss, raise log.kafka.epoch or move the catalog's position by hand"
        )

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        place = TopicPartition(self._name(topic), partition)
        with self._reading, translated(self.config, f"bounds of {place.topic}/{partition}"):
            if partition >= self._partitions(place.topic):
                raise NotFound(f"Kafka ({self._where}): no partition {partition} of topic {place.topic}")
            return self._bounds(place)

    def _bounds(self, place: TopicPartition) -> tuple[int, int]:
        first = self._offsets(self._consumer.beginning_offsets, {place})[place]
        return first, self._offsets(self._consumer.end_offsets, {place})[place]

    def _offsets(self, ask: Callable[..., Any], places: set[TopicPartition]) -> dict[TopicPartition, int]:
        deadline = time.monotonic() + self.config.request_timeout_s
        while time.monotonic() < deadline:
            try:
                left_ms = int(1000 * (deadline - time.monotonic()))
                return {place: int(offset) for place, offset in ask(list(places), timeout_ms=max(1, min(OFFSETS_MS, left_ms))).items()}
            except KeyError as e:  # kafka-python 3.0 forgets a partition whose broker was not ready
                logger.info("the offsets of %s were not told; asking again", e)
            except kafka_errors.KafkaTimeoutError:  # and asks a broker that leads no more over and over, but never who leads now
                logger.info("the offsets of %s were not told in time; asking who leads", sorted(places))
                self._consumer.topics()
        raise Retryable(f"Kafka ({self._where}): no broker tells the offsets of {sorted(places)}", after_s=1.0, on="broker")

    def latest(self, topic: str, key: bytes) -> bytes | None:
        with self._reading:
            return self._up_to_date(topic, partition_of(key, self.partitions(topic))).get(key)

    def table(self, topic: str) -> dict[bytes, bytes]:
        with self._reading:
            self._ends_at = 0.0  # what another has appended a moment ago counts
            return {k: v for p in range(self.partitions(topic)) for k, v in self._up_to_date(topic, p).items()}

    def _up_to_date(self, topic: str, partition: int) -> dict[bytes, bytes]:
        """Reads on from where it stood, so a second look costs only what is new."""
        at, values = self._newest.setdefault((topic, partition), (self.bounds(topic, partition)[0], {}))
        while records := self.read(topic, partition, at, 1000):
            for record in records:
                if record.value:
                    values[record.key] = record.value
                else:
                    values.pop(record.key, None)
            at = records[-1].offset + 1
        self._newest[topic, partition] = (at, values)
        return values

    def trim(self, topic: str, partition: int, before: int) -> int:
        first, end = self.bounds(topic, partition)
        before = min(before, end)
        if before > first:
            with translated(self.config, f"trim {topic}/{partition}"):
                self._admin.delete_records({TopicPartition(self._name(topic), partition): before})
        return max(0, before - first)

    # groups

    def subscribe(self, group: str, topics: Sequence[str]) -> Subscription:
        with translated(self.config, f"group {group}"):
            member = self._group(group)
            member.join({self._name(topic): topic for topic in topics})
        return member

    def commit(self, group: str, offsets: Mapping[tuple[str, int], int]) -> None:
        """A group that has just been shared out anew refuses the offsets of its former owners.  That is harmless: the new owner finds
        the offset behind the catalog's position, and does over what belongs to it."""
        wanted = {TopicPartition(self._name(t), p): OffsetAndMetadata(end, "", -1) for (t, p), end in offsets.items()}
        with translated(self.config, f"commit of group {group}"):
            try:
                self._group(group).commit(wanted)
            except (kafka_errors.CommitFailedError, kafka_errors.RebalanceInProgressError, kafka_errors.IllegalGenerationError) as e:
                logger.info("offsets %s of group %s not taken: %s", offsets, group, e)

    def committed(self, group: str, topic: str, partition: int) -> int | None:
        with translated(self.config, f"offsets of group {group}"):
            return self._group(group).committed(TopicPartition(self._name(topic), partition))

    def _group(self, name: str) -> Group:
        if name not in self._groups:
            self._groups[name] = Group(self._settings, self._name(name), self.config)
        return self._groups[name]

    def _name(self, topic: str) -> str:
        return self.config.topic_prefix + topic

    @property
    def _request_ms(self) -> int:
        return int(self.config.request_timeout_s * 1000)


def _value(record: NewRecord) -> bytes | None:
    """None is what the brokers compact a key away for."""
    return (record.value or None) if record.topic in COMPACTED else record.value
