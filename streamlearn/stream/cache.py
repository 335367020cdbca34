"""Local copies of shards: downloaded whole, verified, indexed, evicted by budget.

A copy is named by its digest and appears only once its bytes have been verified, so a crash leaves at most a staged file that the next
start removes.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from streamlearn.contract import durable
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import ShardSample, index_shard


class ShardCache:
    def __init__(self, store: ObjectStore, folder: Path, budget_bytes: int):
        self.store, self.folder, self.budget_bytes = store, folder, budget_bytes
        self.bytes = 0
        self._known: OrderedDict[str, tuple[Path, list[ShardSample]]] = OrderedDict()  # key -> copy; least recently used first
        folder.mkdir(parents=True, exist_ok=True)
        for staged in folder.glob(".*"):
            staged.unlink()
        for copy in sorted(folder.glob("*.tar"), key=lambda p: p.stat().st_mtime):
            self.bytes += copy.stat().st_size

    def shard(self, key: str, sha256: str, *, pinned: Collection[str] = ()) -> tuple[Path, list[ShardSample]]:
        """The local copy and its samples.  Raises NotFound where the store has lost it, Corrupt where its bytes are wrong."""
        if key not in self._known:
            path = self.folder / f"{sha256}.tar"
            if not path.exists():
                self._download(key, sha256, path, pinned)
            elif _digest(path) != sha256:  # a copy that was damaged on this disk is fetched again
                self.bytes -= path.stat().st_size
                path.unlink()
                self._download(key, sha256, path, pinned)
            self._known[key] = (path, index_shard(path))
        self._known.move_to_end(key)
        return self._known[key]

    def purge(self, digests: Collection[str]) -> None:
        """Drop the copies of shards that are no longer live, by their digests, whichever process made them."""
        gone = {path for path in self.folder.glob("*.tar") if path.stem in set(digests)}
        self._known = OrderedDict((key, known) for key, known in self._known.items() if known[0] not in gone)
        for path in gone:
            self._drop(path)

    def _download(self, key: str, sha256: str, path: Path, pinned: Collection[str]) -> None:
        self._make_room(self.store.size(key), pinned)
        staged = path.with_name(f".{path.name}")
        try:
            self.store.get_file(key, staged)
            if _digest(staged) != sha256:
                raise Corrupt(f"shard {key}: {staged.stat().st_size} bytes that do not match its sha256 {sha256[:12]}…")
            index_shard(staged)
            durable.publish(staged, path)
        finally:
            staged.unlink(missing_ok=True)
        self.bytes += path.stat().st_size

    def _make_room(self, wanted: int, pinned: Collection[str]) -> None:
        """Drop the least recently used copies; those of outstanding batches stay, even over budget."""
        for key in list(self._known):
            if self.bytes + wanted <= self.budget_bytes:
                return
            if key not in pinned:
                self._drop(self._known.pop(key)[0])
        known = {path for path, _ in self._known.values()}
        for path in sorted(self.folder.glob("*.tar"), key=lambda p: p.stat().st_mtime):
            if self.bytes + wanted > self.budget_bytes and path not in known:  # of an earlier process
                self._drop(path)

    def _drop(self, path: Path) -> None:
        try:
            self.bytes -= path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return  # someone emptied the folder: nothing to account for


def read_member(fd: int, sample: ShardSample) -> bytes:
    """One image's bytes from an open tar; safe from any thread or process."""
    return os.pread(fd, sample.size, sample.start)


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
