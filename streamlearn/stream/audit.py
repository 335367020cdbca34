"""What a learner that stands at a given state has learnt, from the recorded rounds alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.object_store import ObjectStore
from streamlearn.stream.position import Position, begun, finished
from streamlearn.stream.rounds import Round, order


@dataclass
class Learnt:
    """How often each sample was taken."""

    fresh: Counter[tuple[str, int]] = field(default_factory=Counter)  # (shard key, index)
    replay: Counter[tuple[str, int]] = field(default_factory=Counter)
    batches: int = 0


def audit(config: StreamConfig, store: ObjectStore, state: Mapping[str, Any]) -> Learnt:
    """Replay the plan from round 0 to `state`."""
    learnt, end = Learnt(), Position.from_state(config, state)
    position, names = Position.start(config), dict[int, str]()
    while position.round < end.round or (position.round == end.round and end.place):
        round_ = Round.from_json(store.get(f"rounds/{position.round:08d}.json"), f"round {position.round}")
        names |= {s.number: s.key for s in round_.shards}
        position = begun(position, round_)
        slots = order(config.seed, round_, position.reservoir)
        batches = end.place if position.round == end.round else round_.batches
        for (shard, index), fresh in zip(slots.refs_N2[: batches * round_.batch].tolist(), slots.fresh_N.tolist(), strict=False):
            (learnt.fresh if fresh else learnt.replay)[names[shard], index] += 1
        learnt.batches += batches
        if position.round == end.round:
            break
        position = finished(position)
    return learnt
