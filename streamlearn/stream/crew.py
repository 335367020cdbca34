"""The processes that make batches, and the memory they write them to.

A worker that dies costs its work, not its place: the pool is made anew, and the work that was outstanding is handed out again.  Work is a
pure function of its spec, so what comes of it is the same.

A sample can be what a worker dies of: a fault of a decoder, or a picture that takes all the memory there is.  After a second death in a row
the oldest work is given out alone; whoever dies over the same slot of it twice has found such a sample, which then counts as corrupt.

What the workers leave to the learner's device, crops and distortions or normalisation alone, is done when work is taken.  On CUDA the memory
is pinned, and what is done is copied ahead on a stream of its own while the learner computes.
"""

import importlib
import logging
import os
from collections import Counter, deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import torch
import torch.multiprocessing
from torch import Tensor

from streamlearn.contract.config import StreamConfig
from streamlearn.contract.errors import ConfigError, Stuck
from streamlearn.stream import crop, distort, views
from streamlearn.stream.trays import Tray, Trays
from streamlearn.stream.worker import BatchSpec, Out, Sound, make, make_in, out_of, start_worker

logger = logging.getLogger(__name__)
DEATHS_IN_A_ROW = 20  # without one batch between them: then it is not the pictures


@dataclass(eq=False)
class Work:
    spec: BatchSpec
    tray: Tray  # where it is written
    future: "Future[Sound] | None" = None  # None: nobody is at it
    died_over: Counter[int] = field(default_factory=Counter)  # slots
    copied: "_Copied | None" = None


@dataclass(frozen=True)
class _Copied:
    bytes: tuple[Tensor, ...]  # uint8, on the device: (V_r*B,S_r,S_r,3) a resolution, or what a pile holds
    done: torch.cuda.Event | None  # None: it is there already


