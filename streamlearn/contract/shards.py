"""The shard: a plain webdataset tar, and beside it a parquet with one row for every offset of its range.

    shards/dt=YYYY-MM-DD/<topic>/<partition>/<first:020d>-<end:020d>-<sha256[:12]>.tar      (and .parquet)

A sample is `<offset:020d>.<ext>`, the bytes as fetched, and `<offset:020d>.json`, its provenance.  Times, owners and order of
the members are fixed, so the same samples give the same bytes, hence the same key: an attempt that is repeated after a crash
overwrites nothing but itself.  The sidecar holds where each image lies in the tar, so a reader can jump to any sample.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamlearn.contract import durable
from streamlearn.contract.errors import Corrupt

STORED, DUPLICATE, UNCHANGED, REJECTED, DEFERRED, DEAD = "stored", "duplicate", "unchanged", "rejected", "deferred", "dead"
OUTCOMES = (STORED, DUPLICATE, UNCHANGED, REJECTED, DEFERRED, DEAD)  # every offset ends as exactly one
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one offset: one row of the sidecar."""

    offset: int
    outcome: str
    reason: str = ""  # a closed set; details go to the dead letters
    url: str = ""
    final_url: str = ""
    fetched_at: str = ""  # RFC 3339 UTC
    source: str = ""
    source_ref: str = ""
    license: str = ""
    sha256: str = ""
    ext: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
    http_status: int = 0
    etag: str = ""
    last_modified: str = ""
    member_offset: int = -1  # of the image's first byte in the tar
    member_size: int = 0
    attempt: int = 0
    origin: str = ""  # topic/partition/offset of the candidate's first appearance, for a retry


_TYPES = {int: pa.int64(), str: pa.string()}
SIDECAR_SCHEMA = pa.schema([(f.name, _TYPES[int if f.type in (int, "int") else str]) for f in dataclasses.fields(Outcome)])


@dataclass(frozen=True)
class ShardSample:
    """Where one image lies in its tar."""

    index: int  # among the shard's samples
    offset: int  # in the event log
    ext: str
    start: int  # byte of the tar
    size: int  # bytes


def shard_key(day: str, topic: str, partition: int, first: int, end: int, sha256: str) -> str:
    return f"shards/dt={day}/{topic}/{partition}/{first:020d}-{end:020d}-{sha256[:12]}.tar"


def sidecar_key(key: str) -> str:
    return key.removesuffix(".tar") + ".parquet"


class ShardWriter:
    """One tar, written in offset order.  Hashes as it writes, so closing costs no second read.

    A call that raises StoreFull has changed nothing, on disk or here: it may be made again, and what was written before can be closed.
    """

    def __init__(self, path: Path):
        self.path, self.num_samples = path, 0
        self._sha256, self._size, self._last = hashlib.sha256(), 0, -1
        try:
            self._file = path.open("wb", buffering=0)  # what a buffer held back could neither be taken back nor be given up
        except OSError as e:
            raise durable.translate(e, path) from e

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._size

    def add(self, offset: int, image: bytes, ext: str, meta: Mapping[str, Any]) -> int:
        """Append one sample; returns the byte of the tar at which the image begins."""
        if offset <= self._last:
            raise ValueError(f"{self.path}: offset {offset} after {self._last}: samples go in offset order")
        start = self._size + _BLOCK
        description = json.dumps(meta, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        self._write(b"".join((*_member(f"{offset:020d}.{ext}", image), *_member(f"{offset:020d}.json", description))))
        self._last = offset
        self.num_samples += 1
        return start

    def close(self) -> tuple[str, int]:
        """Finish the tar; (sha256 in hex, bytes)."""
        # tar ends with two zero blocks, padded to a record of 20 blocks
        self._write(bytes(2 * _BLOCK + -(self._size + 2 * _BLOCK) % tarfile.RECORDSIZE))
        self._file.close()
        return self._sha256.hexdigest(), self._size

    def abort(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        """All of it, or nothing."""
        try:
            rest = memoryview(data)
            while rest:  # a disk that fills takes the first bytes of a write
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            self._file.seek(self._size)
            self._file.truncate()
            raise durable.translate(e, self.path) from e
        self._sha256.update(data)
        self._size += len(data)


def _member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, bytes, padding."""
    info = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, mode 0644: nothing of when and where
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % _BLOCK)


def write_sidecar(path: Path, outcomes: Sequence[Outcome]) -> None:
    """One row per offset, in offset order."""
    columns = {f.name: [getattr(o, f.name) for o in outcomes] for f in dataclasses.fields(Outcome)}
    try:
        pq.write_table(pa.table(columns, schema=SIDECAR_SCHEMA), path, compression="zstd", write_statistics=True, write_page_checksum=True)
    except OSError as e:
        raise durable.translate(e, path) from e


def read_sidecar(source: Path | bytes) -> pa.Table:
    """Raises Corrupt naming the file."""
    name = str(source) if isinstance(source, Path) else f"sidecar of {len(source)} bytes"
    try:
        return pq.read_table(source if isinstance(source, Path) else io.BytesIO(source))
    except (pa.ArrowException, OSError) as e:
        raise Corrupt(f"{name}: not a readable parquet: {e}") from e


def index_shard(path: Path) -> list[ShardSample]:
    """The samples of a local tar, by its headers alone.  Raises Corrupt naming file and reason."""
    images: list[tuple[int, str, int, int]] = []
    described: set[int] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, ext = member.name.partition(".")
                if ext == "json":
                    described.add(int(stem))
                else:
                    images.append((int(stem), ext, member.offset_data, member.size))
    except (tarfile.TarError, ValueError, EOFError) as e:
        if _is_empty(path):
            return []
        raise Corrupt(f"{path}: not a shard: {e}") from e
    if len(described) != len(images) or any(offset not in described for offset, *_ in images):
        raise Corrupt(f"{path}: {len(images)} images but {len(described)} descriptions: cut short or not a shard")
    if images and images[-1][2] + images[-1][3] > path.stat().st_size:
        raise Corrupt(f"{path}: cut short inside member {images[-1][0]:020d}")
    return [ShardSample(i, *image) for i, image in enumerate(images)]


def _is_empty(path: Path) -> bool:
    """A tar without members is all zero blocks."""
    return path.stat().st_size == tarfile.RECORDSIZE and not any(path.read_bytes())
