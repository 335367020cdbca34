"""What a worker process does: one batch spec -> its crops, or a pile that the learner's device cuts them from (stream/crop.py), written into
memory that the learner shares.  A pure function of config, spec and the bytes it points to.
"""

import ctypes
import os
import select
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.shards import ShardSample
from streamlearn.stream import distort, views
from streamlearn.stream.cache import read_member
from streamlearn.stream.crop import Pile
from streamlearn.stream.decode import Buffer, Header, Pixels, header, pixels
from streamlearn.stream.keys import U64
from streamlearn.stream.trays import Tray, mapped

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


@dataclass(frozen=True)
class Place:
    """One sample's bytes on this disk."""

    path: str
    sample: ShardSample


@dataclass(frozen=True)
class BatchSpec:
    places: tuple[Place, ...]  # B
    keys_B: U64  # of the augmentations
    deadly: frozenset[int] = frozenset()  # slots whose samples end the process that decodes them: not touched, and not sound


Sound = NDArray[np.bool_]  # (B,); False: could not be decoded, another sample stands in its place
Out = tuple[Pixels, ...] | Pile  # where a batch is written: one (V_r,B,S_r,S_r,3) a resolution, or images and where their views lie


def start_worker(parent: int) -> None:
    """One thread each, no interest in Ctrl-C, and no life after the learner's: kill -9 of it must leave no orphans."""
    torch.set_num_threads(1)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        learner = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)  # the learner died while this worker was born
    threading.Thread(target=_end_with, args=(learner,), daemon=True).start()


def keep_memory() -> None:
    """Freed memory stays with this process: a picture's worth, asked of the kernel anew for each, costs more than the work done in it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the largest that every version takes
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def _end_with(learner: int) -> None:
    """A pidfd becomes readable when its process has ended; the parent of this worker is the fork server, which may live on."""
    select.select([learner], [], [])
    os._exit(1)


def make_in(config: StreamConfig, spec: BatchSpec, tray: Tray, *, paint: bool) -> Sound:
    """As `make`, in another process than the one whose memory it is."""
    arrays, at = mapped(tray)
    return make(config, spec, out_of(arrays, config), paint=paint, at=at)


def out_of(arrays: tuple[Pixels, ...], config: StreamConfig) -> Out:
    """What the arrays of a tray are for."""
    if arrays[0].ndim == 5:
        return arrays
    table, memory = arrays
    return Pile(table.view(np.int64), memory, views.sides(config.crops))


@torch.inference_mode()
def make(config: StreamConfig, spec: BatchSpec, out: Out, *, paint: bool, at: NDArray[np.int64] | None = None) -> Sound:
    """Write a batch; crops with `paint` flipped, coloured and blurred, else that is left to the learner's device.

    `at` (1,) is told which slot's sample is being looked at (-1: none).  Where no sample is sound nothing is written: the loader passes the
    batch over, and counts it.
    """
    if not spec.places:
        return np.zeros(0, dtype=bool)
    maker = _Maker(config, spec, out, paint, np.zeros(1, np.int64) if at is None else at)
    sound = np.array([maker.write(slot, slot) for slot in range(len(spec.places))], dtype=bool)
    if sound.any():
        for slot in np.flatnonzero(~sound).tolist():
            maker.write(slot, next(i % len(sound) for i in range(slot, slot + len(sound)) if sound[i % len(sound)]))
    maker.at[0] = -1
    return sound


class _Maker:
    """One batch in the making."""

    def __init__(self, config: StreamConfig, spec: BatchSpec, out: Out, paint: bool, at: NDArray[np.int64]):
        self.out, self.config, self.keys_B, self.at = out, config, spec.keys_B, at
        self.bodies = _read(spec)
        self.headers = [None if slot in spec.deadly else self._header(slot) for slot in range(len(self.bodies))]
        self.boxes_VB4, self.scale_B = views.plan(spec.keys_B, _sizes(self.headers), config.crops)
        self.draws = distort.draw(spec.keys_B, range(len(self.boxes_VB4)), config)
        self.paint: Callable[[Pixels, distort.Distortions, int], Pixels] | None = None
        if paint:
            from streamlearn.stream.distort_cpu import distorted  # OpenCV: only where it is needed

            self.paint = distorted
        self.buffer = Buffer()

    def _header(self, slot: int) -> Header | None:
        self.at[0] = slot
        try:
            return header(self.bodies[slot])
        except Corrupt:
            return None

    def write(self, slot: int, sample: int) -> bool:
        """The views of one slot from one sample, mostly its own; False if that cannot be decoded."""
        known = self.headers[sample]
        if known is None:
            return False
        self.at[0] = sample
        boxes_V4, scale = self.boxes_VB4[:, slot], int(self.scale_B[slot])
        if sample != slot:
            boxes_V14, scales = views.plan(self.keys_B[slot : slot + 1], _sizes([known]), self.config.crops)
            boxes_V4, scale = boxes_V14[:, 0], int(scales[0])
        if not known.turbo:
            scale = 1
        room = self.out.room() if isinstance(self.out, Pile) else np.empty(0, np.uint8)
        whole = 3 * -(-known.height // scale) * -(-known.width // scale) <= len(room)
        try:
            image = pixels(self.bodies[sample], known, scale=scale, buffer=Buffer(room) if whole else self.buffer)
        except Corrupt:
            return False  # counted by the loader
        if not isinstance(self.out, Pile):
            self._cut(self.out, slot, image, boxes_V4 // scale)
        elif whole:
            self.out.add(slot, image, boxes_V4 // scale)
        else:
            self.out.add_crops(slot, image, boxes_V4 // scale)
        return True

    def _cut(self, out: tuple[Pixels, ...], slot: int, image: Pixels, boxes_V4: NDArray[np.int64]) -> None:
        view = 0
        for out_VBSSC in out:
            for out_BSSC in out_VBSSC:
                views.cut(image, boxes_V4[view], out_BSSC[slot])
                if self.paint is not None:
                    out_BSSC[slot] = self.paint(out_BSSC[slot], self.draws, view * len(self.bodies) + slot)
                view += 1


def _read(spec: BatchSpec) -> list[bytes]:
    files: dict[str, int] = {}
    try:
        for place in spec.places:
            if place.path not in files:
                files[place.path] = os.open(place.path, os.O_RDONLY)
        return [read_member(files[place.path], place.sample) for place in spec.places]
    finally:
        for fd in files.values():
            os.close(fd)


def _sizes(headers: list[Header | None]) -> NDArray[np.int64]:
    """(B,2) width, height; of what is no image, a size that will do."""
    return np.array([(known.width, known.height) if known else (64, 64) for known in headers], dtype=np.int64)
