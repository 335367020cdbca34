"""What a connector is: a source of candidates with a cursor.

`discover` is a generator of (candidates, cursor, refused): everything that is there now, in batches, never waiting for more.  The
runner appends each batch's candidates, then its cursor; `discover` is called again with the last cursor after `poll_s`.
A cursor is a small JSON value; what it means is the connector's own business.  A batch that is discovered again after a crash must name
its candidates as before (url, source_ref, etag), so that none is announced twice.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from streamlearn.contract.candidate import Candidate

Cursor = dict[str, Any]
BATCH = 500  # candidates in one append


@dataclass
class Found:
    """One batch: everything between the cursor before and this one."""

    candidates: list[Candidate] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)  # (where in the source, what it was, why)
    cursor: Cursor = field(default_factory=dict)
    settled: Callable[[], None] | None = None  # called once the cursor is recorded: whoever pushed the batch may be told

    def __len__(self) -> int:
        return len(self.candidates) + len(self.refused)


class Connector(Protocol):
    def check(self) -> None:
        """Raises ConfigError for what the user must mend, before anything is changed."""

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        """What is there beyond the cursor.  Raises Retryable for what may pass."""


def dump(state: dict[str, Any]) -> bytes:
    return json.dumps(state, separators=(",", ":")).encode()


def load(data: bytes | None) -> dict[str, Any] | None:
    return None if data is None else dict(json.loads(data))
