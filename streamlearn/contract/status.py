"""What a role says of itself: its last heartbeat (one small file) and its history (append-only JSON lines).

Heartbeats are for the terminal view and `streamlearn status`, histories for the report.  Neither is ever read back by the
role itself: losing them loses pictures, not work.

A heartbeat says whose process numbers its `pid` is one of: those of a kernel's run and a pid namespace (a container has its own), on a host.
Whoever reads it elsewhere cannot look whether the process is there, and goes by the heartbeat's age.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streamlearn.contract import durable
from streamlearn.contract.errors import StoreFull

SILENT_S = 120.0  # without a heartbeat; the longest step of any role is well under it
NOT_READY = {"starting", "waiting", "failed", "stopped"}  # states
BOOT = Path("/proc/sys/kernel/random/boot_id")


def now() -> str:
    """RFC 3339, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def pids() -> str:
    """Which process numbers are ours; "" where the system does not tell."""
    try:
        return f"{BOOT.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def elsewhere(beat: Mapping[str, Any]) -> str:
    """The host that a heartbeat comes from, if its process cannot be seen from here; else ""."""
    return str(beat.get("host") or "another host") if beat.get("pids", pids()) != pids() else ""


def age_s(beat: Mapping[str, Any]) -> float:
    """Since a heartbeat was written, by this machine's clock; infinite where it does not say when."""
    try:
        then = datetime.fromisoformat(str(beat.get("at")))
    except ValueError:
        return float("inf")
    return round(max(0.0, (datetime.now(UTC) - then).total_seconds()), 1)


def judged(values: Mapping[str, Any], silent_s: float) -> tuple[bool, bool]:
    """(whether a role that spoke so long ago is alive, whether it makes progress)."""
    alive = silent_s < SILENT_S
    return alive, alive and values.get("state") not in NOT_READY and not values.get("unwritten")


class Heartbeat:
    """One role's voice.  A full disk mutes it; the work decides for itself what a full disk means."""

    def __init__(self, home: Path, role: str, *, period_s: float = 0.5, mute: bool = False):
        """`mute`: it writes nothing; one of many processes of a role speaks for all."""
        self.role, self.period_s, self.mute = role, period_s, mute
        self._status, self._history = home / "status" / f"{role}.json", home / "history" / f"{role}.jsonl"
        self._values: dict[str, Any] = {}
        self._from = {"host": socket.gethostname(), "pids": pids()}
        self._last = self._spoke = time.monotonic() - period_s

    def beat(self, *, force: bool = False, **values: Any) -> None:
        """Merge `values` into what is known and write it, at most every `period_s` seconds unless forced."""
        self._values |= values
        self._spoke = time.monotonic()
        if self.mute or (not force and time.monotonic() - self._last < self.period_s):
            return
        self._last = time.monotonic()
        status = {"role": self.role, "pid": os.getpid(), **self._from, "at": now()} | self._values
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
        if self.mute:
            return
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
