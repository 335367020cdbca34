"""Membership in a consumer group: which partitions are ours, and the offsets that dashboards show."""

import contextlib
import logging
import threading
import time
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState

from streamlearn.contract.config import KafkaConfig
from streamlearn.contract.errors import Stuck

JOIN_MS = 2000  # of one poll while the group shares out
logger = logging.getLogger(__name__)


class Group(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no annotations
    """One consumer that reads nothing: our membership in a group, kept alive by a thread of its own."""

    def __init__(self, settings: dict[str, Any], name: str, config: KafkaConfig):
        self.config = config
        self._lock = threading.RLock()
        self._topics: dict[str, str] = {}  # name at the brokers -> ours
        self._owned: frozenset[tuple[str, int]] = frozenset()
        self._asked = time.monotonic()
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._consumer = KafkaConsumer(
            **settings,
            group_id=name,
            enable_auto_commit=False,
            auto_offset_reset="none",
            allow_auto_create_topics=False,
            session_timeout_ms=int(config.session_timeout_s * 1000),
            heartbeat_interval_ms=int(config.session_timeout_s * 1000 / 6),
            max_poll_interval_ms=int(config.session_timeout_s * 1000),
            partition_assignment_strategy=(CooperativeStickyAssignor,),
        )

    def join(self, topics: dict[str, str]) -> None:
        with self._lock:
            self._topics = topics
            self._consumer.subscribe(sorted(topics), listener=self)
            self._asked = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._stay, name="kafka-group", daemon=True)
            self._thread.start()

    def owned(self) -> frozenset[tuple[str, int]]:
        """Raises Stuck where the membership has failed for good."""
        self._asked = time.monotonic()
        if self._error is not None:
            raise Stuck(f"Kafka: the membership of a group has failed: {type(self._error).__name__}: {self._error}") from self._error
        return self._owned

    def close(self) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join(10)
        with self._lock, contextlib.suppress(kafka_errors.KafkaError):  # leaving is a courtesy: the session times out by itself
            self._consumer.close(autocommit=False)
        self._owned = frozenset()

    def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata]) -> None:
        with self._lock:
            self._consumer.commit(offsets, timeout_ms=int(self.config.request_timeout_s * 1000))

    def committed(self, place: TopicPartition) -> int | None:
        with self._lock:
            found = self._consumer.committed(place, timeout_ms=int(self.config.request_timeout_s * 1000))
        return None if found is None else int(found)

    def _stay(self) -> None:
        """Poll for the sake of the group.  When the owner no longer asks what it owns, it hangs: stop, and the group shares its part out."""
        while not self._left.is_set():
            if time.monotonic() - self._asked > self.config.session_timeout_s:
                self._left.wait(0.2)
                continue
            try:
                with self._lock:
                    settled = self._consumer.group_metadata().state is MemberState.STABLE
                    # kafka-python 3.0 throws a join away that completes while nobody polls, and joins again: while joining, do not look away
                    self._consumer.poll(timeout_ms=50 if settled else JOIN_MS)
            except (kafka_errors.RetriableError, kafka_errors.RebalanceInProgressError, kafka_errors.InvalidRequestError) as e:
                logger.info("group: %s; joining again", e)
            except kafka_errors.KafkaError as e:
                self._error = e
                return
            if settled:
                self._left.wait(0.05)  # let commits in

    def on_partitions_assigned(self, assigned: list[TopicPartition]) -> None:
        for place in assigned:
            self._consumer.seek(place, 0)  # never read: a position only so that none is asked for
            self._consumer.pause(place)
        self._owned |= {(self._topics[p.topic], p.partition) for p in assigned}
        logger.info("partitions taken: %s", sorted(self._owned))

    def on_partitions_revoked(self, revoked: list[TopicPartition]) -> None:
        self._owned -= {(self._topics[p.topic], p.partition) for p in revoked}
        logger.info("partitions left: %s", sorted(self._owned))

    def on_partitions_lost(self, lost: list[TopicPartition]) -> None:
        self.on_partitions_revoked(lost)
