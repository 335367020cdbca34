"""Checkpoints: complete, private, verified.

  1. copy     the state, on the training thread; training goes on
  2. pack     its bytes, and their digest                       (writer thread)
  3. put      checkpoints/<step:012d>-<sha256[:12]>.pt         object store
  4. put      checkpoints/latest.json, the newest K with their digests        <- THE COMMIT POINT
  5. delete   the checkpoint that fell out of the newest K, unless no newer one was sound when it was written

Killed after   what is left                       who mends it
  1, 2         nothing
  3            an object the pointer lacks        the same step is taken again and writes the same key, or it stays as garbage
  4            one checkpoint too many            the next pass of step 5
  5            nothing

Of many ranks all write: steps 2 and 3 are those of sharded.py then, the pointer is the first rank's, and what any of them meets all of them raise.
What one process wrote many can read, and the reverse.

On load each checkpoint of the pointer is tried, newest first; one whose bytes do not match its digest, or that cannot be read,
is refused with its reason and the one before is used.  A full disk fails the attempt, not the training.
"""

import copy
import hashlib
import io
import json
import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from streamlearn.contract.errors import Corrupt, NotFound, StoreFull
from streamlearn.contract.object_store import POINTER, ObjectStore
from streamlearn.contract.status import now
from streamlearn.learn import sharded
from streamlearn.learn.ranks import TIMEOUT_S, Ranks

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Checkpoints:
    """One writer at a time; `save` waits for the one before."""

    def __init__(
        self, store: ObjectStore, *, keep: int, ranks: Ranks | None = None, timeout_s: float = TIMEOUT_S, parted: bool | None = None
    ):
        """A collective where there are many `ranks`, as is every method: they call it together.

        `parted`: write as sharded.py has it; None: where there are many.
        """
        self.store, self.keep, self.ranks = store, keep, ranks or Ranks()
        self.parted = self.ranks.world > 1 if parted is None else parted
        # of its own: the writers talk while the training goes on
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if self.ranks.world > 1 else None
        self.failures = 0
        self.last_step = -1  # of the newest committed checkpoint
        self.written: tuple[int, str] | None = None  # step and time (RFC 3339) of the newest that this process has committed
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: dict[str, Any], step: int, *, wait: bool = False, sound: bool = True) -> None:
        """Copy `state` and write it behind the training's back.  `wait`: return once it is committed or has failed.

        `sound`: as far as is known; what is not is loaded like any other, but is nothing to go back to.
        """
        self.wait()
        copied = _copy(state)
        self._writer = threading.Thread(target=self._guarded, args=(copied, step, sound), name="checkpoint-writer")
        self._writer.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until the writer is done.  Raises what it met, except a full disk, which is counted and tried again next time."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def replace(self, state: dict[str, Any], step: int) -> None:
        """Make `state` the newest checkpoint, and forget those of `step` and after it.  Raises StoreFull."""
        self.wait()
        self._write(_copy(state), step, True, forget=True)

    def load(self, *, sound_at: int | None = None, room: sharded.Room | None = None) -> dict[str, Any] | None:
        """The newest whole state, or the newest that was sound, up to step `sound_at`; None when there is none.  Raises Corrupt when all are
        damaged.  `room`: makes the tensors that a sharded one is read into, instead of whole ones on the CPU."""
        entries, reasons = self.ranks.told(self._entries() if self.ranks.first else []), list[str]()
        if sound_at is not None:
            entries = [e for e in entries if e.get("sound", True) and e["step"] <= sound_at]
        for entry in entries:
            try:
                data = self._together(partial(self._bytes, entry))
                state = self._together(partial(self._state, entry, data, room))
            except Corrupt as e:
                logger.error("checkpoint refused: %s; trying the one before", e)
                reasons.append(str(e))
                continue
            self.last_step = int(entry["step"])
            return state
        if reasons:
            raise Corrupt(
                "no sound checkpoint is left: " + "; ".join(reasons) + "; restore the store from a backup, or start with a new home"
            )
        return None

    def _guarded(self, state: dict[str, Any], step: int, sound: bool) -> None:
        try:
            self._write(state, step, sound)
        except StoreFull as e:
            self.failures += 1
            logger.error("checkpoint of step %d not written: %s", step, e)
        except BaseException as e:  # handed to the training thread by wait()
            self._error = e

    def _write(self, state: dict[str, Any], step: int, sound: bool, *, forget: bool = False) -> None:
        """`forget`: the pointer no longer names those of `step` and after it."""

        def commit(data: bytes, parts: list[str], kind: str = "json") -> None:
            self._commit(data, kind, {"step": step, "sound": sound} | ({"parts": parts} if parts else {}), forget)

        if self.parted:
            sharded.save(self.store, state, step, commit, self._group)
        else:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            commit(buffer.getvalue(), [], "pt")
        self.last_step, self.written = step, (step, now())

    def _commit(self, data: bytes, kind: str, entry: dict[str, Any], forget: bool) -> None:
        """Steps 3 to 5, of the index if it is a sharded one."""
        known, sha256 = self._entries(), hashlib.sha256(data).hexdigest()
        key = f"checkpoints/{entry['step']:012d}-{sha256[:12]}.{kind}"
        self.store.put(key, data)
        before = [e for e in known if e["key"] != key and not (forget and e["step"] >= entry["step"])]
        entries = [{"key": key, "sha256": sha256, "bytes": len(data), **entry}, *before]
        kept, rest = entries[: self.keep], entries[self.keep :]
        if not any(e.get("sound", True) for e in kept):
            kept += [e for e in rest if e.get("sound", True)][:1]
        self.store.put(POINTER, json.dumps({"checkpoints": kept}, indent=1).encode())
        named = {k for e in kept for k in _keys(e)}  # two of one step may share parts
        for gone in dict.fromkeys(k for e in known for k in _keys(e)):
            if gone not in named:
                self.store.delete(gone)

    def _entries(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads(self.store.get(POINTER))["checkpoints"]
        except NotFound:
            return []
        except (ValueError, KeyError, TypeError) as e:
            raise Corrupt(f"{POINTER}: not a checkpoint pointer: {e}; restore it from a backup") from e
        return found

    def _together(self, read: Callable[[], T]) -> T:
        """Raises Corrupt on every rank where any finds damage."""
        found, fault = list[T](), ""
        try:
            found.append(read())
        except (Corrupt, NotFound) as e:
            fault = str(e)
        if fault := next((f for f in self.ranks.said(fault) if f), ""):
            raise Corrupt(fault)
        return found[0]

    def _bytes(self, entry: dict[str, Any]) -> bytes:
        data = self.store.get(entry["key"])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise Corrupt(f"{entry['key']}: {len(data)} bytes do not match sha256 {entry['sha256'][:12]}… of {entry['bytes']} bytes")
        return data

    def _state(self, entry: dict[str, Any], data: bytes, room: sharded.Room | None) -> dict[str, Any]:
        if entry["key"].endswith(".json"):
            return sharded.load(self.store, entry["key"], data, room, self._group)
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return state


def _keys(entry: dict[str, Any]) -> list[str]:
    return [entry["key"], *entry.get("parts", ())]


def _copy(value: Any) -> Any:
    """Tensors cloned, containers rebuilt: the training may go on changing its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(v) for v in value)
    return copy.copy(value)
