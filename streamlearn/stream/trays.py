"""Memory for finished crops that the learner and its workers share: a ring of trays, each as large as one batch.

It is an unnamed file (memfd): no limit but the memory's (a container's /dev/shm is 64 MB by default), no page of it is made twice, and it
is gone when the last process that knows it is, however that ended.

A tray has one writer at a time: it is handed out again only once the work that was given it has ended, be it wanted or not.
"""

import functools
import math
import mmap
import os
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamlearn.contract.config import CropConfig
from streamlearn.stream.decode import Pixels

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tray:
    """Where a batch is to be written: a value that can be sent to a worker."""

    path: str  # of the memory, for any process of the same user
    start: int
    shapes: tuple[Shape, ...]  # (V_r,B,S_r,S_r,3)


class Trays:
    """The learner's side."""

    def __init__(self, crops: tuple[CropConfig, ...], batch: int, count: int):
        shapes = tuple((crop.count, batch, crop.size, crop.size, 3) for crop in crops)
        # whole pages: then no two trays share one
        size = -(-sum(math.prod(shape) for shape in shapes) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._fd = os.memfd_create("streamlearn-crops")
        os.ftruncate(self._fd, count * size)
        self._memory = mmap.mmap(self._fd, 0)
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self._free = deque[tuple[Tray, Future[Any] | None]]((Tray(path, i * size, shapes), None) for i in range(count))

    def take(self) -> Tray:
        """A tray that nobody writes to any more; waits for that if need be."""
        for _ in range(len(self._free)):
            tray, work = self._free.popleft()
            if work is None or work.done():
                return tray
            self._free.append((tray, work))
        tray, work = self._free.popleft()
        assert work is not None
        wait([work])
        return tray

    def give_back(self, tray: Tray, work: "Future[Any] | None" = None) -> None:
        """What was written is no longer needed; `work` may still be writing."""
        self._free.append((tray, work))

    def arrays(self, tray: Tray) -> tuple[Pixels, ...]:
        """One a resolution."""
        return _arrays(self._memory, tray)

    def close(self) -> None:
        os.close(self._fd)  # the mapping ends with the last array in it


def mapped(tray: Tray) -> tuple[Pixels, ...]:
    """The same in a worker."""
    return _arrays(_mapping(tray.path), tray)


def _arrays(memory: mmap.mmap, tray: Tray) -> tuple[Pixels, ...]:
    start, arrays = tray.start, list[Pixels]()
    for shape in tray.shapes:
        arrays.append(np.ndarray(shape, np.uint8, memory, offset=start))
        start += math.prod(shape)
    return tuple(arrays)


@functools.lru_cache(maxsize=1)
def _mapping(path: str) -> mmap.mmap:
    """Once a process: mapping it anew for each batch would fault each page in again.  A worker serves one stream in its life."""
    fd = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(fd, 0)
    finally:
        os.close(fd)
