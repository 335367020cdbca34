"""Membership in a consumer group: which partitions are ours, and the offsets that dashboards show.

A partition that the group takes back is not given to another before its owner has let go (contract/event_log.Subscription), because
kafka-python joins again, and so frees it, only when `on_partitions_revoked` has returned.  A member that was taken for dead is not waited
for; it must not begin anything once its last confirmed heartbeat is a session time-out ago (`sure`).
"""

import contextlib
import logging
import math
import threading
import time
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import MemberState

from streamlearn.adapters.kafka_assignor import ByNumber
from streamlearn.contract.config import KafkaConfig
from streamlearn.contract.errors import Stuck

JOIN_MS = 2000  # of one poll while the group shares out
LET_GO = 1 / 3  # of the session time-out: no heartbeat is sent while we wait for the owner to let go
NO_GENERATION = -1
logger = logging.getLogger(__name__)


class Group(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no annotations
    """One consumer that reads nothing: our membership in a group, kept alive by a thread of its own."""

    def __init__(self, settings: dict[str, Any], name: str, config: KafkaConfig):
        self.config = config
        self._lock = threading.RLock()
        self._topics: dict[str, str] = {}  # name at the brokers -> ours
        self._owned: frozenset[tuple[str, int]] = frozenset()
        self._leaving: frozenset[tuple[str, int]] = frozenset()  # taken back, and not let go of
        self._ours_now: frozenset[tuple[str, int]] = frozenset()  # the one without the other
        self._change = threading.Condition()  # of the three above
        self._confirmed = -math.inf  # monotonic: when we asked whether we are a member, and were told that we are
        self._generation = NO_GENERATION
        self._assignor = ByNumber()
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
            partition_assignment_strategy=(self._assignor,),
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
        return self._ours_now

    def hold_only(self, places: frozenset[tuple[str, int]]) -> None:
        with self._change:
            self._leaving &= places
            self._ours_now = self._owned - self._leaving
            self._change.notify_all()

    def sure(self) -> bool:
        heart = self._consumer._coordinator.heartbeat  # kafka-python's metrics have only when it was sent, not that it was answered
        sent = heart.last_send  # read first: an answer that comes between the two lines is one to a later question
        if heart.last_receive >= sent:
            self._confirmed = max(self._confirmed, sent)
        member = self._consumer.group_metadata()
        return bool(member.generation_id != NO_GENERATION and time.monotonic() - self._confirmed < self.config.session_timeout_s)

    def close(self) -> None:
        self._left.set()
        with self._change:
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join(10)
        with self._lock, contextlib.suppress(kafka_errors.KafkaError):  # leaving is a courtesy: the session times out by itself
            self._consumer.close(autocommit=False)
        self._owned = self._ours_now = frozenset()

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
                    began = time.monotonic()
                    settled = self._consumer.group_metadata().state is MemberState.STABLE
                    # kafka-python 3.0 throws a join away that completes while nobody polls, and joins again: while joining, do not look away
                    self._consumer.poll(timeout_ms=50 if settled else JOIN_MS)
                    generation = self._consumer.group_metadata().generation_id
                    if generation != self._generation:  # joined, within this poll
                        self._generation, self._confirmed = generation, max(self._confirmed, began)
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
        with self._change:
            self._owned |= self._ours(assigned)
            self._ours_now = self._owned - self._leaving
        logger.info("partitions taken: %s", sorted(self._owned))

    def on_partitions_revoked(self, revoked: list[TopicPartition]) -> None:
        self._take_back(revoked)
        with self._change:
            free = self._change.wait_for(lambda: self._left.is_set() or not self._leaving, LET_GO * self.config.session_timeout_s)
        if not free:
            logger.warning("partitions not let go of in time: %s", sorted(self._leaving))

    def on_partitions_lost(self, lost: list[TopicPartition]) -> None:
        self._assignor.forget()
        self._take_back(lost)

    def _take_back(self, places: list[TopicPartition]) -> None:
        with self._change:
            self._owned -= self._ours(places)
            self._leaving |= self._ours(places)
            self._ours_now = self._owned - self._leaving
        logger.info("partitions left: %s", sorted(self._owned))

    def _ours(self, places: list[TopicPartition]) -> frozenset[tuple[str, int]]:
        return frozenset((self._topics[p.topic], p.partition) for p in places)
