"""Features on disk, one file for each (snapshot, bank, protocol): a probe that is asked again needs no forward pass.

Putting: 1. write the tensors, with a digest of them, under the key        <- THE COMMIT POINT (durable.write: whole or absent)
         2. delete the least lately used files until the budget is met

Killed after 1: over budget by one entry; the next put mends it.  Killed in the middle of 1: a .tmp file, deleted at the next start.  A file whose
bytes do not match its digest is deleted and counts as absent.  Several processes may use one folder: a file that another has deleted is absent.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from streamlearn.contract import durable
from streamlearn.contract.errors import StoreFull

LITTER_S = 3600.0  # after which an unfinished file has no writer any more
logger = logging.getLogger(__name__)
Tensors = dict[str, Tensor]


class FeatureCache:
    def __init__(self, folder: Path, budget_bytes: int):
        self.folder, self.budget = folder, budget_bytes
        self.hits = self.misses = 0
        for litter in folder.glob(".*.tmp") if folder.exists() else ():
            if time.time() - litter.stat().st_mtime > LITTER_S:
                litter.unlink(missing_ok=True)

    def get(self, snapshot: str, bank: str, protocol: str, make: Callable[[], Tensors]) -> Tensors:
        """What `make` gave for this key before, or gives now."""
        path = self._path(snapshot, bank, protocol)
        found = self._read(path)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        made = {name: tensor.contiguous() for name, tensor in make().items()}
        self._put(path, made)
        return made

    def bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _path(self, *key: str) -> Path:
        return self.folder / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()}.safetensors"

    def _read(self, path: Path) -> Tensors | None:
        try:
            data = path.read_bytes()
            os.utime(path)  # lately used
        except FileNotFoundError:
            return None
        try:
            found = safetensors.torch.load(data)
        except safetensors.SafetensorError as e:
            self._discard(path, str(e))
            return None
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the format's: length, JSON, tensors
        if header.get("__metadata__", {}).get("digest") != _digest(found):
            self._discard(path, "its bytes do not match its digest")
            return None
        return found

    def _discard(self, path: Path, why: str) -> None:
        logger.warning("cached features %s: %s; measured again", path, why)
        path.unlink(missing_ok=True)

    def _put(self, path: Path, tensors: Tensors) -> None:
        data = safetensors.torch.save(tensors, metadata={"digest": _digest(tensors)})
        if len(data) > self.budget:
            return
        try:
            durable.write(path, data)
        except StoreFull as e:
            logger.warning("features are not cached: %s", e)
            return
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, old in files:
            if total <= self.budget:
                break
            if old != path:
                old.unlink(missing_ok=True)
                total -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """When it was last used (ns), bytes, path."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process evicted it
            found.append((stat.st_mtime_ns, stat.st_size, path))
        return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
