"""What a worker process does: one batch spec -> its crops.  A pure function of config, spec and the bytes it points to."""

import os
import select
import signal
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.shards import ShardSample
from streamlearn.stream import views
from streamlearn.stream.cache import read_member
from streamlearn.stream.decode import Pixels, decode
from streamlearn.stream.keys import U64


@dataclass(frozen=True)
class Place:
    """One sample's bytes on this disk."""

    path: str
    sample: ShardSample


@dataclass(frozen=True)
class BatchSpec:
    places: tuple[Place, ...]  # B
    keys_B: U64  # of the augmentations


@dataclass(frozen=True)
class Made:
    crops: tuple[Tensor, ...]  # one (V_r,B,3,S_r,S_r) float32 a resolution; none if no sample is sound
    sound: np.ndarray[Any, np.dtype[np.bool_]]  # (B,); False: could not be decoded, another sample stands in its place


def start_worker(parent: int) -> None:
    """One thread each, no interest in Ctrl-C, and no life after the learner's: kill -9 of it must leave no orphans."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        learner = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)  # the learner died while this worker was born
    threading.Thread(target=_end_with, args=(learner,), daemon=True).start()


def _end_with(learner: int) -> None:
    """A pidfd becomes readable when its process has ended; the parent of this worker is the fork server, which may live on."""
    select.select([learner], [], [])
    os._exit(1)


def make(config: StreamConfig, spec: BatchSpec) -> Made:
    images = _decoded(spec)
    sound = np.array([image is not None for image in images], dtype=bool)
    if not sound.any():
        return Made((), sound)  # nothing to stand in: the loader passes the batch over, and counts it
    whole = [_stand_in(images, i) for i in range(len(images))]
    made, first = [], 0
    for crop in config.crops:
        pixels = views.crops(whole, spec.keys_B, crop, first)
        made.append(views.augment(pixels, spec.keys_B, config, first))
        first += crop.count
    return Made(tuple(made), sound)


def _decoded(spec: BatchSpec) -> list[Pixels | None]:
    files: dict[str, int] = {}
    images: list[Pixels | None] = []
    try:
        for place in spec.places:
            if place.path not in files:
                files[place.path] = os.open(place.path, os.O_RDONLY)
            try:
                images.append(decode(read_member(files[place.path], place.sample)))
            except Corrupt:
                images.append(None)  # counted by the loader through `sound`
    finally:
        for fd in files.values():
            os.close(fd)
    return images


def _stand_in(images: list[Pixels | None], i: int) -> Pixels:
    """The image, or the next one in the batch that could be decoded."""
    for step in range(len(images)):
        image = images[(i + step) % len(images)]
        if image is not None:
            return image
    raise AssertionError("make() has seen that one is sound")
