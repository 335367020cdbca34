"""What a connector is: a source of candidates with a cursor.  How to write one: docs/connectors.md.

`discover` is a generator of (candidates, cursor, refused): everything that is there now, in batches, never waiting for more.  The
runner appends each batch's candidates, then its cursor; `discover` is called again with the last cursor after `poll_s`.
A cursor is a small JSON value; what it means is the connector's own business.  A batch that is discovered again after a crash must name
its candidates as before (url, source_ref, etag), so that none is announced twice.

One instance belongs to one thread; only `check` may be called before that, by others.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Section
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.event_log import SOURCE_STATE

Cursor = dict[str, Any]
BATCH = 500  # candidates in one append
LOCAL = "a path of this machine"
LocalPath = Annotated[str, LOCAL]  # an option of this type is relative to the file that holds it, and made absolute when that is read


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
    Options: ClassVar[type[Section]]  # its own keys: frozen, strict, nothing unknown

    def __init__(self, name: str, options: Any) -> None:
        """Keeps its name (every candidate's `source`) and its Options.  Touches nothing outside."""

    def check(self) -> None:
        """Raises ConfigError for what the user must mend, before anything is changed."""

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        """What is there beyond the cursor; from the beginning where it is None.  Raises Retryable for what may pass."""

    def close(self) -> None:
        """Let go of what `check` and `discover` opened.  Called once, also after a fault; no call follows it."""


@runtime_checkable
class Answers(Protocol):
    """A connector that answers requests.  Before its first `discover` it is given whom to tell of each: HTTP status, seconds it took."""

    answered: Callable[[int, float], None]


def dump(state: dict[str, Any]) -> bytes:
    return json.dumps(state, separators=(",", ":")).encode()


def load(name: str, data: bytes | None) -> tuple[Cursor | None, dict[int, int]] | None:
    """The cursor of a connector, and the ends of the candidates' partitions when it was recorded.  Raises ConfigError for anything else."""
    if data is None:
        return None
    try:
        state = json.loads(data)
        cursor, ends = state["cursor"], {int(p): int(end) for p, end in state["ends"].items()}
        if not isinstance(cursor, dict | None):
            raise TypeError("cursor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ConfigError(
            f"connector {name}: the topic {SOURCE_STATE} holds {data[:200]!r}, which is no cursor with its ends: another version or somebody "
            f"else wrote it. Run the version that did; or begin anew, and announce everything again: stop the connector and DELETE "
            f"/connectors/{name}/offsets, or give it another name"
        ) from e
    return cursor, ends
