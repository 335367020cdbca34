"""A checkpoint that many ranks write together, each a part, through torch.distributed.checkpoint.

  1. plan     who writes what: of what all ranks hold each writes a share, of what is sharded each its own part        (DCP)
  2. put      checkpoints/<step:012d>-<sha256[:12]>.part, every rank its own, PART_BYTES at most
  3. put      …-<sha256[:12]>.rest: what is no weight, by the first rank
  4. put      …-<sha256[:12]>.json, the index: where each piece of each tensor lies, with its digest
  5. then as any checkpoint: checkpoint.py, whose pointer is the commit point

The index names sizes and offsets, not ranks, so that any number of ranks, sharded or not, can take it up, each reading what it needs.  Pieces are
plain bytes and the index is JSON: reading a checkpoint runs no code of its own.  Killed in between, parts are left that no pointer names; the same step,
taken again by as many ranks, writes the same keys.
"""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_together
from torch.distributed.checkpoint.state_dict_saver import save as save_together
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from streamlearn.contract.errors import Corrupt
from streamlearn.contract.object_store import ObjectStore

PART_BYTES = 2**29
TENSORS = ("model", "ema", "objective", "optimizer")  # parts of the state whose tensors are written by all ranks
Room = Callable[[str, Sequence[int], torch.dtype], Tensor]  # makes an empty tensor: name, size, dtype
Index = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """Where a part of a tensor lies."""

    key: str
    at: int  # bytes
    length: int
    sha256: str


