"""One shard under the magnifying glass: row, tar and sidecar against each other.

The catalog's row holds the tar's digest, so it is the judge: where the tar does not have it, the tar is damaged; where it has, and the
sidecar says otherwise, the sidecar is.  The tar is read once, front to back, in chunks; the sidecar in batches beside it.
"""

import hashlib
import json
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamlearn.contract.catalog import ShardRow
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import OUTCOMES, SIDECAR_SCHEMA, STORED, sidecar_key

CHUNK_BYTES = 4 * 2**20
BATCH_ROWS = 1024
MAX_JSON_BYTES = 2**20  # a description is a few hundred bytes; what claims more is not read
MAX_NAMED = 5  # problems of one shard that are told one by one
MAGIC = b"PAR1"  # ends every parquet
BACKUP = "restore it from a backup, or take the shard out of use with `streamlearn dataset takedown`"
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Finding:
    """Something is wrong.  kind: gap, overlap, position, log, row, missing, size, tar, sidecar or orphan."""

    kind: str
    where: str  # topic/partition, or the object's key
    what: str
    remedy: str


def check_shard(store: ObjectStore, row: ShardRow, *, contents: bool) -> list[Finding]:
    """Everything, or all but the contents.  Raises NotFound when an object vanishes while it is read."""
    found = check_objects(store, row)
    wrong = {finding.where for finding in found if finding.kind != "row"}
    if not contents or row.key in wrong:
        return found
    if sidecar_key(row.key) in wrong:  # the tar is still worth a look
        digest, _ = _Tar(store, row.key).finish()
        return found if digest == row.sha256 else [*found, _damaged(row, digest, [])]
    return found + check_contents(store, row)


def check_objects(store: ObjectStore, row: ShardRow) -> list[Finding]:
    """The row's key is of its fields; tar and sidecar are there, the tar of the right size, the sidecar ending as a parquet does."""
    found, side = [], sidecar_key(row.key)
    name = f"{row.first_offset:020d}-{row.end_offset:020d}-{row.sha256[:12]}.tar"
    if not row.key.endswith(f"/{row.topic}/{row.partition}/{name}"):
        found.append(Finding("row", row.key, f"the row's fields name it …/{row.topic}/{row.partition}/{name}", "restore the catalog"))
    try:
        size = store.size(row.key)
        if size != row.bytes:
            found.append(Finding("size", row.key, f"the tar has {size} bytes, the row says {row.bytes}", BACKUP))
    except NotFound:
        found.append(Finding("missing", row.key, f"no tar: {row.num_samples} samples are gone", BACKUP))
    try:
        end = store.get_range(side, max(0, store.size(side) - len(MAGIC)), len(MAGIC))
        if end != MAGIC:
            found.append(Finding("sidecar", side, f"not a whole parquet: it ends with {end!r}", BACKUP))
    except NotFound:
        outcomes = row.end_offset - row.first_offset
        found.append(Finding("missing", side, f"no sidecar: what became of {outcomes} offsets is not known", BACKUP))
    return found


def check_contents(store: ObjectStore, row: ShardRow) -> list[Finding]:
    """Reads every byte of tar and sidecar, both of which must be there; a finding each at most, naming what is wrong within."""
    sidecar, tar = _Sidecar(row), _Tar(store, row.key)
    members: list[str] = []
    try:
        for outcome in sidecar.read(store):
            tar.sound = tar.sound and not sidecar.wrong  # where rows are missing, so are places
            if outcome["outcome"] == STORED:
                members += tar.check_sample(row, outcome)
    except Corrupt as e:
        sidecar.wrong, tar.sound = [str(e)], False
    digest, stray = tar.finish()
    if digest != row.sha256:
        return [
            _damaged(row, digest, members),
            *([Finding("sidecar", sidecar.key, _several(sidecar.wrong), BACKUP)] if sidecar.wrong else []),
        ]
    if stray and not sidecar.wrong:  # else a consequence of rows that are not there
        members.append(f"the tar holds members before byte {stray} that no row names")
    wrong = sidecar.wrong + members
    return [Finding("sidecar", sidecar.key, _several(wrong), BACKUP)] if wrong else []


def _damaged(row: ShardRow, digest: str, members: Sequence[str]) -> Finding:
    what = f"the tar's sha256 is {digest}, the row says {row.sha256}"
    return Finding("tar", row.key, _several([what, *members]), BACKUP)


