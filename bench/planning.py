"""What planning a round costs, from 1,000 to 100,000 shards of 10,000 samples each, and what the plain way costs in the same run.

    python -m bench.planning [--shards 1000,10000,100000] [--rounds 20] [--ways memory,delta,plain,sampler]

Each size in a process of its own: every shard lies before the learner's cursor or behind it, half and half, the reservoir is full and points all over
the window, and between rounds one shard arrives, and a tenth of the time one expires or is rewritten.  A round is planned and recorded, its
order made, its end reckoned (cursor, reservoir, table), and its state made for a checkpoint.  `memory`: the catalog costs nothing; `delta`: the
real table, read between rounds.  `plain` filters and sorts a list of all rows for each round.  `sampler` permutes the numbers of all samples, as
torch's samplers do at the start of a pass; over 10^8 samples it is left out.  Peak memory is of the whole process, torch included.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from streamlearn.contract.catalog import EXPIRED, LIVE, REPLACED, Advance, Changes, DeltaCatalog, ShardRow
from streamlearn.contract.config import StreamConfig
from streamlearn.contract.object_store import FolderStore
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished
from streamlearn.stream.replay import Reservoir
from streamlearn.stream.rounds import order
from streamlearn.stream.table import Table

SAMPLES = 10_000  # in a shard
PARTITIONS = 64
BATCH = 4096
TOPIC = "candidates"


class Source(Protocol):
    """A catalog, and how it grows."""

    def changes(self, after: int) -> Changes: ...
    def append(self, rows: list[ShardRow]) -> None: ...
    def end(self, row: ShardRow, status: str) -> None: ...


def row_of(number: int) -> ShardRow:
    """The shards of all partitions in turn."""
    partition, first = number % PARTITIONS, number // PARTITIONS * SAMPLES
    sha256 = f"{number:064x}"
    return ShardRow(
        key=f"shards/dt=2026-11-21/{TOPIC}/{partition}/{first:020d}-{first + SAMPLES:020d}-{sha256[-12:]}.tar",
        sha256=sha256,
        bytes=SAMPLES * 110_000,
        num_samples=SAMPLES,
        topic=TOPIC,
        partition=partition,
        first_offset=first,
        end_offset=first + SAMPLES,
        first_fetched_at="2026-11-21T00:00:00.000Z",
        last_fetched_at="2026-11-21T00:05:00.000Z",
        day="2026-11-21",
        committed=number,
    )


class Memory:
    """The rows, with what changed last at the end."""

    def __init__(self, rows: list[ShardRow]):
        self.new, self.ended, self.version = rows, list[ShardRow](), 0

    def changes(self, after: int) -> Changes:
        found = Changes(self.version, self.new, self.ended)
        self.new, self.ended = [], []
        return found

    def append(self, rows: list[ShardRow]) -> None:
        self.new += rows
        self.version += 1

    def end(self, row: ShardRow, status: str) -> None:
        self.version += 1
        self.ended.append(replace(row, status=status))
        if status == REPLACED:
            self.new.append(replace(row, key=row.key.replace(".tar", "-again.tar"), replaces=row.key))


class Delta:
    """The real table in a folder; the first rows in commits of a thousand."""

    def __init__(self, folder: Path, rows: list[ShardRow]):
        self.catalog = DeltaCatalog(str(folder), log_id="bench")
        for i in range(0, len(rows), 1000):
            self.append(rows[i : i + 1000])

    def changes(self, after: int) -> Changes:
        return self.catalog.changes(after)

    def append(self, rows: list[ShardRow]) -> None:
        ends: dict[int, tuple[int, int]] = {}
        for row in rows:
            ends[row.partition] = (min(ends.get(row.partition, (row.first_offset, 0))[0], row.first_offset), row.end_offset)
        self.catalog.commit(rows, [Advance(TOPIC, p, *ends[p]) for p in ends])

    def end(self, row: ShardRow, status: str) -> None:
        again = replace(row, key=row.key.replace(".tar", "-again.tar"), replaces=row.key)
        self.catalog.replace([row.key], [again] if status == REPLACED else [], status=status)


def midway(config: StreamConfig, rows: list[ShardRow]) -> Position:
    """A learner that has learnt these rows: its reservoir is full of samples from all over them."""
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.integers(0, len(rows), config.reservoir))
    refs = np.unique(np.stack([numbers, rng.integers(0, SAMPLES, config.reservoir)], 1), axis=0)
    total = len(rows) * SAMPLES
    reservoir = Reservoir(
        config.seed,
        config.reservoir,
        refs_N2=refs,
        uses_N=np.zeros(len(refs), np.int64),
        count=total,
        alive=total,
        holes=config.reservoir - len(refs),
    )
    table = Table.of((int(n), rows[n].key, rows[n].sha256) for n in np.unique(refs[:, 0]))
    cursor = {f"{r.topic}/{r.partition}": r.end_offset for r in rows}
    return replace(Position.start(config), cursor=cursor, reservoir=reservoir, table=table, next_shard=len(rows), fresh=total)


def rounds(shards: int, count: int, make: Callable[[list[ShardRow]], Source], folder: Path) -> dict[str, float]:
    """Milliseconds of the first look and of a round (median, most, CPU), MiB at the peak."""
    config, rng = StreamConfig(max_replays=20), random.Random(0)
    rows = [row_of(n) for n in range(shards)]
    source, position = make(list(rows)), midway(config, rows[: shards // 2])
    live, arrived = rows[: shards // 2], shards
    del rows
    planner, times = Planner(config, source, FolderStore(folder), batch=BATCH), list[tuple[float, float]]()  # type: ignore[arg-type]
    began = time.perf_counter()
    planner.look()
    first = time.perf_counter() - began
    for n in range(count):
        began, cpu = time.perf_counter(), time.process_time()
        planned = planner.planned(position)
        assert planned is not None and planned.record is not None and planned.record.fresh == SAMPLES
        order(config.seed, planned.record, planned.reservoir)
        position = finished(planned)
        position.to_state()
        if n:  # the first one also passes all that was learnt before
            times.append((1000 * (time.perf_counter() - began), 1000 * (time.process_time() - cpu)))
        source.append([row_of(arrived)])
        arrived += 1
        if n % 10 in (3, 7):
            source.end(live.pop(rng.randrange(len(live))), EXPIRED if n % 10 == 3 else REPLACED)
    return found(first, times)


def found(first: float, times: list[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = zip(*times, strict=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first": 1000 * first, "median": statistics.median(wall), "most": max(wall), "cpu": statistics.median(cpu), "MiB": peak}


def plain(shards: int, count: int) -> dict[str, float]:
    """All rows listed, filtered and sorted for each round."""
    rows, times = [row_of(n) for n in range(shards)], list[tuple[float, float]]()
    cursor = {(r.topic, r.partition): r.end_offset for r in rows[: shards // 2]}
    for _ in range(count):
        began, cpu = time.perf_counter(), time.process_time()
        fresh = sorted(
            (r for r in rows if r.status == LIVE and r.end_offset > cursor.get((r.topic, r.partition), 0)),
            key=lambda r: (r.committed, r.place, r.first_offset),
        )
        samples = [(0, i) for i in range(fresh[0].num_samples)]
        learnt = [r.key for r in rows if r.end_offset <= cursor.get((r.topic, r.partition), 0)]
        samples += [(random.randrange(len(learnt)), random.randrange(SAMPLES)) for _ in range(SAMPLES)]
        random.shuffle(samples)
        times.append((1000 * (time.perf_counter() - began), 1000 * (time.process_time() - cpu)))
        cursor[fresh[0].topic, fresh[0].partition] = fresh[0].end_offset
    return found(0.0, times)


def sampler(shards: int) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    torch.randperm(shards * SAMPLES)
    return found(0.0, [(1000 * (time.perf_counter() - began), 1000 * (time.process_time() - cpu))])


def measure(way: str, shards: int, count: int) -> dict[str, float]:
    if way == "plain":
        return plain(shards, min(5, count))
    if way == "sampler":
        return sampler(shards)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        return rounds(shards, count, Memory if way == "memory" else lambda rows: Delta(home / "catalog", rows), home / "store")


def compare(sizes: list[int], count: int, ways: list[str]) -> None:
    columns = {"first": "first look ms", "median": "round ms", "most": "at most ms", "cpu": "CPU ms", "MiB": "peak MiB"}
    print(f"{'shards':>8} {'samples':>14}  {'way':7}" + "".join(f"{name:>15}" for name in columns.values()))
    for shards in sizes:
        for way in ways:
            if way == "sampler" and shards * SAMPLES > 10**8:
                continue
            command = [sys.executable, "-m", "bench.planning", "--only", way, "--shards", str(shards), "--rounds", str(count)]
            line = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"{shards:8d} {shards * SAMPLES:14,d}  {way:7}" + "".join(f"{line[name]:15.1f}" for name in columns), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="1000,3000,10000,30000,100000")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--ways", default="memory,delta,plain,sampler")
    parser.add_argument("--only")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, int(args.shards), args.rounds)))
    else:
        compare([int(s) for s in args.shards.split(",")], args.rounds, args.ways.split(","))
