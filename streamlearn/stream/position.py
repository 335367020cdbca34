"""Where the stream stands: a small value that goes into the checkpoint, and how the rounds move it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.stream.moved import Moves
from streamlearn.stream.replay import Reservoir
from streamlearn.stream.rounds import Round, fresh_refs, replayed
from streamlearn.stream.table import Table

FORM = 2  # of the state; 1 had no number, and a table of rows


@dataclass(frozen=True)
class Position:
    """Immutable."""

    round: int  # number of the current round
    place: int  # next batch in it
    record: Round | None  # None: not planned yet
    cursor: Mapping[str, int]  # topic/partition -> offset, up to the end of the round before
    reservoir: Reservoir  # before the round
    table: Table  # of the shards that the reservoir points into
    next_shard: int  # number of the next shard to be learnt
    fresh: int  # samples learnt as fresh, up to the round before
    replay: int
    window: tuple[str, str] = ("", "")  # first and last fetch of anything learnt
    unseen: int = 0  # samples that expired before they were learnt, up to the round before

    @classmethod
    def start(cls, config: StreamConfig) -> "Position":
        return cls(0, 0, None, {}, Reservoir(config.seed, config.reservoir, config.replay), Table.of(()), 0, 0, 0)

    def to_state(self) -> dict[str, Any]:
        """Plain values and tensors; made for every batch, so it copies no column."""
        return {
            "form": FORM,
            "round": self.round,
            "place": self.place,
            "record": self.record.to_json().decode() if self.record else "",
            "cursor": dict(self.cursor),
            "reservoir": self.reservoir.state_dict(),
            "table": self.table.state_dict(),
            "next_shard": self.next_shard,
            "fresh": self.fresh,
            "replay": self.replay,
            "window": list(self.window),
            "unseen": self.unseen,
        }

    @classmethod
    def from_state(cls, config: StreamConfig, saved: Mapping[str, Any]) -> "Position":
        """Raises ConfigError where this version or configuration cannot go on from it."""
        if saved.get("form", 1) > FORM:
            raise ConfigError(
                f"the checkpoint's stream state has form {saved['form']}, this version knows up to {FORM}: "
                "a newer streamlearn wrote it; install that one, or use a new home"
            )
        return cls(
            int(saved["round"]),
            int(saved["place"]),
            Round.from_json(saved["record"].encode(), "checkpoint") if saved["record"] else None,
            dict(saved["cursor"]),
            Reservoir.from_state(config.seed, config.reservoir, config.replay, saved["reservoir"]),
            Table.from_state(saved["table"]),
            int(saved["next_shard"]),
            int(saved["fresh"]),
            int(saved["replay"]),
            (saved["window"][0], saved["window"][1]),
            int(saved.get("unseen", 0)),
        )


def begun(position: Position, round_: Round) -> Position:
    """Before the round's first batch: what is gone leaves the reservoir, for every resumed run at this very place."""
    return replace(position, record=round_, reservoir=position.reservoir.without(round_.gone, round_.alive, round_.evicted))


def finished(position: Position) -> Position:
    """After the round's last batch: cursor and reservoir move on."""
    round_ = position.record
    assert round_ is not None
    reservoir, own = position.reservoir, fresh_refs(round_)
    drawn = replayed(reservoir.seed, round_, reservoir)
    if len(reservoir):
        reservoir = reservoir.replayed(drawn).admitted(own)
    else:  # they were drawn from the round itself
        reservoir = reservoir.admitted(own, np.bincount(drawn, minlength=len(own)))
    fetched = [f for s in round_.shards for f in s.fetched if f] + [f for f in position.window if f]
    return Position(
        round=position.round + 1,
        place=0,
        record=None,
        cursor=dict(position.cursor) | {s.place: s.end for s in round_.shards},
        reservoir=reservoir,
        table=position.table.with_(round_.shards).only(reservoir.refs_N2[:, 0]),
        next_shard=position.next_shard + len(round_.shards),
        fresh=position.fresh + round_.fresh,
        replay=position.replay + round_.slots - round_.fresh,
        window=(min(fetched, default=""), max(fetched, default="")),
        unseen=position.unseen + round_.unseen,
    )


def pool_of(position: Position, moves: Moves) -> NDArray[np.int64]:
    """What may stand in for a sample that is lost or gone: the reservoir's samples, less those that are gone too."""
    refs = position.reservoir.refs_N2
    if not len(refs) and position.record:
        refs = fresh_refs(position.record)
    table = position.table.with_(position.record.shards if position.record else ())
    return refs[~moves.gone(table, refs)]
