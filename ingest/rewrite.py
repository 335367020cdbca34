"""Writing live shards anew: several neighbours into one, or one without some of its samples.

The new tar and sidecar follow from the old ones and from what is dropped alone, so an attempt that is repeated after a crash overwrites
nothing but itself.  Images and descriptions are copied byte by byte, in the same order.
"""

import dataclasses
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingest.fetch.screen import Reason
from streamlearn.contract.catalog import ShardRow
from streamlearn.contract.errors import Corrupt
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import REJECTED, STORED, Outcome, ShardWriter, read_sidecar, shard_key, sidecar_key, write_sidecar

Drop = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Rewritten:
    """A new shard on local disk, not put yet."""

    row: ShardRow
    tar: Path
    sidecar: Path
    removed: dict[str, list[int]]  # old key -> indices of the samples that were left out
    emptied: int  # rows of the sidecar that tell nothing any more

    def put(self, store: ObjectStore) -> None:
        """The sidecar last: whoever finds one finds its tar."""
        store.put_file(self.row.key, self.tar)
        store.put_file(sidecar_key(self.row.key), self.sidecar)

    def unlink(self) -> None:
        self.tar.unlink(missing_ok=True)
        self.sidecar.unlink(missing_ok=True)


def rewritten(store: ObjectStore, rows: Sequence[ShardRow], folder: Path, drop: Drop | None = None) -> Rewritten:
    """The rows, neighbours in offset order, as one shard without what `drop` says.  Raises NotFound, Corrupt, StoreFull."""
    first = rows[0]
    tar = folder / f"{first.topic}-{first.partition}-{first.first_offset}.tar"
    writer, outcomes, removed, emptied = ShardWriter(tar), list[Outcome](), dict[str, list[int]](), 0
    try:
        for row in rows:
            gone, blank = _copy(store, row, writer, outcomes, drop)
            emptied += blank
            if gone:
                removed[row.key] = gone
    except BaseException:
        writer.abort()
        raise
    sha256, size = writer.close()
    sidecar = tar.with_suffix(".parquet")
    write_sidecar(sidecar, outcomes)
    fetched = sorted(o.fetched_at for o in outcomes if o.outcome == STORED)
    row = dataclasses.replace(
        first,
        key=shard_key(first.day, first.topic, first.partition, first.first_offset, rows[-1].end_offset, sha256),
        sha256=sha256,
        bytes=size,
        num_samples=writer.num_samples,
        end_offset=rows[-1].end_offset,
        first_fetched_at=fetched[0] if fetched else "",
        last_fetched_at=fetched[-1] if fetched else "",
        replaces=",".join(r.key for r in rows),
    )
    return Rewritten(row, tar, sidecar, removed, emptied)


def _copy(store: ObjectStore, row: ShardRow, writer: ShardWriter, outcomes: list[Outcome], drop: Drop | None) -> tuple[list[int], int]:
    """Append one old shard; the indices of its samples that were left out, and how many rows were emptied."""
    found = read_sidecar(store.get(sidecar_key(row.key))).to_pylist()
    if [o["offset"] for o in found] != list(range(row.first_offset, row.end_offset)):
        raise Corrupt(f"{sidecar_key(row.key)}: does not cover {row.first_offset} to {row.end_offset}; restore it from a backup")
    old = writer.path.with_name(f"old-{writer.path.name}")
    gone, index, emptied = list[int](), 0, 0
    try:
        store.get_file(row.key, old)
        with tarfile.open(old, "r:", ignore_zeros=True) as tar:
            for outcome in found:
                dropped = drop is not None and drop(outcome)
                emptied += dropped
                if outcome["outcome"] == STORED:
                    image, meta = _sample(tar, outcome["offset"], row.key)
                    if dropped:
                        gone.append(index)
                    else:
                        outcome = outcome | {"member_offset": writer.add(outcome["offset"], image, outcome["ext"], meta)}
                    index += 1
                outcomes.append(_emptied(outcome["offset"]) if dropped else Outcome(**outcome))
    except tarfile.TarError as e:
        raise Corrupt(f"{row.key}: not a shard: {e}; restore it from a backup") from e
    finally:
        old.unlink(missing_ok=True)
    if index != row.num_samples:
        raise Corrupt(f"{row.key}: {index} samples, the catalog says {row.num_samples}; restore it from a backup")
    return gone, emptied


def _sample(tar: tarfile.TarFile, offset: int, key: str) -> tuple[bytes, dict[str, Any]]:
    """The next image and its description."""
    image, meta = tar.next(), tar.next()
    if image is None or meta is None or meta.name != f"{offset:020d}.json" or not image.name.startswith(f"{offset:020d}."):
        raise Corrupt(f"{key}: tar and sidecar differ at offset {offset}; restore them from a backup")
    body, described = tar.extractfile(image), tar.extractfile(meta)
    assert body is not None and described is not None  # a member of a type that has no bytes is no file of ours
    return body.read(), dict(json.loads(described.read()))


def _emptied(offset: int) -> Outcome:
    """Nothing remains but that something was here."""
    return Outcome(offset=offset, outcome=REJECTED, reason=str(Reason.TAKEN_DOWN))


def emptied_sidecar(store: ObjectStore, row: ShardRow, drop: Drop, folder: Path) -> int:
    """Empty rows of a sidecar whose tar need not change, in place; the number of rows."""
    found = read_sidecar(store.get(sidecar_key(row.key))).to_pylist()
    outcomes = [_emptied(o["offset"]) if drop(o) else Outcome(**o) for o in found]
    path = folder / "emptied.parquet"
    try:
        write_sidecar(path, outcomes)
        store.put_file(sidecar_key(row.key), path)
    finally:
        path.unlink(missing_ok=True)
    return sum(drop(o) for o in found)
