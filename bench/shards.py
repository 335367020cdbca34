"""Shards of given images in a home, as the fetcher would have sealed them: for benchmarks that begin where the learner does."""

from collections.abc import Sequence
from pathlib import Path

from streamlearn.contract.catalog import Advance, DeltaCatalog, ShardRow
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import ShardWriter, shard_key

TOPIC = "candidates"


def open_home(home: Path) -> tuple[DeltaCatalog, FolderStore]:
    return DeltaCatalog(str(home / "store" / "catalog" / "shards"), log_id="bench"), FolderStore(home / "store")


def publish(home: Path, images: Sequence[bytes], ext: str, a_shard: int, start: int = 0, day: str = "2026-11-21") -> None:
    """All of them in their order, in shards of so many, one partition from offset `start` on, one commit; fetched on `day`."""
    home.mkdir(parents=True, exist_ok=True)
    (catalog, store), rows = open_home(home), list[ShardRow]()
    staged = home / "staged.tar"
    for first in range(start, start + len(images), a_shard):
        end = min(first + a_shard, start + len(images))
        writer = ShardWriter(staged)
        for offset in range(first, end):
            writer.add(offset, images[offset - start], ext, {"n": offset})
        sha256, size = writer.close()
        key = shard_key(day, TOPIC, 0, first, end, sha256)
        store.put_file(key, staged)
        rows.append(
            ShardRow(
                key=key,
                sha256=sha256,
                bytes=size,
                num_samples=end - first,
                topic=TOPIC,
                partition=0,
                first_offset=first,
                end_offset=end,
                first_fetched_at=f"{day}T00:00:00.000Z",
                last_fetched_at=f"{day}T00:00:00.000Z",
                day=day,
            )
        )
    catalog.commit(rows, [Advance(TOPIC, 0, start, start + len(images))])
