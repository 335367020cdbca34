"""Real shards of real (drawn) images in a real catalog."""

import hashlib
import threading

from streamlearn.contract.catalog import Advance, DeltaCatalog, ShardRow
from streamlearn.contract.config import CropConfig, StreamConfig
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import STORED, Outcome, ShardWriter, shard_key, sidecar_key, write_sidecar
from streamlearn.stream.loader import Stream
from tests.ingest.server import picture

CONFIG = StreamConfig(
    crops=(CropConfig(count=2, size=16, scale=(0.3, 1.0)), CropConfig(count=1, size=8, scale=(0.05, 0.3))),
    round_samples=12,
    reservoir=10,
    workers=0,
    prefetch=2,
    max_replay_per_fresh=2.0,
    poll_s=0.01,
)


def url(partition, offset):
    return f"http://h{partition}.example/{offset}.jpg"


class World:
    def __init__(self, home):
        self.home, self.ends, self.store = home, {}, FolderStore(home / "store")
        home.mkdir(parents=True, exist_ok=True)
        self.catalog = DeltaCatalog(str(home / "store" / "catalog"), log_id="log")

    def add(self, count, partition=0, spoilt=()):
        """One more shard of `count` images; those in `spoilt` are not images."""
        first = self.ends.get(partition, 0)
        path = self.home / "staged.tar"
        writer, outcomes = ShardWriter(path), []
        for offset in range(first, first + count):
            body = b"\xff\xd8\xff garbage" if offset in spoilt else picture(1000 * partition + offset)
            start = writer.add(offset, body, "jpg", {"n": offset})
            outcomes.append(
                Outcome(
                    offset=offset, outcome=STORED, url=url(partition, offset), sha256=hashlib.sha256(body).hexdigest(), ext="jpg",
                    fetched_at="2026-11-21T00:00:00.000Z", member_offset=start, member_size=len(body), bytes=len(body),
                )
            )  # fmt: skip
        sha256, size = writer.close()
        key = shard_key("2026-11-21", "candidates", partition, first, first + count, sha256)
        self.store.put_file(key, path)
        write_sidecar(path.with_suffix(".parquet"), outcomes)
        self.store.put_file(sidecar_key(key), path.with_suffix(".parquet"))
        self.ends[partition] = first + count
        row = ShardRow(
            key=key, sha256=sha256, bytes=size, num_samples=count, topic="candidates", partition=partition, first_offset=first,
            end_offset=first + count, first_fetched_at="2026-11-21T00:00:00Z", last_fetched_at=f"2026-11-21T00:00:{first % 60:02d}Z", day="2026-11-21",
        )  # fmt: skip
        self.catalog.commit([row], [Advance("candidates", partition, first, first + count)])
        return key

    def stream(self, state=None, batch=4, cache=None, rank=0, ranks=1, **more):
        stop = threading.Event()
        config = CONFIG.model_copy(update=more)
        place = cache or self.home / "cache"
        return Stream(config, self.catalog, self.store, place, batch=batch, state=state, stop=stop, rank=rank, ranks=ranks)


def take(stream, count):
    """The next batches; stops early when there is nothing to learn."""
    found = []
    for batch in stream.batches():
        if batch is None or len(found) == count:
            break
        found.append(batch)
        if len(found) == count:
            break
    return found


def first_spec(stream):
    """What the first batch is made of, once its shards are here."""
    while (item := stream.ahead.next()) is None:
        stream.ahead.foresee(frozenset())
        stream.cache.wait(1.0)
    return item
