"""What a role says of itself: its last heartbeat (one small file) and its history (append-only JSON lines).

Heartbeats are for the terminal view and `streamlearn status`, histories for the report.  Neither is ever read back by the
role itself: losing them loses pictures, not work.
"""

import json
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamlearn.contract import durable
from streamlearn.contract.errors import StoreFull


def now() -> str:
    """RFC 3339, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Heartbeat:
    """One role's voice.  A full disk mutes it; the work decides for itself what a full disk means."""

    def __init__(self, home: Path, role: str, *, period_s: float = 0.5):
        self.role, self.period_s = role, period_s
        self._status, self._history = home / "status" / f"{role}.json", home / "history" / f"{role}.jsonl"
        self._values: dict[str, Any] = {}
        self._last = self._spoke = time.monotonic() - period_s

    def beat(self, *, force: bool = False, **values: Any) -> None:
        """Merge `values` into what is known and write it, at most every `period_s` seconds unless forced."""
        self._values |= values
        self._spoke = time.monotonic()
        if not force and time.monotonic() - self._last < self.period_s:
            return
        self._last = time.monotonic()
        status = {"role": self.role, "pid": os.getpid(), "at": now()} | self._values
        # plain replace, no fsync: a heartbeat lost to power failure is stale anyway, and 2/s of fsync is not free
        try:
            self._status.parent.mkdir(parents=True, exist_ok=True)
            tmp = self._status.with_suffix(f".{os.getpid()}-{threading.get_native_id()}.tmp")  # several evaluators may serve one home
            tmp.write_text(json.dumps(status))
            tmp.replace(self._status)
        except OSError as e:
            if not isinstance(durable.translate(e, self._status), StoreFull):
                raise

    def said(self) -> tuple[dict[str, Any], float]:
        """The last words, and seconds since."""
        return dict(self._values), time.monotonic() - self._spoke

    def history(self, **values: Any) -> None:
        """Append one measurement."""
        try:
            durable.append_line(self._history, json.dumps({"at": now()} | values))
        except StoreFull as e:
            self.beat(unwritten=str(e))
        else:
            if self._values.pop("unwritten", None):
                self.beat()


def read_status(home: Path) -> dict[str, dict[str, Any]]:
    """Role -> its last heartbeat.  A half-written file counts as none."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((home / "status").glob("*.json")):
        try:
            value = json.loads(path.read_text())
        except (ValueError, FileNotFoundError):
            continue  # replaced while we looked
        if isinstance(value, dict):
            found[path.stem] = value
    return found