class _Sidecar:
    """The rows of a sidecar in order, while its own rules are checked."""

    def __init__(self, row: ShardRow):
        self.row, self.key, self.wrong, self.expected = row, sidecar_key(row.key), list[str](), row.first_offset

    def read(self, store: ObjectStore) -> Iterator[dict[str, Any]]:
        """Raises Corrupt when it cannot be parsed."""
        stored = 0
        with tempfile.TemporaryDirectory(prefix="streamlearn-audit-") as folder:
            path = Path(folder) / "sidecar.parquet"
            store.get_file(self.key, path)
            for outcome in _rows(path):
                self._place(outcome["offset"])
                if outcome["outcome"] not in OUTCOMES:
                    self.wrong.append(f"offset {outcome['offset']} ended as {outcome['outcome']!r}, which is no outcome")
                stored += outcome["outcome"] == STORED
                yield outcome
        if self.expected < self.row.end_offset:
            self._lacks(self.row.end_offset)
        if stored != self.row.num_samples and not self.wrong:
            self.wrong.append(f"{stored} offsets are stored, the catalog's row says {self.row.num_samples}")

    def _place(self, offset: int) -> None:
        if not self.row.first_offset <= offset < self.row.end_offset:
            self.wrong.append(f"offset {offset} is not of this shard")
        elif offset < self.expected:
            self.wrong.append(f"offset {offset} stands twice, or out of order")
        else:
            if offset > self.expected:
                self._lacks(offset)
            self.expected = offset + 1

    def _lacks(self, until: int) -> None:
        first, last = self.expected, until - 1
        self.wrong.append(f"offset {first} is missing" if first == last else f"offsets {first} to {last} are missing")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Of a local sidecar, batch by batch.  Raises Corrupt."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            lacks = set(SIDECAR_SCHEMA.names) - set(file.schema_arrow.names)
            if lacks:
                raise Corrupt(f"no column {', '.join(sorted(lacks))}")
            for batch in file.iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise Corrupt(f"not a readable parquet: {str(e).partition(chr(10))[0]}") from e


class _Tar:
    """A tar, front to back, in chunks; hashed as it goes by."""

    def __init__(self, store: ObjectStore, key: str):
        self.store, self.key, self.at, self.sound = store, key, 0, True
        self._read, self._chunk, self._sha256 = 0, memoryview(b""), hashlib.sha256()

    def check_sample(self, row: ShardRow, outcome: dict[str, Any]) -> list[str]:
        """What is wrong with the two members of a stored offset, at the place where the sidecar has them."""
        offset, start = outcome["offset"], outcome["member_offset"]
        name, size = f"{row.topic}/{row.partition}/{offset}", outcome["member_size"]
        if start - _BLOCK != self.at and (self.sound or start - _BLOCK < self.at):
            self.sound = False
            return [f"{name} should begin at byte {self.at + _BLOCK} of the tar, the sidecar says {start}"]
        deque(self._pieces(start - _BLOCK - self.at), maxlen=0)  # past what is damaged
        wrong = self._header(f"{offset:020d}.{outcome['ext']}", size)
        digest, body = hashlib.sha256(), self._pieces(size)
        for piece in body:
            digest.update(piece)
        if digest.hexdigest() != outcome["sha256"]:
            wrong.append("the image has another sha256 than its row")
        self._take(-size % _BLOCK)
        wrong += self._description(row, outcome)
        self.sound = not wrong
        return [f"{name}: {', '.join(wrong)}"] if wrong else []

    def finish(self) -> tuple[str, int]:
        """(sha256 of the whole tar, the byte up to which there is something after the last member that was checked, or 0)."""
        stray = 0
        for piece in self._pieces(sys.maxsize):
            if bytes(piece).count(0) != len(piece):
                stray = self.at
        return self._sha256.hexdigest(), stray if self.sound else 0

    def _header(self, name: str, size: int) -> list[str]:
        try:
            info = tarfile.TarInfo.frombuf(self._take(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError as e:
            return [f"no member {name} ({e})"]
        return [] if (info.name, info.size) == (name, size) else [f"member {info.name} of {info.size} bytes instead of {name} of {size}"]

    def _description(self, row: ShardRow, outcome: dict[str, Any]) -> list[str]:
        """The JSON member behind the image says what the sidecar says."""
        name = f"{outcome['offset']:020d}.json"
        try:
            info = tarfile.TarInfo.frombuf(self._take(_BLOCK), "utf-8", "surrogateescape")
            if info.name != name or info.size > MAX_JSON_BYTES:
                return [f"member {info.name} of {info.size} bytes instead of {name}"]
            meta = json.loads(self._take(info.size))
            self._take(-info.size % _BLOCK)
        except (tarfile.HeaderError, ValueError) as e:
            return [f"no description {name} ({e})"]
        if not isinstance(meta, dict):
            return [f"{name} is no JSON object"]
        known = outcome | {"topic": row.topic, "partition": row.partition}
        needed = {"topic", "partition", "offset", "url", "sha256"}
        differ = sorted(key for key in known.keys() & (meta.keys() | needed) if meta.get(key) != known[key])
        return [f"the description has another {', '.join(differ)}"] if differ else []

    def _take(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end."""
        return b"".join(self._pieces(count))

    def _pieces(self, count: int) -> Iterator[memoryview]:
        while count > 0:
            if not self._chunk:
                self._chunk = memoryview(self.store.get_range(self.key, self._read, CHUNK_BYTES))
                self._read += len(self._chunk)
                self._sha256.update(self._chunk)
                if not self._chunk:
                    return
            piece, self._chunk = self._chunk[:count], self._chunk[count:]
            self.at += len(piece)
            count -= len(piece)
            yield piece


def _several(problems: Sequence[str]) -> str:
    more = len(problems) - MAX_NAMED
    return "; ".join(problems[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
