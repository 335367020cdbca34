"""The processes that learn together: how they meet, and what an objective and a loop ask of each other through them.

`torchrun` starts them and says in the environment who is who; `meeting` joins them.  What every rank must decide alike is agreed on between the
hosts (gloo), so that no device waits for it; gradients, statistics and embeddings go between the devices (NCCL on CUDA).
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from streamlearn.contract.errors import ConfigError, StreamlearnError

T = TypeVar("T")
TIMEOUT_S = 1800.0  # torch's own for gloo
PR_SET_PDEATHSIG = 1


class RankLost(StreamlearnError):
    """A collective has failed: another process has ended, or does not answer.  All end, and start again from the last checkpoint."""


@dataclass(frozen=True)
class Ranks:
    """One process's view of its fellows.  Every rank holds an equal part of each batch, in rank order.

    Every method but the properties is a collective: all ranks call it, in the same order, or none.
    """

    rank: int = 0
    world: int = 1
    assigners: int = 1  # ranks that assign together with this one, itself among them
    group: Any = None  # their process group; None: the whole world

    @property
    def first(self) -> bool:
        """The one that plans, writes, publishes and speaks."""
        return self.rank == 0

    @property
    def total(self) -> Callable[[Tensor], Tensor] | None:
        """Sums a tensor, in place, over the ranks that assign together; None where there is nobody else."""
        return self._total if self.assigners > 1 else None

    def _total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def total_of_all(self, x: Tensor) -> Tensor:
        """In place, over all ranks."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gathered(self, z_ABD: Tensor) -> Tensor:
        """(A,B,D) of each rank -> (A,B * world,D), the parts in rank order: the whole batch as one process would have it."""
        if self.world == 1:
            return z_ABD
        parts = [torch.empty_like(z_ABD) for _ in range(self.world)]
        dist.all_gather(parts, z_ABD.contiguous())
        return torch.cat(parts, dim=1)

    def agreed(self, *values: int) -> tuple[int, ...]:
        """The largest of each over all ranks, between the hosts: a flag that one raises is up on all of them."""
        if self.world == 1:
            return values
        x = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return tuple(x.tolist())

    def told(self, value: T) -> T:
        """The first rank's `value`, a plain one, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def said(self, value: T) -> list[T]:
        """Everybody's, in rank order."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box


def joined(assign_ranks: int = 0, *, timeout_s: float = TIMEOUT_S) -> Ranks:
    """The ranks of torch.distributed, if it was initialised; else one process alone.  A collective where it was.

    `assign_ranks` neighbours assign codes together, as neighbours share a SyncBN group; 0: all.  Raises ConfigError.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    group = neighbours(assign_ranks, "objective.assign_ranks", timeout_s=timeout_s)
    return Ranks(rank, world, assign_ranks if group is not None else world, group)


def neighbours(size: int, key: str, *, timeout_s: float = TIMEOUT_S) -> Any:
    """The process group of this rank's `size` neighbours, itself among them; None where that is everybody.  A collective.

    Raises ConfigError naming the configuration's `key`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if size in (0, world):
        return None
    if world % size:
        raise ConfigError(f"{key} = {size} does not divide the {world} processes: set it to a divisor, or to 0 (all together)")
    # everyone makes every group: torch.distributed asks for it
    timeout = timedelta(seconds=timeout_s)
    groups = [dist.new_group(list(range(first, first + size)), timeout=timeout) for first in range(0, world, size)]
    return groups[rank // size]


def device_of(name: str) -> str:
    """`train.device` for this process: of several on one host each has its own GPU."""
    together = dist.is_available() and dist.is_initialized()
    return f"cuda:{torch.cuda.current_device()}" if together and name == "cuda" else name


@contextmanager
def meeting(device: str, *, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Join the processes that torchrun has started with this one, if it has.  Raises ConfigError; RankLost where one of them is gone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield
        return
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"train.device = {device!r}: of several processes each takes its own device; set it to 'cuda' or 'cpu'")
    if device == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ConfigError(f"train.device = 'cuda': this host has {there} GPUs, process {local} finds none; lower --nproc-per-node")
        torch.cuda.set_device(local)
    _end_with_torchrun()
    try:
        rank, timeout = int(os.environ["RANK"]), timedelta(seconds=timeout_s)
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, world, is_master=rank == 0 and not hosted, timeout=timeout)  # type: ignore[attr-defined]
        mine = dist.PrefixStore(start_of(store, rank, world, timeout_s), store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=mine, rank=rank, world_size=world, timeout=timeout)
        yield
        dist.barrier()  # nobody closes its sockets while another still listens
        dist.destroy_process_group()
    except RuntimeError as e:
        if not _of_a_collective(e):
            raise
        raise RankLost(f"{str(e).splitlines()[0]}: another process has ended, or gave no sign for {timeout_s:g} s; see its log") from e


def _end_with_torchrun() -> None:
    """When torchrun is killed, the kernel kills this process: else it would learn on, beside the group that is started next, and write to its store.

    One that torchrun leaves behind before it has come here finds no store to meet the others in: that is torchrun's, too.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start_of(store: Any, rank: int, world: int, timeout_s: float) -> str:
    """A name for this very start of the group, the same on all of its ranks and never used before.  Raises RuntimeError when the time is over.

    torchrun keeps one store over restarts (torch 2.13), and in it the addresses of processes that have ended; a rank that reads one of those
    never connects.  So the first rank draws a name and says it together with what the others say of themselves, until each has heard its own.
    """
    own, until = os.urandom(8).hex(), time.monotonic() + timeout_s
    if rank:
        store.set(f"streamlearn/here/{rank}", own)
    while time.monotonic() < until:
        if rank == 0:
            here = {str(r): store.get(f"streamlearn/here/{r}").decode() for r in range(1, world)}
            store.set("streamlearn/start", json.dumps({"name": own, "of": here}))
            heard = [f"streamlearn/heard/{r}" for r in range(1, world)]
            if all(store.check([key]) and store.get(key).decode() == own for key in heard):
                return own
        else:
            start = json.loads(store.get("streamlearn/start"))
            if start["of"].get(str(rank)) == own:
                store.set(f"streamlearn/heard/{rank}", start["name"])
                return str(start["name"])
        time.sleep(0.05)
    raise dist.DistStoreError(f"the {world} processes did not find each other within {timeout_s:g} s")


def _of_a_collective(error: RuntimeError) -> bool:
    """gloo's failures are plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer"))
