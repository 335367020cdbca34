"""A round: what is learnt at once, and in which order.  All pure: the planner (plan.py) writes records down, this says what they mean.

The order of a round's slots follows from (seed, round number, record) and the reservoir, which follows from the records before.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.stream.keys import U64, draws, key, mix, permutation
from streamlearn.stream.replay import Reservoir


@dataclass(frozen=True, slots=True)
class Shard:
    """What a round needs to know of one shard."""

    number: int  # in the order of learning
    key: str
    sha256: str
    place: str  # topic/partition
    end: int  # offset
    samples: int
    fetched: tuple[str, str]  # first and last
    skip: int = 0  # samples learnt before, from shards that were merged into this one

    def to_row(self) -> list[Any]:
        row = [self.number, self.key, self.sha256, self.place, self.end, self.samples, *self.fetched]
        return [*row, self.skip] if self.skip else row

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> "Shard":
        number, name, sha256, place, end, samples, first, last, *skip = row
        return cls(number, name, sha256, place, end, samples, (first, last), *skip)


@dataclass(frozen=True)
class Round:
    """A recorded round."""

    number: int
    batch: int
    slots: int
    shards: tuple[Shard, ...]
    gone: tuple[tuple[int, int], ...] = ()  # (shard number, index) of what leaves the reservoir before it is drawn from
    unseen: int = 0  # samples that expired before they were learnt
    alive: int = -1  # samples learnt in rounds before that are neither taken down nor expired; -1: a record of before this was kept
    evicted: tuple[int, ...] = ()  # places in the reservoir, less `gone`, of what MinRed lets go
    cap: int = 0  # replays of one sample, at most; 0: any number

    @property
    def fresh(self) -> int:
        return sum(s.samples - s.skip for s in self.shards)

    @property
    def batches(self) -> int:
        return self.slots // self.batch

    def to_json(self) -> bytes:
        raw: dict[str, Any] = {"round": self.number, "batch": self.batch, "slots": self.slots}
        raw["shards"] = [s.to_row() for s in self.shards]
        if self.gone:
            raw["gone"] = [list(ref) for ref in self.gone]
        if self.evicted:
            raw["evicted"] = list(self.evicted)
        raw |= {name: value for name, value in (("unseen", self.unseen), ("cap", self.cap)) if value}
        if self.alive >= 0:
            raw["alive"] = self.alive
        return json.dumps(raw, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Round":
        try:
            raw = json.loads(data)
            shards = tuple(Shard.from_row(row) for row in raw["shards"])
            gone = tuple((int(number), int(index)) for number, index in raw.get("gone", ()))
            evicted = tuple(int(place) for place in raw.get("evicted", ()))
            more = (raw.get("unseen", 0), raw.get("alive", -1), evicted, raw.get("cap", 0))
            return cls(raw["round"], raw["batch"], raw["slots"], shards, gone, *more)
        except (ValueError, KeyError, TypeError, IndexError) as e:
            raise Corrupt(f"{where}: not a round record: {e}; restore it from a backup") from e


@dataclass(frozen=True)
class Slots:
    """The slots of one round in their order."""

    refs_N2: NDArray[np.int64]  # shard number, index in the shard
    fresh_N: NDArray[np.bool_]
    keys_N: U64  # of the augmentations


def fresh_refs(round_: Round) -> NDArray[np.int64]:
    parts = [np.stack([np.full(s.samples - s.skip, s.number), np.arange(s.skip, s.samples)], axis=1) for s in round_.shards]
    return np.concatenate([np.empty((0, 2), np.int64), *parts])


def order(seed: int, round_: Round, reservoir: Reservoir) -> Slots:
    """Every fresh sample once, replay draws in the other slots, all shuffled over the whole round."""
    own = fresh_refs(round_)
    pool = reservoir.refs_N2 if len(reservoir) else own
    refs = np.concatenate([own, pool[replayed(seed, round_, reservoir)]])
    at = permutation(key(seed, round_.number, "order"), round_.slots)
    return Slots(refs[at], at < len(own), draws(key(seed, round_.number, "augment"), round_.slots))


def replayed(seed: int, round_: Round, reservoir: Reservoir) -> NDArray[np.int64]:
    """The replay draws, as places in the pool: the reservoir, or in the very first round the round's own samples."""
    pool, count = len(reservoir) or round_.fresh, round_.slots - round_.fresh
    if not pool and count:
        raise Corrupt(f"round {round_.number}: {round_.slots} slots, but neither fresh samples nor a reservoir")
    k = key(seed, round_.number, "replay")
    if not round_.cap:
        return (draws(k, count) % np.uint64(max(1, pool))).astype(np.int64)
    uses = reservoir.uses_N if len(reservoir) else np.zeros(pool, np.int64)
    left = np.cumsum(np.maximum(0, round_.cap - uses))  # each sample has a ticket for every replay that it may still have
    tickets = different(k, min(count, int(left[-1]) if pool else 0), int(left[-1]) if pool else 0)
    drawn = np.searchsorted(left, tickets, side="right")
    # the planner asks for more than there are tickets only to fill up the last batch
    rest = (draws(key(seed, round_.number, "rest"), count - len(drawn)) % np.uint64(max(1, pool))).astype(np.int64)
    return np.concatenate([drawn, rest])


def different(k: np.uint64, count: int, total: int) -> NDArray[np.int64]:
    """`count` different numbers below `total`, every choice as likely as another, in the order in which they were drawn."""
    if 2 * count >= total:
        return permutation(k, total)[:count]
    tries = 2 * count
    while True:  # draws are counter-based: more of them begin with the same ones
        drawn, first = np.unique(draws(k, tries) % np.uint64(total), return_index=True)
        if len(drawn) >= count:
            return drawn[np.argsort(first)][:count].astype(np.int64)
        tries *= 2


def part_of_batch(batch: int, rank: int, ranks: int) -> slice:
    """Which slots of each batch are one rank's.  Raises ConfigError."""
    if batch % ranks:
        raise ConfigError(
            f"train.batch = {batch} cannot be shared out among {ranks} ranks; set it to a multiple, or start another number of them"
        )
    return slice(rank * batch // ranks, (rank + 1) * batch // ranks)


def substitute(seed: int, round_: int, slot: int, attempt: int, pool_N2: NDArray[np.int64]) -> tuple[int, int]:
    """A replay draw for a slot whose sample is lost or gone: a function of the slot's place and of the pool alone."""
    at = int(mix(np.array(attempt, np.uint64) ^ key(seed, round_, "substitute", slot)) % np.uint64(len(pool_N2)))
    return int(pool_N2[at][0]), int(pool_N2[at][1])
