"""The one place that renames and links.  A file written here is whole or absent, even after power loss."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streamlearn.contract.errors import StoreFull

_FULL = {errno.ENOSPC, errno.EDQUOT}


def write(path: Path, data: bytes) -> None:
    """Replace `path` with `data`, whole or not at all.  Raises StoreFull and leaves no litter when the disk is full."""
    _staged(path, data, os.replace)


def create(path: Path, data: bytes) -> bool:
    """Make `path` hold `data`, unless it exists.  Of any number who try, one is told True."""
    try:
        _staged(path, data, os.link)  # unlike rename, link never overwrites
    except FileExistsError:
        return False
    return True


def publish(staged: Path, path: Path) -> None:
    """Move a finished file into its place: synced, then renamed, then the folder synced.  Same file system."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(staged, path)  # noqa: PTH105  Path.replace returns a path; this line is the atomic step
        _sync_folder(path.parent)
    except OSError as e:
        raise translate(e, path) from e


def move(source: Path, target: Path) -> None:
    """A file or a folder, whatever is in it, to a place that is free, on the same file system.  What is inside must be synced already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)  # noqa: PTH105  as above
    _sync_folder(target.parent)
    _sync_folder(source.parent)


def publish_folder(staged: Path, folder: Path, *, replace: bool = False) -> None:
    """Move a finished, flat folder into its place: files synced, then renamed.  Same file system.  Raises FileExistsError unless `replace`.

    Replacing takes two renames, since no folder can be renamed onto a full one: killed between them, the old one lies beside its place as
    `.<name>.<random>.old`.
    """
    try:
        for path in staged.iterdir():
            with path.open("rb") as f:
                os.fsync(f.fileno())
        _sync_folder(staged)
        old = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.old")
        if folder.exists() and not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        if folder.exists():
            folder.rename(old)
        staged.rename(folder)
        _sync_folder(folder.parent)
        if old.exists():
            shutil.rmtree(old)
    except OSError as e:
        raise translate(e, folder) from e


def sync(path: Path) -> None:
    """Make a file that another library renamed into place survive power loss."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
    _sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add one line in one write.  A crash can tear only the last line; the next append starts on a fresh one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            os.write(fd, (b"\n" if torn else b"") + line.encode() + b"\n")
        finally:
            os.close(fd)
    except OSError as e:
        raise translate(e, path) from e


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a history, oldest first.  A line torn by a crash is passed over; a missing file has none."""
    if not path.exists():
        return
    with path.open("rb") as f:
        for raw in f:
            try:
                value = json.loads(raw)
            except ValueError:
                continue  # torn by a kill in the middle of a write: append_line starts anew after it
            if isinstance(value, dict):
                yield value


def translate(e: OSError, path: Path) -> OSError | StoreFull:
    """A full disk is a fault that may pass; every other OSError is itself."""
    if e.errno in _FULL:
        return StoreFull(f"{path}: no space left on the device; free some space, the work goes on by itself", after_s=2.0)
    return e


def _staged(path: Path, data: bytes, put: Callable[[Path, Path], None]) -> None:
    tmp = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tmp.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            put(tmp, path)
            _sync_folder(path.parent)
        finally:
            tmp.unlink(missing_ok=True)
    except FileExistsError:
        raise
    except OSError as e:
        raise translate(e, path) from e


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
