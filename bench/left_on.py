"""Leave a learner of several ranks on, and kill it again and again: any rank, torchrun itself, whoever writes a checkpoint, on a disk that is full at times.

    python -m bench.left_on --home runs/left-on --kills 30 --ranks 2

Real processes under torchrun, the real role, stream and checkpoints (bench/left_on_worker.py); whoever starts torchrun again when it was killed is this
program.  Shards keep arriving.  At the end the rounds that were recorded are learnt once more, from nothing, by a group that nobody kills: what was
learnt in which step, and all that is remembered at the end, must be the same to the last bit.  Exit code 1 if anything is wrong.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.left_on_worker import CONFIG, EVERY, KINDS, WHEN, newest
from bench.passes import A_SHARD, coloured
from bench.shards import publish
from streamlearn.contract import durable
from streamlearn.contract.durable import read_lines
from streamlearn.contract.object_store import POINTER, FolderStore
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.stream.audit import audit

STRIKES = ("a rank", "torchrun", "the writer of a checkpoint")
FRESH = int(CONFIG.train.batch * CONFIG.stream.fresh_fraction)  # images of a batch
AHEAD = 12  # steps that there are always images for, after the newest checkpoint: two checkpoints can come
WORKER = "bench.left_on_worker"


@dataclass
class Group:
    """torchrun and its ranks."""

    home: Path
    ranks: int
    deadline: float  # monotonic
    samples: int = 0  # that have arrived
    agent: "subprocess.Popen[bytes] | None" = None
    starts: int = 0

    def start(self) -> None:
        here = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]  # whatever this machine is called
        many = ["--nproc-per-node", str(self.ranks), "--max-restarts", "10000", "--monitor-interval", "0.2"]
        command = ["-m", "torch.distributed.run", *here, *many, "-m", WORKER, str(self.home)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with (self.home / "log.txt").open("ab") as log:
            self.agent = subprocess.Popen([sys.executable, *command], env=env, stdout=log, stderr=log)
        self.starts += 1

    def living(self) -> list[psutil.Process]:
        """The ranks that torchrun has started and that have not ended."""
        try:
            assert self.agent is not None
            children = psutil.Process(self.agent.pid).children()
            return [c for c in children if c.status() != psutil.STATUS_ZOMBIE and WORKER in c.cmdline()]
        except psutil.NoSuchProcess:
            return []

    def feed(self) -> None:
        """Images arrive as they are learnt."""
        while self.samples < (newest(FolderStore(self.home / "store")) + AHEAD) * FRESH:
            some = range(self.samples, self.samples + A_SHARD)
            publish(self.home, [coloured(n) for n in some], "png", A_SHARD, start=some.start)
            self.samples = some.stop

    def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait; a group that has ended is started again."""
        while not holds():
            self.feed()
            if self.agent is None or self.agent.poll() is not None:
                self.start()
            self._rest(what)

    def end(self) -> None:
        """Wait until it has learnt everything; nothing more arrives."""
        durable.write(self.home / "orders" / "end", str(self.samples).encode())
        while self.agent is None or self.agent.poll() != 0:
            if self.agent is None or self.agent.poll():
                self.start()
            self._rest("its end")

    def _rest(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            raise SystemExit(f"time is over while waiting for {what}; see {self.home / 'log.txt'}")
        time.sleep(0.1)


@dataclass
class Trouble:
    """Strikes, and counts."""

    group: Group
    rng: random.Random
    killed: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)  # what a writer was putting when it was killed
    full: int = 0  # times the disk was
    orphans: int = 0  # ranks that outlived torchrun
    pointer: int = 0  # at the last kill

    def strike(self, kind: str, *, soon: bool, full: bool) -> None:
        """`soon`: whether or not the group has got anywhere since the last time; `full`: the disk is, from a checkpoint before it on."""
        group, home = self.group, self.group.home
        store, orders = FolderStore(home / "store"), home / "orders"
        if not soon:
            group.until("a checkpoint", lambda: newest(store) > self.pointer)
        if full:
            before = _lines(home / "events.txt")
            (orders / "full").touch()
            self.full += 1
            group.until("a put on a full disk", lambda: _lines(home / "events.txt") > before)
        time.sleep(self.rng.uniform(0, 1.5))
        if kind == "the writer of a checkpoint":
            (orders / "full").unlink(missing_ok=True)
            self._writer(orders)
        elif kind == "torchrun":
            self._agent()
        else:
            group.until("a rank", self._rank)
        (orders / "full").unlink(missing_ok=True)
        self.killed[kind] += 1
        self.pointer = newest(store)

    def _rank(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # there is none just now
            victim = self.rng.choice(self.group.living())
            victim.kill()
            self.group.until("its end", lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
            return True
        return False

    def _writer(self, orders: Path) -> None:
        kind, when = self.rng.choice(KINDS), self.rng.choice(WHEN)
        rank = self.rng.randrange(self.group.ranks) if kind == "part" else 0
        order = orders / f"die-{kind}-{when}-{rank}"
        order.touch()
        self.group.until(f"{order.name}", lambda: not order.exists())
        self.written[f"{when} the {kind}"] += 1

    def _agent(self) -> None:
        self.group.until("torchrun", lambda: bool(self.group.living()))
        ranks, agent = self.group.living(), self.group.agent
        assert agent is not None
        agent.kill()
        agent.wait()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        self.orphans += len(alive)
        for rank in alive:
            rank.kill()


def _lines(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def drive(home: Path, kills: int, ranks: int, seed: int, limit_s: float) -> Trouble:
    """Until everything is learnt."""
    (home / "orders").mkdir(parents=True)
    rng, group = random.Random(seed), Group(home, ranks, time.monotonic() + limit_s)
    group.feed()
    trouble = Trouble(group, rng)
    kinds = [STRIKES[i % len(STRIKES)] for i in range(kills)]
    rng.shuffle(kinds)
    try:
        for done, kind in enumerate(kinds):
            trouble.strike(kind, soon=rng.random() < 0.2, full=done % 3 == 1)
            print(
                f"{time.strftime('%H:%M:%S')} {done + 1}: {kind} killed, newest checkpoint {trouble.pointer}", file=sys.stderr, flush=True
            )
        group.end()
    finally:
        if group.agent is not None and group.agent.poll() is None:
            group.agent.send_signal(signal.SIGTERM)
            group.agent.wait()
    return trouble


def undisturbed(home: Path, ranks: int, samples: int, limit_s: float) -> Path:
    """A home of its own, with the same shards and rounds, learnt by a group that nobody kills."""
    other = home / "undisturbed"
    shutil.copytree(home / "store", other / "store", ignore=shutil.ignore_patterns("checkpoints", "train"))
    (other / "orders").mkdir()
    Group(other, ranks, time.monotonic() + limit_s, samples).end()
    return other


@dataclass
class Told:
    """A rank's journal."""

    steps: dict[int, Any] = field(default_factory=dict)  # as each was learnt the last time
    again: int = 0  # steps that were learnt before, by a start that was lost
    differing: list[int] = field(default_factory=list)  # of them, those that were not the same
    lost: list[int] = field(default_factory=list)  # at each start, the steps that were
    astray: list[int] = field(default_factory=list)  # starts at another step than the newest checkpoint's


def read(home: Path, rank: int) -> Told:
    told, at = Told(), 0
    for line in read_lines(home / "journal" / f"{rank}.jsonl"):
        if "start" in line:
            told.lost.append(at - line["start"])
            if line["start"] != line["newest"]:
                told.astray.append(line["start"])
            at = line["start"]
            continue
        step, learnt = line["step"], (line["numbers"], line["fresh"])
        told.again += step in told.steps
        if step != at or told.steps.get(step, learnt) != learnt:
            told.differing.append(step)
        told.steps[step], at = learnt, step + 1
    return told


def different(a: Any, b: Any, at: str = "") -> list[str]:
    """Paths at which two states are not the same to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [at]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [path for key in a for path in different(a[key], b[key], f"{at}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [path for i, (x, y) in enumerate(zip(a, b, strict=True)) for path in different(x, y, f"{at}.{i}")]
    return [] if a == b else [at]


@dataclass
class Result:
    table: list[tuple[str, object]]
    wrong: list[str]


def compare(home: Path, other: Path, trouble: Trouble) -> Result:
    """Every promise that was broken, and what there is to count."""
    ranks, samples, store = trouble.group.ranks, trouble.group.samples, FolderStore(home / "store")
    told, calm = [read(home, rank) for rank in range(ranks)], [read(other, rank) for rank in range(ranks)]
    states = [Checkpoints(FolderStore(at / "store"), keep=CONFIG.train.keep_checkpoints).load() for at in (home, other)]
    assert states[0] is not None and states[1] is not None
    recorded = audit(CONFIG.stream, store, states[0]["stream"])
    fresh = Counter(n for t in told for numbers, new in t.steps.values() for n, is_new in zip(numbers, new, strict=True) if is_new)
    published = [set((at / "published.txt").read_text().splitlines()) for at in (home, other)]
    steps, differs = list(range(states[0]["step"])), different(states[0], states[1])
    wrong = [
        what
        for what, good in {
            "a sample of the fresh stream is missing, or was learnt as fresh twice": fresh == Counter(range(samples)),
            "the recorded rounds name one": len(recorded.fresh) == samples and set(recorded.fresh.values()) == {1},
            "a step is missing": all(sorted(t.steps) == steps for t in told) and recorded.batches == len(steps),
            f"steps learnt again saw other samples: {[t.differing for t in told]}": not any(t.differing for t in told),
            f"starts did not go on from the newest checkpoint: {[t.astray for t in told]}": not any(t.astray for t in told),
            "the steps are not those of the undisturbed group": [t.steps for t in told] == [t.steps for t in calm],
            f"what is remembered differs: {differs}": not differs,
            "the snapshots are not those of the undisturbed group": published[0] == published[1],
            f"{trouble.orphans} ranks outlived torchrun": not trouble.orphans,
        }.items()
        if not good
    ]
    lost = [n for n in told[0].lost[1:] if n]
    named = {k for e in json.loads(store.get(POINTER))["checkpoints"] for k in (e["key"], *e.get("parts", ()))}
    table: list[tuple[str, object]] = [
        ("kills", trouble.killed.total()),
        *((f"  of {kind}", n) for kind, n in sorted(trouble.killed.items())),
        ("  of a writer", ", ".join(f"{what} {n}" for what, n in sorted(trouble.written.items()))),
        ("times the disk was full", f"{trouble.full} ({_lines(home / 'events.txt')} puts refused)"),
        ("starts of torchrun; of the group", f"{trouble.group.starts}; {len(told[0].lost)}"),
        ("steps", len(steps)),
        ("steps between checkpoints", EVERY),
        ("steps lost by a kill: mean, most", f"{sum(lost) / max(1, len(told[0].lost) - 1):.1f}, {max(lost, default=0)}"),
        ("steps learnt again", told[0].again),
        ("samples fresh exactly once", sum(n == 1 for n in fresh.values())),
        ("of", samples),
        ("snapshots", len(published[0])),
        ("objects that no checkpoint names", len(set(store.list("checkpoints/")) - named - {POINTER})),
    ]
    return Result(table, wrong)


def run(home: Path, kills: int, ranks: int, seed: int, limit_s: float) -> Result:
    began = time.monotonic()
    trouble = drive(home, kills, ranks, seed, limit_s)
    took = time.monotonic() - began
    result = compare(home, undisturbed(home, ranks, trouble.group.samples, limit_s), trouble)
    result.table.append(("seconds, before the undisturbed group", round(took)))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=7200)
    args = parser.parse_args()
    shutil.rmtree(args.home, ignore_errors=True)
    found = run(args.home.resolve(), args.kills, args.ranks, args.seed, args.limit_s)
    print("\n".join(f"{name:40} {value}" for name, value in found.table))
    print("\n".join(found.wrong) or "the same sequence, to the last bit")
    sys.exit(bool(found.wrong))
