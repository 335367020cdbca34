"""Who gets what in a consumer group: partition numbers are dealt out, not partitions.

A key has the same partition number in every topic, so whoever has a number must have it of every topic: then all that concerns a key (the
requests to a host, DESIGN.md) has one owner.  The cooperative-sticky assignor alone would give `candidates` 3 to one member and `retry.0` 3 to
another; the range assignor would keep them together, but it takes everything from everybody at each change.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from kafka.cluster import ClusterMetadata
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment, ConsumerProtocolSubscription


@dataclass(frozen=True)
class _Member:
    """As kafka-python hands them over."""

    member_id: str
    metadata: Any


class ByNumber(CooperativeStickyAssignor):  # type: ignore[misc]  # kafka-python has no annotations
    """Cooperative and sticky, on the numbers of one topic; the other topics follow."""

    name = "streamlearn-by-number"

    def assign(self, cluster: ClusterMetadata, members: list[Any]) -> dict[str, Any]:
        counts = {topic: len(cluster.partitions_for_topic(topic) or ()) for member in members for topic in member.metadata.topics}
        model = max(sorted(counts), key=counts.__getitem__)
        claims = {member.member_id: _numbers(member.metadata.owned_partitions) for member in members}
        claimed = Counter(number for numbers in claims.values() for number in numbers)
        contested = {number for number, times in claimed.items() if times > 1}  # by one that was taken for dead: it has not heard of it
        reduced = [_Member(member.member_id, self._claim(model, claims[member.member_id] - contested)) for member in members]
        dealt = super().assign(cluster, reduced)
        found = {}
        for member in members:
            numbers = sorted({place.partition for place in dealt[member.member_id].partitions()} - contested)  # until all have let go
            places = [(topic, [n for n in numbers if n < counts[topic]]) for topic in sorted(member.metadata.topics)]
            found[member.member_id] = ConsumerProtocolAssignment(self.version, [(t, ns) for t, ns in places if ns], b"")
        return found

    def forget(self) -> None:
        """We were taken for dead: what we owned, we do not claim."""
        self.member_assignment = None

    def _claim(self, topic: str, numbers: set[int]) -> Any:
        place = ConsumerProtocolSubscription.TopicPartition(topic=topic, partitions=sorted(numbers))
        return ConsumerProtocolSubscription(version=self.version, topics=[topic], user_data=b"", owned_partitions=[place])


def _numbers(owned: Any) -> set[int]:
    return {number for place in owned or () for number in place.partitions}
