"""What the catalog costs as it grows, with its upkeep and without.

    python -m bench.catalog --commits 2000

Commits one shard at a time, four partitions in turn, into a table in a folder; at some sizes it times a commit, the reading of a position, of
all rows, of the three newest (what a learner asks for again and again), and the opening of the table by a new process.  On S3 every file that
is opened is a request of some 20 ms besides: the number of files tells.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from deltalake import DeltaTable

from streamlearn.contract import upkeep
from streamlearn.contract.catalog import Advance, DeltaCatalog, ShardRow

PARTITIONS, SAMPLES = 4, 100
SIZES = (10, 100, 250, 500, 1000, 2000, 4000, 8000)
STAMP = "2026-11-21T00:00:00.000Z"


def row_of(partition: int, i: int) -> ShardRow:
    first, end = i * SAMPLES, (i + 1) * SAMPLES
    return ShardRow(
        key=f"shards/dt={STAMP[:10]}/candidates/{partition}/{first:020d}-{end:020d}-{i:012x}.tar",
        sha256=f"{i:064x}",
        bytes=10**7,
        num_samples=SAMPLES,
        topic="candidates",
        partition=partition,
        first_offset=first,
        end_offset=end,
        first_fetched_at=STAMP,
        last_fetched_at=STAMP,
        day=STAMP[:10],
    )


def timed(call: Callable[[], object], times: int = 3) -> float:
    """Milliseconds, the median."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return 1000 * median(took)


def grow(folder: Path, commits: int) -> None:
    catalog = DeltaCatalog(str(folder), log_id="bench")
    recent: list[float] = []
    for n in range(1, commits + 1):
        partition, i = (n - 1) % PARTITIONS, (n - 1) // PARTITIONS
        row = row_of(partition, i)
        began = time.perf_counter()
        catalog.commit([row], [Advance(row.topic, partition, row.first_offset, row.end_offset)])
        recent = [*recent[-99:], 1000 * (time.perf_counter() - began)]
        if n in SIZES or n == commits:
            newest = catalog.version()
            cells = (
                sum(recent) / len(recent),
                timed(lambda: catalog.position("candidates", 0)),
                timed(catalog.rows),
                timed(lambda after=newest - 3: catalog.follow(after)),  # type: ignore[misc]
                timed(lambda: DeltaCatalog(str(folder), log_id="bench").position("candidates", 0)),
            )
            files = len(DeltaTable(str(folder)).file_uris())
            print(f"{n:8} {files:8} " + " ".join(f"{cell:10.1f}" for cell in cells), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=2000)
    args = parser.parse_args()
    for name, every in (("without upkeep", sys.maxsize), ("with upkeep", upkeep.TIDY_EVERY)):
        upkeep.TIDY_EVERY = every
        print(f"{name}; ms (a commit: mean of the last hundred)\n{'commits':>8} {'files':>8}", end=" ")
        print(" ".join(f"{head:>10}" for head in ("commit", "position", "rows", "follow 3", "open")))
        with tempfile.TemporaryDirectory(prefix="catalog-") as made:
            grow(Path(made) / "shards", args.commits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