def save(store: ObjectStore, state: Mapping[str, Any], step: int, commit: Callable[[bytes, list[str]], None], group: Any) -> None:
    """Steps 1 to 4, and `commit` (the index's bytes, the keys of all parts) on the first rank.  A collective over `group`.

    Raises on every rank what any of them met.
    """
    tensors, rest = parted(state)
    writer = _Writer(store, step, rest, commit)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        with quiet(group):
            save_together(tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as e:
        raise first_fault(e) from e


def load(store: ObjectStore, key: str, index_bytes: bytes, room: Room | None, group: Any = None) -> dict[str, Any]:
    """The state, in tensors as `room` makes them; in whole ones on the CPU where there is none.  A collective where ranks are joined.

    Raises Corrupt, NotFound: on every rank what any of them met.
    """
    try:
        index: Index = json.loads(index_bytes)
        sizes = {name: (t["size"], getattr(torch, t["dtype"])) for name, t in index["tensors"].items()}
        rest_at = Piece(**index["rest"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Corrupt(f"{key}: no index of a checkpoint: {e}") from e
    make = room or (lambda _, size, dtype: torch.empty(tuple(size), dtype=dtype))
    tensors = {name: make(name, size, dtype) for name, (size, dtype) in sizes.items()}
    try:
        with quiet(group):
            planner = DefaultLoadPlanner(flatten_state_dict=False)
            load_together(tensors, storage_reader=_Reader(store, index), planner=planner, process_group=group)
    except CheckpointException as e:
        raise first_fault(e) from e
    rest: dict[str, Any] = torch.load(io.BytesIO(_read(store, rest_at)), map_location="cpu", weights_only=True)
    return joined(tensors, rest)


@contextmanager
def quiet(group: Any) -> Iterator[None]:
    """One process alone is what is meant where there is no group: torch need not warn of it."""
    with warnings.catch_warnings() if group is None else nullcontext():
        if group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def first_fault(e: CheckpointException) -> BaseException:
    """What went wrong, instead of where it was collected."""
    return next(iter(e.failures.values()))[0]


def parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors of weights by path, all else as it was nested)."""
    tensors: dict[str, Tensor] = {}

    def without(value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            return value
        left = {}
        for name, inner in value.items():
            at = f"{path}/{name}"
            if isinstance(inner, Tensor):
                tensors[at] = inner
            else:
                left[name] = without(inner, at)
        return left

    return tensors, {name: without(value, name) if name in TENSORS else value for name, value in state.items()}


def joined(tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The reverse; `rest` is filled.  Raises Corrupt."""
    for path, tensor in tensors.items():
        *way, last = path.split("/")
        at = rest
        for name in way:
            found = next((key for key in at if str(key) == name), None)  # an optimizer's are numbers
            if found is None:
                raise Corrupt(f"checkpoint: {path} has no place in the rest of the state")
            at = at[found]
        at[last] = tensor
    return rest


class _Writer(StorageWriter):
    def __init__(self, store: ObjectStore, step: int, rest: dict[str, Any], commit: Callable[[bytes, list[str]], None]):
        self.store, self.step, self.rest, self.commit = store, step, rest, commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...
    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Step 2."""
        results: list[WriteResult] = []
        run: list[tuple[MetadataIndex, bytes]] = []
        size = 0
        for item in plan.items:
            run.append((item.index, _bytes(planner.resolve_data(item))))
            size += len(run[-1][1])
            if size >= PART_BYTES:
                results += self._put(run)
                run, size = [], 0
        future: Future[list[WriteResult]] = Future()
        future.set_result(results + self._put(run))
        return future

    def _put(self, run: list[tuple[MetadataIndex, bytes]]) -> list[WriteResult]:
        if not run:
            return []
        body = b"".join(data for _, data in run)
        key, at, results = self._key(body, "part"), 0, []
        self.store.put(key, body)
        for index, data in run:
            results.append(WriteResult(index, len(data), Piece(key, at, len(data), hashlib.sha256(data).hexdigest())))
            at += len(data)
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Steps 3 to 5, on the first rank, once every rank's parts are there."""
        tensors: dict[str, Any] = {}
        for name, known in metadata.state_dict_metadata.items():
            assert isinstance(known, TensorStorageMetadata), name
            tensors[name] = {"dtype": str(known.properties.dtype).removeprefix("torch."), "size": list(known.size), "chunks": []}
        shapes = {
            (name, tuple(chunk.offsets)): list(chunk.sizes)
            for name, known in metadata.state_dict_metadata.items()
            for chunk in (known.chunks if isinstance(known, TensorStorageMetadata) else ())
        }
        for result in sorted((r for rank in results for r in rank), key=lambda r: (r.index.fqn, tuple(r.index.offset or ()))):
            name = result.index.fqn
            offsets = list(result.index.offset or [0] * len(tensors[name]["size"]))
            where = {"offsets": offsets, "sizes": shapes[name, tuple(offsets)]}
            tensors[name]["chunks"].append(where | vars(result.storage_data))
        buffer = io.BytesIO()
        torch.save(self.rest, buffer)
        body = buffer.getvalue()
        rest = Piece(self._key(body, "rest"), 0, len(body), hashlib.sha256(body).hexdigest())
        self.store.put(rest.key, body)
        keys = {chunk["key"] for tensor in tensors.values() for chunk in tensor["chunks"]}
        index = {"format": 1, "step": self.step, "rest": vars(rest), "tensors": tensors}
        self.commit(json.dumps(index, sort_keys=True).encode(), [rest.key, *sorted(keys)])

    def _key(self, body: bytes, kind: str) -> str:
        return f"checkpoints/{self.step:012d}-{hashlib.sha256(body).hexdigest()[:12]}.{kind}"


class _Reader(StorageReader):
    def __init__(self, store: ObjectStore, index: Index):
        self.store = store
        self.known: dict[str, Any] = {}
        self.pieces: dict[MetadataIndex, tuple[Piece, list[int], torch.dtype]] = {}
        for name, tensor in index["tensors"].items():
            dtype = getattr(torch, tensor["dtype"])
            chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"])) for c in tensor["chunks"]]
            self.known[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor["size"]), chunks)
            for c in tensor["chunks"]:
                piece = Piece(c["key"], c["at"], c["length"], c["sha256"])
                self.pieces[MetadataIndex(name, torch.Size(c["offsets"]))] = (piece, c["sizes"], dtype)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...
    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return Metadata(self.known)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for wanted in plan.items:
            piece, sizes, dtype = self.pieces[wanted.storage_index]
            found = torch.frombuffer(bytearray(_read(self.store, piece)), dtype=dtype).view(sizes)
            for dim, (start, length) in enumerate(zip(wanted.storage_offsets, wanted.lengths, strict=True)):
                found = found.narrow(dim, start, length)
            target = planner.resolve_tensor(wanted).detach()
            target.copy_(found)
            planner.commit_tensor(wanted, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _bytes(data: Any) -> bytes:
    assert isinstance(data, Tensor), type(data)
    return data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read(store: ObjectStore, piece: Piece) -> bytes:
    """Raises Corrupt, NotFound."""
    data = store.get_range(piece.key, piece.at, piece.length)
    if hashlib.sha256(data).hexdigest() != piece.sha256:
        raise Corrupt(f"{piece.key}: {len(data)} bytes from {piece.at} on do not match sha256 {piece.sha256[:12]}… of {piece.length} bytes")
    return data
