"""The rows that the cursor has still to pass, in the order of learning, kept up to date by what changes: no round looks at all of them."""

from bisect import insort
from collections.abc import Iterator, Mapping

from streamlearn.contract.catalog import LIVE, Changes, ShardRow
from streamlearn.stream.moved import Moves

Order = tuple[int, int, int, str]
FEW = 64  # rows that are put in their places one by one; more are sorted in


class Waiting:
    """Rows ahead of the cursor; behind it, only how many samples of each live row were learnt."""

    def __init__(self) -> None:
        self._rows: dict[str, ShardRow] = {}
        self._order: list[Order] = []  # of the rows, and of some that are there no longer
        self._front = 0  # entries before it are done with
        self._behind: dict[str, int] = {}  # samples of the live rows behind the cursor
        self._learnt = 0  # their sum

    def learn(self, changes: Changes, moves: Moves) -> None:
        """`moves` has learnt of them already."""
        for row in changes.ended:
            self._learnt -= self._behind.pop(row.key, 0)
            if moves.replaced(row.key):
                self._rows.pop(row.key, None)
        holes = [r for r in changes.ended if not moves.replaced(r.key)]  # their offsets are covered by nothing else
        more = [(r.committed, r.place, r.first_offset, r.key) for r in [*changes.live, *holes] if r.key not in self._rows]
        self._rows |= {r.key: r for r in [*changes.live, *holes]}
        if len(more) > FEW:
            self._order, self._front = sorted(self._order[self._front :] + more), 0
        else:
            for entry in more:
                insort(self._order, entry, lo=self._front)

    def learnt(self, cursor: Mapping[str, int], moves: Moves) -> int:
        """Samples behind the cursor that are neither taken down nor expired; what is wholly behind it is let go.

        Whole rows are learnt in their order, so all that the cursor has passed or divides (a merger of learnt and new rows) is in front.
        """
        divided = 0
        for row in list(self._passed(cursor)):
            at = cursor.get(f"{row.topic}/{row.partition}", 0)
            if row.end_offset <= at:
                del self._rows[row.key]
                if row.status == LIVE:
                    self._behind[row.key] = row.num_samples
                    self._learnt += row.num_samples
            elif row.status == LIVE:
                divided += moves.below(row, at)
        while self._front < len(self._order) and self._order[self._front][3] not in self._rows:
            self._front += 1
        if self._front > len(self._order) // 2:
            del self._order[: self._front]
            self._front = 0
        return self._learnt + divided

    def __iter__(self) -> Iterator[ShardRow]:
        before: Order | None = None
        for i in range(self._front, len(self._order)):
            entry = self._order[i]
            if entry[3] in self._rows and entry != before:  # a row that left and came back as a hole has two entries
                yield self._rows[entry[3]]
            before = entry

    def _passed(self, cursor: Mapping[str, int]) -> Iterator[ShardRow]:
        for row in self:
            if row.first_offset >= cursor.get(f"{row.topic}/{row.partition}", 0) and row.end_offset > row.first_offset:
                return
            yield row
