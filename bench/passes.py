"""Kill -9 a learner again and again during one pass, and count what it has learnt: each sample as fresh exactly once.

    python -m bench.passes --home runs/passes --samples 20000 --kills 100

The stream is the real one: shards, plan, workers, checkpoints.  The learner is a column of counters, one a sample, saved with the
stream's state as weights would be.  Each image is one flat colour that spells its number, and the learner reads the number off the pixels that
it is handed: so what is counted is what arrived.  Shards keep arriving while it runs.  Exit code 1 if anything is wrong.
"""

import argparse
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.shards import open_home, publish
from streamlearn.contract.config import CropConfig, StreamConfig
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.stream.audit import audit
from streamlearn.stream.loader import Stream

LEVELS, STEP = 40, 6  # of each channel: 64,000 colours, far enough apart to survive resizing and normalisation
BATCH, A_SHARD, EVERY = 40, 100, 5  # images, images, batches between checkpoints
CONFIG = StreamConfig(
    crops=(CropConfig(count=1, size=8, scale=(0.5, 1.0)),),
    jitter=0.0,
    blur=0.0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    fresh_fraction=0.7,
    max_replay_per_fresh=0.0,
    max_replays=8,
    reservoir=2000,
    round_samples=400,
    workers=1,
    poll_s=0.05,
)


def coloured(number: int) -> bytes:
    colour = (number % LEVELS * STEP, number // LEVELS % LEVELS * STEP, number // LEVELS**2 * STEP)
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, "PNG")
    return out.getvalue()


def numbers(crop_VBCSS: Tensor) -> list[int]:
    """What the images spell."""
    level_BC = (crop_VBCSS[0].mean((-1, -2)) * 255 / STEP).round().long()
    return (level_BC * torch.tensor([1, LEVELS, LEVELS**2])).sum(1).tolist()


def learn(home: Path, samples: int) -> None:
    """The role that is killed: goes on from its checkpoint until every sample was fresh."""
    torch.set_num_threads(1)
    catalog, store = open_home(home)
    checkpoints = Checkpoints(store, keep=2)
    saved = checkpoints.load() or {"fresh": torch.zeros(samples, dtype=torch.int64), "batches": 0, "stream": None}
    fresh, taken = saved["fresh"], saved["batches"]
    if int(fresh.sum()) >= samples:
        return  # it was killed between its last checkpoint and its end
    stream = Stream(CONFIG, catalog, store, home / "cache", batch=BATCH, state=saved["stream"], stop=threading.Event())
    state = saved
    try:
        for batch in stream.batches():
            if batch is None:
                if state["batches"] > checkpoints.last_step:
                    checkpoints.save(state, state["batches"], wait=True)
                continue
            for number, new in zip(numbers(batch.crops[0]), batch.fresh.tolist(), strict=True):
                fresh[number] += int(new)
            taken += 1
            state, over = {"fresh": fresh, "batches": taken, "stream": batch.taken()}, int(fresh.sum()) >= samples
            if over or taken % EVERY == 0:
                checkpoints.save(state, taken, wait=over)
            if over:
                return
    finally:
        checkpoints.wait()
        stream.close()


def drive(home: Path, samples: int, kills: int, seed: int, limit_s: float) -> int:
    """Start it, kill it within some seconds, start it again; then let it end.  The number of kills while it was learning."""
    rng, killed, step, deadline = random.Random(seed), 0, -1, time.monotonic() + limit_s
    command = [sys.executable, "-m", "bench.passes", "--home", str(home), "--samples", str(samples), "--learn"]
    shown = 0
    while time.monotonic() < deadline:
        # images come as learning goes on, and the last of them after the last kill: until then it cannot end by itself
        published = min(samples, -(-samples * (killed + 1) // (kills + 1) // A_SHARD) * A_SHARD)
        if published > shown:
            publish(home, [coloured(n) for n in range(shown, published)], "png", A_SHARD, start=shown)
            shown = published
        child = subprocess.Popen(command)
        if killed >= kills:
            if child.wait(timeout=max(1.0, deadline - time.monotonic())):
                raise SystemExit(f"the learner ended with {child.returncode}")
            return killed
        begun = _wait_for_progress(home, child, step, deadline)
        time.sleep(rng.uniform(0, 0.5))
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.wait()
        step = begun
    raise SystemExit(f"not done after {limit_s:.0f} s and {killed} kills")


def _wait_for_progress(home: Path, child: "subprocess.Popen[bytes]", step: int, deadline: float) -> int:
    """Until there is a checkpoint that was not there before: killed too early every time it would never get on."""
    pointer = home / "store" / "checkpoints" / "latest.json"
    before = step
    while child.poll() is None and time.monotonic() < deadline:
        now = pointer.stat().st_mtime_ns if pointer.exists() else -1
        if now != before:
            return now
        time.sleep(0.02)
    return before


def wrong(home: Path, samples: int) -> list[str]:
    """Every promise that was broken."""
    _, store = open_home(home)
    state = Checkpoints(store, keep=2).load()
    if state is None:
        return ["no checkpoint"]
    counts = np.bincount(state["fresh"].numpy(), minlength=2)
    planned = audit(CONFIG, store, state["stream"])
    found = []
    if counts[1] != samples or counts.sum() != samples:
        found.append(f"times learnt as fresh -> samples: {dict(enumerate(counts.tolist()))}, wanted {{1: {samples}}}")
    if len(planned.fresh) != samples or set(planned.fresh.values()) != {1}:
        found.append(f"the records name {len(planned.fresh)} fresh samples, {sum(planned.fresh.values())} times")
    if planned.batches != state["batches"]:
        found.append(f"{state['batches']} batches taken, the records have {planned.batches}")
    if max(planned.replay.values()) > CONFIG.max_replays + 1:  # what fills a last batch may be over
        found.append(f"a sample was replayed {max(planned.replay.values())} times")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=3600)
    parser.add_argument("--learn", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.learn:
        learn(args.home, args.samples)
        sys.exit()
    shutil.rmtree(args.home, ignore_errors=True)
    began = time.monotonic()
    killed = drive(args.home.resolve(), args.samples, args.kills, args.seed, args.limit_s)
    broken = wrong(args.home.resolve(), args.samples)
    print(f"{args.samples} samples, {killed} SIGKILLs, {time.monotonic() - began:.0f} s: {'; '.join(broken) or 'each fresh exactly once'}")
    sys.exit(bool(broken))
