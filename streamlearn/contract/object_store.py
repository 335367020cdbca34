"""Where shards, rounds, checkpoints and the catalog lie.  S3 when deployed; a folder, the default, below."""

import os
import shutil
from pathlib import Path
from typing import Protocol

from streamlearn.contract import durable
from streamlearn.contract.errors import NotFound

POINTER = "checkpoints/latest.json"  # the learner's (learn/checkpoint.py), for those too who look without torch


class ObjectStore(Protocol):
    def put(self, key: str, data: bytes) -> None:
        """Store `data`, whole or not at all.  Putting the same bytes again is harmless.  Raises StoreFull."""

    def put_file(self, key: str, path: Path) -> None:
        """As put, from a file, in flat memory.  The file stays where it is."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """As put, unless the key is taken.  Of any number of racing writers exactly one is told True."""

    def get(self, key: str) -> bytes:
        """The bytes last put.  Raises NotFound, and never an error of the adapter's own library."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """At most `length` bytes from `start`; fewer at the end."""

    def get_file(self, key: str, path: Path) -> None:
        """Write the object to `path`, in flat memory.  Raises NotFound before `path` is touched."""

    def size(self, key: str) -> int: ...

    def modified(self, key: str) -> float:
        """When the object was last put, in unix seconds by the store's own clock: every put makes it young again.  Raises NotFound."""

    def list(self, prefix: str) -> list[str]:
        """Keys that start with `prefix`, sorted.  A key is listed only once `get` returns it whole."""

    def delete(self, key: str) -> None:
        """Gone, whether or not it was there."""


def is_key(key: str) -> bool:
    """A relative path without empty, '.', '..' or hidden parts: what every store can hold, and no more."""
    return all(part and not part.startswith(".") for part in key.split("/"))


def check_key(key: str) -> None:
    """Raises ValueError where `key` could leave the store, or would be taken for a staged file."""
    if not is_key(key):
        raise ValueError(f"object key {key!r}: must be a relative path without empty, '.', '..' or hidden parts")


class FolderStore:
    """The embedded object store: keys are relative paths; write, fsync, rename."""

    def __init__(self, root: Path):
        self.root = root

    def put(self, key: str, data: bytes) -> None:
        durable.write(self._path(key), data)

    def put_file(self, key: str, path: Path) -> None:
        target = self._path(key)
        tmp = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(path, tmp)
                durable.publish(tmp, target)
            finally:
                tmp.unlink(missing_ok=True)
        except OSError as e:
            raise durable.translate(e, target) from e

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return durable.create(self._path(key), data)

    def get(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound(f"{self.root}: no object {key}") from None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        try:
            with self._path(key).open("rb") as f:
                f.seek(start)
                return f.read(length)
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound(f"{self.root}: no object {key}") from None

    def get_file(self, key: str, path: Path) -> None:
        source = self._path(key)
        if not source.is_file():
            raise NotFound(f"{self.root}: no object {key}")
        try:
            shutil.copyfile(source, path)
        except FileNotFoundError:
            if source.is_file():
                raise  # the target's folder is missing: the caller's mistake
            raise NotFound(f"{self.root}: no object {key}") from None
        except OSError as e:
            raise durable.translate(e, path) from e

    def size(self, key: str) -> int:
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            raise NotFound(f"{self.root}: no object {key}") from None

    def modified(self, key: str) -> float:
        try:
            return self._path(key).stat().st_mtime
        except FileNotFoundError:
            raise NotFound(f"{self.root}: no object {key}") from None

    def list(self, prefix: str) -> list[str]:
        folder = self.root / prefix.rpartition("/")[0]
        files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))  # a dot: staged, not yet an object
        return sorted(k for p in files if (k := p.relative_to(self.root).as_posix()).startswith(prefix))

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        check_key(key)
        return self.root / key
