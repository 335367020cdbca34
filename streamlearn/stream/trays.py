"""Memory for crops, or for what they are cut from, that the learner and its workers share: a ring of trays, each as large as one batch.

It is an unnamed file (memfd): no limit but the memory's (a container's /dev/shm is 64 MB by default), no page of it is made twice, and it
is gone when the last process that knows it is, however that ended.  What was never written to takes no memory, unless it is pinned.

A tray has one writer at a time: it is handed out again only once the work that was given it has ended, be it wanted or not.  Its writer
notes in it which slot it is at, so that whoever outlives the writer knows over what it died.
"""

import functools
import logging
import math
import mmap
import os
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamlearn.contract.config import CropConfig
from streamlearn.stream import views
from streamlearn.stream.crop import COLUMNS, per_image
from streamlearn.stream.decode import Pixels

logger = logging.getLogger(__name__)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tray:
    """Where a batch is to be written: a value that can be sent to a worker."""

    path: str  # of the memory, for any process of the same user
    start: int
    shapes: tuple[Shape, ...]  # of finished crops: (V_r,B,S_r,S_r,3); of a pile: its table and its memory, (V,B,48) and (bytes,)


class Trays:
    """The learner's side."""

    def __init__(self, crops: tuple[CropConfig, ...], batch: int, count: int, *, decoded_bytes: int = 0, pinned: bool = False):
        """`decoded_bytes`: of an image, on the average; for piles instead of finished crops.  `pinned`: a CUDA device may copy from it by
        itself, while the processor goes on.
        """
        shapes: tuple[Shape, ...] = tuple((crop.count, batch, crop.size, crop.size, 3) for crop in crops)
        if decoded_bytes:
            sides_V = views.sides(crops)
            shapes = ((len(sides_V), batch, 8 * COLUMNS), (batch * per_image(sides_V, decoded_bytes),))
        # whole pages: then no two trays share one; the note has one to itself, so that crops begin with a page
        size = (1 + -(-sum(math.prod(shape) for shape in shapes) // mmap.PAGESIZE)) * mmap.PAGESIZE
        self._fd = os.memfd_create("streamlearn-trays")
        os.ftruncate(self._fd, count * size)
        self._memory = mmap.mmap(self._fd, 0)
        self._pinned = self._pin(count * size) if pinned else False
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
        """One a resolution; or those of a pile."""
        return _arrays(self._memory, tray)

    def at(self, tray: Tray) -> NDArray[np.int64]:
        """(1,) the slot that its writer is at; -1: at none."""
        return _note(self._memory, tray)

    def close(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address())
        os.close(self._fd)  # the mapping ends with the last array in it

    def _pin(self, size: int) -> bool:
        fault = int(torch.cuda.cudart().cudaHostRegister(self._address(), size, 0))
        if fault:  # it is slower without, not wrong
            logger.warning(
                "%d MB for batches could not be pinned (CUDA error %d): copies to the device will wait for them", size >> 20, fault
            )
        return not fault

    def _address(self) -> int:
        return int(torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr())


def mapped(tray: Tray) -> tuple[tuple[Pixels, ...], NDArray[np.int64]]:
    """In a worker: the arrays, and the note."""
    memory = _mapping(tray.path)
    return _arrays(memory, tray), _note(memory, tray)


def _note(memory: mmap.mmap, tray: Tray) -> NDArray[np.int64]:
    return np.ndarray((1,), np.int64, memory, offset=tray.start)


def _arrays(memory: mmap.mmap, tray: Tray) -> tuple[Pixels, ...]:
    start, arrays = tray.start + mmap.PAGESIZE, list[Pixels]()
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
