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

On load each checkpoint of the pointer is tried, newest first; one whose bytes do not match its digest, or that cannot be read,
is refused with its reason and the one before is used.  A full disk fails the attempt, not the training.
"""

import copy
import hashlib
import io
import json
import logging
import threading
from typing import Any

import torch

from streamlearn.contract.errors import Corrupt, NotFound, StoreFull
from streamlearn.contract.object_store import ObjectStore

POINTER = "checkpoints/latest.json"
logger = logging.getLogger(__name__)


class Checkpoints:
    """One writer at a time; `save` waits for the one before."""

    def __init__(self, store: ObjectStore, *, keep: int):
        self.store, self.keep = store, keep
        self.failures = 0
        self.last_step = -1  # of the newest committed checkpoint
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
        known = self._entries()
        self._write(_copy(state), step, True, [e for e in known if e["step"] < step])
        listed = [e["key"] for e in self._entries()]
        for entry in known:
            if entry["key"] not in listed:
                self.store.delete(entry["key"])

    def load(self, *, sound_at: int | None = None) -> dict[str, Any] | None:
        """The newest whole state, or the newest that was sound, up to step `sound_at`; None when there is none.  Raises Corrupt when all are
        damaged."""
        entries, reasons = self._entries(), []
        if sound_at is not None:
            entries = [e for e in entries if e.get("sound", True) and e["step"] <= sound_at]
        for entry in entries:
            try:
                state = self._read(entry)
            except (Corrupt, NotFound) as e:
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
            self._write(state, step, sound, self._entries())
        except StoreFull as e:
            self.failures += 1
            logger.error("checkpoint of step %d not written: %s", step, e)
        except BaseException as e:  # handed to the training thread by wait()
            self._error = e

    def _write(self, state: dict[str, Any], step: int, sound: bool, known: list[dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"checkpoints/{step:012d}-{sha256[:12]}.pt"
        self.store.put(key, data)
        before = [e for e in known if e["key"] != key]
        entries = [{"key": key, "sha256": sha256, "bytes": len(data), "step": step, "sound": sound}, *before]
        kept, rest = entries[: self.keep], entries[self.keep :]
        if not any(e.get("sound", True) for e in kept):
            kept += [e for e in rest if e.get("sound", True)][:1]
        self.store.put(POINTER, json.dumps({"checkpoints": kept}, indent=1).encode())
        self.last_step = step
        for entry in rest:
            if entry not in kept:
                self.store.delete(entry["key"])

    def _entries(self) -> list[dict[str, Any]]:
        try:
            found: list[dict[str, Any]] = json.loads(self.store.get(POINTER))["checkpoints"]
        except NotFound:
            return []
        except (ValueError, KeyError, TypeError) as e:
            raise Corrupt(f"{POINTER}: not a checkpoint pointer: {e}; restore it from a backup") from e
        return found

    def _read(self, entry: dict[str, Any]) -> dict[str, Any]:
        data = self.store.get(entry["key"])
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise Corrupt(f"{entry['key']}: {len(data)} bytes do not match sha256 {entry['sha256'][:12]}… of {entry['bytes']} bytes")
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return state


def _copy(value: Any) -> Any:
    """Tensors cloned, containers rebuilt: the training may go on changing its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(v) for v in value)
    return copy.copy(value)