class Crew:
    """`stream.workers` processes; none: the learner's own process makes each batch when it is collected."""

    def __init__(self, config: StreamConfig, *, batch: int, device: torch.device):
        self.config, self.device = config, device
        self.paint = _workers_distort(config, device)
        self.deaths = 0
        self._row = 0  # of deaths, since a batch was collected
        self._alone = False  # only the oldest work is given out
        # without OpenCV's libraries, on a CPU: the learner's process has enough to do
        decoded = 0 if self.paint or (config.augment == "auto" and device.type == "cpu") else config.decoded_bytes
        # one to write on while another is unwanted
        self._trays = Trays(config.crops, batch, config.prefetch + 1, decoded_bytes=decoded, pinned=device.type == "cuda")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._outstanding = deque[Work]()
        self._pool: ProcessPoolExecutor | None = None

    def begin(self, spec: BatchSpec) -> Work:
        work = Work(spec, self._trays.take())
        self._outstanding.append(work)
        self._submit(work)
        return work

    def collect(self, work: Work) -> Sound:
        """(B,) which samples could be decoded; waits for it.  Raises Stuck where no worker lives long enough to make it."""
        if self.config.workers == 0:
            return make(self.config, work.spec, self._out(work), paint=self.paint)
        while True:
            try:
                assert work.future is not None, "work is collected in the order in which it was begun"
                sound = work.future.result()
            except BrokenProcessPool:
                self._revive()
                continue
            self._row = 0
            if self._alone:
                self._alone = False
                self._resume()
            return sound

    def copy_ahead(self, work: Work) -> None:
        """Begin to copy to the device, if that is another memory and the work is done."""
        if self._copies and work.copied is None and work.future is not None and work.future.done() and not work.future.exception():
            work.copied = self._copy(work)

    def crops(self, work: Work) -> tuple[Tensor, ...]:
        """From the bytes of collected work to what the learner takes, in memory of its own and on its device."""
        copied = work.copied or self._copy(work)
        if copied.done is not None:
            copied.done.synchronize()  # the tray is written on again once the work has ended
            for one in copied.bytes:
                one.record_stream(torch.cuda.current_stream(self.device))
        out, finished, first = self._out(work), list[Tensor](), 0
        for i, (V, S) in enumerate((resolution.count, resolution.size) for resolution in self.config.crops):
            if isinstance(out, crop.Pile):
                rows = crop.resized(copied.bytes[0], out.table_VB6[first : first + V].reshape(-1, crop.COLUMNS), S)
            else:
                rows = copied.bytes[i]
            if self.paint:
                x = views.normalised(rows, self.config.mean, self.config.std)
            else:
                x = distort.distorted(rows, distort.draw(work.spec.keys_B, range(first, first + V), self.config), self.config)
            finished.append(x.view(V, -1, 3, S, S))
            first += V
        return tuple(finished)

    def end(self, work: Work) -> None:
        """Its crops are taken, or no longer wanted; a worker may still be writing."""
        if work.future is not None:
            work.future.cancel()
        if work.copied is not None and work.copied.done is not None:
            work.copied.done.synchronize()
        self._outstanding.remove(work)
        self._trays.give_back(work.tray, work.future)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._trays.close()

    def _out(self, work: Work) -> Out:
        return out_of(self._trays.arrays(work.tray), self.config)

    def _bytes(self, work: Work) -> tuple[Tensor, ...]:
        """What the device needs of a tray, in the tray."""
        out = self._out(work)
        if isinstance(out, crop.Pile):
            return (torch.from_numpy(out.needed()),)
        return tuple(torch.from_numpy(pixels_VBSSC).flatten(0, 1) for pixels_VBSSC in out)

    def _copy(self, work: Work) -> _Copied:
        if self._copies is None:
            return _Copied(tuple(pixels.to(self.device) for pixels in self._bytes(work)), None)
        with torch.cuda.stream(self._copies):
            copied = tuple(pixels.to(self.device, non_blocking=True) for pixels in self._bytes(work))
            return _Copied(copied, self._copies.record_event())

    def _submit(self, work: Work) -> None:
        if self.config.workers == 0 or (self._alone and work is not self._outstanding[0]):
            return
        if self._pool is None:
            # forkserver: neither torch's threads nor its memory are copied into the workers
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["streamlearn.stream.worker"])
            self._pool = ProcessPoolExecutor(self.config.workers, mp_context=context, initializer=start_worker, initargs=(os.getpid(),))
        self._trays.at(work.tray)[0] = -1
        try:
            work.future = self._pool.submit(make_in, self.config, work.spec, work.tray, paint=self.paint)
        except BrokenProcessPool:
            self._revive()

    def _revive(self) -> None:
        """A worker was killed: a new pool, and what is outstanding again.  Raises Stuck."""
        self.deaths, self._row = self.deaths + 1, self._row + 1
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        if self._row > DEATHS_IN_A_ROW:
            raise Stuck(
                f"stream.workers: {self._row} worker processes were killed one after another and no batch was made; look for the kernel's "
                "out-of-memory killer (dmesg), give the learner more memory, or set stream.workers or stream.prefetch lower"
            )
        oldest = self._outstanding[0]
        if self._alone:
            self._blame(oldest)
        self._alone = self._row > 1
        self._resume()

    def _blame(self, work: Work) -> None:
        slot = int(self._trays.at(work.tray)[0])
        if slot < 0:
            return
        work.died_over[slot] += 1
        if work.died_over[slot] > 1:
            work.spec = replace(work.spec, deadly=work.spec.deadly | {slot})
            self._row = 0  # that is mended

    def _resume(self) -> None:
        """Hand out what nobody is at."""
        for work in self._outstanding:
            if work.future is None or (work.future.done() and (work.future.cancelled() or work.future.exception())):
                work.future = None
                self._submit(work)


def _workers_distort(config: StreamConfig, device: torch.device) -> bool:
    """Or the device, on whole batches.  Raises ConfigError where OpenCV is asked for and lacks the system's libraries that it loads."""
    if config.augment == "device" or (config.augment == "auto" and device.type != "cpu"):
        return False
    try:
        importlib.import_module("streamlearn.stream.distort_cpu")
    except ImportError as e:
        fault = (
            f"stream.augment = {config.augment!r}: the workers' distortions need OpenCV, which cannot be loaded here: {e}. "
            "Install what it lacks (Debian: libgl1 and libglib2.0-0)"
        )
        if config.augment == "workers":
            raise ConfigError(f"{fault}, or set stream.augment to 'device'") from e
        logger.warning("%s; until then they are done in the learner's process, which takes three times as long", fault)
        return False
    return True
