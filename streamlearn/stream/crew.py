"""The processes that make batches, and the memory they write them to.

A worker that dies costs its work, not its place: the pool is made anew, and the work that was outstanding is handed out again.  Work is a
pure function of its spec, so what comes of it is the same.
"""

import importlib
import os
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
import torch.multiprocessing
from torch import Tensor

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.stream import distort, views
from streamlearn.stream.trays import Tray, Trays
from streamlearn.stream.worker import BatchSpec, Sound, make, make_in, start_worker


@dataclass(eq=False)
class Work:
    spec: BatchSpec
    tray: Tray  # where its crops are written
    future: "Future[Sound] | None" = None  # None: it is done when it is collected


class Crew:
    """`stream.workers` processes; none: the learner's own process makes each batch when it is collected."""

    def __init__(self, config: StreamConfig, *, batch: int, device: torch.device):
        self.config, self.device = config, device
        # who distorts: the workers, on bytes, or the device, on whole batches
        self.paint = config.augment == "workers" or (config.augment == "auto" and device.type == "cpu")
        if self.paint:
            _need_opencv()
        self.deaths = 0
        self._trays = Trays(config.crops, batch, config.prefetch + 1)  # one to write on while another is unwanted
        self._outstanding = deque[Work]()
        self._pool: ProcessPoolExecutor | None = None

    def begin(self, spec: BatchSpec) -> Work:
        work = Work(spec, self._trays.take())
        self._outstanding.append(work)
        self._submit(work)
        return work

    def collect(self, work: Work) -> Sound:
        """(B,) which samples could be decoded; waits for it."""
        if self.config.workers == 0:
            return make(self.config, work.spec, self._trays.arrays(work.tray), paint=self.paint)
        while True:
            try:
                assert work.future is not None
                return work.future.result()
            except BrokenProcessPool:
                self._revive()

    def crops(self, work: Work) -> tuple[Tensor, ...]:
        """From the bytes of collected work to what the learner takes, in memory of its own and on its device."""
        finished, first = list[Tensor](), 0
        for pixels_VBSSC in self._trays.arrays(work.tray):
            V, B, S = pixels_VBSSC.shape[:3]
            rows = torch.from_numpy(pixels_VBSSC).view(V * B, S, S, 3).to(self.device)
            if self.paint:
                x = views.normalised(rows, self.config.mean, self.config.std)
            else:
                x = distort.distorted(rows, distort.draw(work.spec.keys_B, range(first, first + V), self.config), self.config)
            finished.append(x.view(V, B, 3, S, S))
            first += V
        return tuple(finished)

    def end(self, work: Work) -> None:
        """Its crops are taken, or no longer wanted; a worker may still be writing."""
        if work.future is not None:
            work.future.cancel()
        self._outstanding.remove(work)
        self._trays.give_back(work.tray, work.future)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._trays.close()

    def _submit(self, work: Work) -> None:
        if self.config.workers == 0:
            return
        if self._pool is None:
            # forkserver: neither torch's threads nor its memory are copied into the workers
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["streamlearn.stream.worker"])
            self._pool = ProcessPoolExecutor(self.config.workers, mp_context=context, initializer=start_worker, initargs=(os.getpid(),))
        try:
            work.future = self._pool.submit(make_in, self.config, work.spec, work.tray, paint=self.paint)
        except BrokenProcessPool:
            self._revive()

    def _revive(self) -> None:
        """A worker was killed: a new pool, and all that is outstanding again."""
        self.deaths += 1
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        for work in self._outstanding:
            self._submit(work)


def _need_opencv() -> None:
    """Raises ConfigError where it is installed without the system's libraries that it loads."""
    try:
        importlib.import_module("streamlearn.stream.distort_cpu")
    except ImportError as e:
        raise ConfigError(
            f"stream.augment: the workers' distortions need OpenCV, which cannot be loaded here: {e}. Install what it lacks "
            "(Debian: libgl1 and libglib2.0-0), or set stream.augment to 'device'"
        ) from e
