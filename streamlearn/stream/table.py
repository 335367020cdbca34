"""Which shard a number means, in columns: a reservoir of 65,536 samples can lie in nearly as many shards."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlearn.stream.keys import among
from streamlearn.stream.rounds import Shard


@dataclass(frozen=True, eq=False)
class Table:
    """Shard numbers in rising order, with each one's key and digest.  Immutable."""

    numbers_N: NDArray[np.int64]
    keys_N: NDArray[np.bytes_]
    sha256_N: NDArray[np.bytes_]

    @classmethod
    def of(cls, shards: Iterable[tuple[int, str, str]]) -> "Table":
        """From (number, key, sha256), numbers rising."""
        rows = list(shards)
        numbers = np.array([number for number, _, _ in rows], np.int64)
        return cls(numbers, np.array([k.encode() for _, k, _ in rows], "S"), np.array([s.encode() for _, _, s in rows], "S"))

    def __len__(self) -> int:
        return len(self.numbers_N)

    def with_(self, shards: Sequence[Shard]) -> "Table":
        """With a round's shards, whose numbers are above all that are here."""
        if not shards:
            return self
        more = Table.of((s.number, s.key, s.sha256) for s in shards)
        return Table(*(np.concatenate(both) for both in zip(self._columns(), more._columns(), strict=True)))

    def only(self, numbers: NDArray[np.int64]) -> "Table":
        """Of these numbers, which are all here."""
        stay = np.zeros(len(self), bool)
        stay[np.searchsorted(self.numbers_N, numbers)] = True
        return self if stay.all() else Table(*(column[stay] for column in self._columns()))

    def has(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        return among(numbers, self.numbers_N)

    def get(self, number: int) -> tuple[str, str] | None:
        """(key, sha256)."""
        at = int(np.searchsorted(self.numbers_N, number))
        if at == len(self) or self.numbers_N[at] != number:
            return None
        return self.keys_N[at].decode(), self.sha256_N[at].decode()

    def numbers_in(self, keys: frozenset[bytes] | set[bytes]) -> list[tuple[int, str]]:
        """(number, key) of the shards that are among `keys`."""
        if not keys:
            return []
        return [(int(self.numbers_N[i]), name.decode()) for i, name in enumerate(self.keys_N.tolist()) if name in keys]

    def _columns(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        return self.numbers_N, self.keys_N, self.sha256_N

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": torch.from_numpy(self.numbers_N), "keys": _bytes(self.keys_N), "sha256": _bytes(self.sha256_N)}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any] | Sequence[Sequence[Any]]) -> "Table":
        if not isinstance(saved, Mapping):  # rows, as checkpoints had them before
            return cls.of(sorted((int(row[0]), row[1], row[2]) for row in saved))
        return cls(saved["numbers"].numpy(), _strings(saved["keys"]), _strings(saved["sha256"]))


def _bytes(column: NDArray[np.bytes_]) -> torch.Tensor:
    if not len(column):
        return torch.empty((0, 0), dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(column).view(np.uint8).reshape(len(column), -1))


def _strings(rows: torch.Tensor) -> NDArray[np.bytes_]:
    table = np.ascontiguousarray(rows.numpy())
    return table.view(f"S{max(1, table.shape[1])}").reshape(len(table)) if table.size else np.empty(len(table), "S1")
