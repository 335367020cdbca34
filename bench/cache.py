"""What the learner waits for a far store: shards fetched ahead by several threads, ahead by one, and only when a batch needs them.

    python -m bench.cache [--latency-s 0.05] [--mb-per-s 20] [--step-s 0.4] [--rounds 6]

A folder store behind a delay for each request and a rate for each connection.  Rounds of 8 shards of 25 images of 100 kB (tiny pictures, padded: no
time goes into decoding), batches of 50, and a learner that sleeps through each step.  The order of samples is shuffled over a round, so its first
batch needs nearly all its shards.  The first round is not counted: nobody can be ahead of it.  All ways in one run, each with an empty cache;
the batches must be the same.  `needed` has no thread to spare and nothing ahead: a batch's shards one after another, once it is its turn.
"""

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.passes import coloured
from bench.shards import open_home, publish
from streamlearn.contract.config import CropConfig, StreamConfig
from streamlearn.contract.object_store import FolderStore
from streamlearn.stream.loader import Stream

A_SHARD, SHARDS, BATCH, IMAGE_BYTES = 25, 8, 50, 100_000
CONFIG = StreamConfig(
    crops=(CropConfig(count=1, size=8, scale=(0.5, 1.0)),),
    fresh_fraction=1.0,
    max_replay_per_fresh=0.0,
    round_samples=A_SHARD * SHARDS,
    workers=1,
    poll_s=0.02,
)
WAYS = {
    "ahead, 4 threads": {"downloads": 4},
    "ahead, 1 thread": {"downloads": 1},
    "needed, 1 thread": {"downloads": 1, "prefetch_bytes": 0, "prefetch": 1},
}


class Far(FolderStore):
    def __init__(self, root: Path, latency_s: float, bytes_per_s: float):
        super().__init__(root)
        self.latency_s, self.bytes_per_s = latency_s, bytes_per_s

    def size(self, key: str) -> int:
        time.sleep(self.latency_s)
        return super().size(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = super().get_range(key, start, length)
        time.sleep(self.latency_s + len(data) / self.bytes_per_s)
        return data


@dataclass
class Result:
    spent_s: float = 0.0
    waited_s: float = 0.0
    downloads: int = 0
    check: float = 0.0  # of the pixels

    @property
    def share(self) -> float:
        return self.waited_s / self.spent_s


def learn(home: Path, cache: Path, store: Far, config: StreamConfig, batches: int, step_s: float) -> Result:
    catalog, _ = open_home(home)
    stream = Stream(config, catalog, store, cache, batch=BATCH, state=None, stop=threading.Event())
    result, taken, began = Result(), 0, time.perf_counter()
    skipped = config.round_samples // BATCH
    for batch in stream.batches():
        if batch is None:
            continue
        taken += 1
        if taken == skipped + 1:
            began = time.perf_counter() - batch.wait_s
        if taken > skipped:
            result.waited_s += batch.wait_s
        result.check += float(batch.crops[0].double().sum())
        time.sleep(step_s)  # the learner's step
        if taken == batches:
            break
    result.spent_s, result.downloads = time.perf_counter() - began, stream.counters()["downloads"]
    stream.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-s", type=float, default=0.05)
    parser.add_argument("--mb-per-s", type=float, default=20.0)
    parser.add_argument("--step-s", type=float, default=0.4)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        home, count = Path(folder), A_SHARD * SHARDS * args.rounds
        publish(home, [coloured(n).ljust(IMAGE_BYTES, b"\0") for n in range(count)], "png", A_SHARD)
        store, results = Far(home / "store", args.latency_s, args.mb_per_s * 1e6), dict[str, Result]()
        for i, (way, more) in enumerate(WAYS.items()):
            config = CONFIG.model_copy(update=more)
            results[way] = learn(home, home / f"cache{i}", store, config, count // BATCH, args.step_s)
    worst = max(result.waited_s for result in results.values())
    print(f"{'way':18} {'downloads':>9} {'spent s':>8} {'waited s':>9} {'wait share':>10} {'waiting':>8}")
    for way, result in results.items():
        less = f"1/{worst / max(result.waited_s, 1e-9):.1f}"
        print(f"{way:18} {result.downloads:9} {result.spent_s:8.1f} {result.waited_s:9.2f} {result.share:10.1%} {less:>8}")
    assert len({round(result.check, 3) for result in results.values()}) == 1, "the batches differ"


if __name__ == "__main__":
    main()
