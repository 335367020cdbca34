"""The loop on real images, from a real web server to probed snapshots, in one command.

    python -m bench.real cifar  --home runs/cifar     50,000 CIFAR-10 images: learn, probe each snapshot on the 10,000 test images
    python -m bench.real photos --home runs/photos    1,000 full-size ImageNet photographs: every one stored byte-identical

Both go through the `urls` connector and `streamlearn up`, as a user's run would.  Prints the probe curve, what was stored, and
the CPU time of the learner.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.serve import load
from streamlearn.contract.durable import read_lines
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from streamlearn.contract.status import read_status

DATA = Path(os.environ.get("STREAMLEARN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

# learning.md, section 4: what makes SwAV learn CIFAR-10 on two cores
CIFAR = """
[[connectors]]
name = "web"
class = "urls"
path = "{urls}"
[fetch]
allow_networks = ["127.0.0.0/8"]
host_rate = 0
[shard]
max_samples = 1000
max_age_s = 10
[stream]
crops = [{{ count = 2, size = 32, scale = [0.3, 1.0] }}]
jitter = 0.4
blur = 0
mean = [0.4914, 0.4822, 0.4465]
std = [0.247, 0.243, 0.261]
fresh_fraction = 0.25
max_replay_per_fresh = 20
round_samples = 4000
workers = 1
[model]
backbone = "regnety-tiny"
head = [512, 128]
[objective]
prototypes = 128
epsilon = 0.015
freeze_prototypes = 100
[train]
batch = 128
ema_decay = 0.995
checkpoint_steps = 250
snapshot_steps = 250
max_steps = {steps}
name = "cifar-swav"
[train.optim]
kind = "sgd"
lr = 0.3
warmup_steps = 20
weight_decay = 5e-4
[[probe.banks]]
name = "cifar10"
train = "{data}/cifar10-train.parquet"
test = "{data}/cifar10-test.parquet"
max_train = 10000
max_test = 10000
"""

PHOTOS = """
[[connectors]]
name = "web"
class = "urls"
path = "{urls}"
[fetch]
allow_networks = ["127.0.0.0/8"]
host_rate = 0
[shard]
max_samples = 128
max_age_s = 10
[stream]
crops = [{{ count = 2, size = 96, scale = [0.14, 1.0] }}, {{ count = 4, size = 48, scale = [0.05, 0.14] }}]
max_replay_per_fresh = 3
round_samples = 256
workers = 1
[model]
backbone = "regnety-tiny"
head = [512, 128]
[objective]
prototypes = 64
epsilon = 0.015
freeze_prototypes = 60
[train]
batch = 32
checkpoint_steps = 20
snapshot_steps = 40
bn_images = 128
max_steps = {steps}
name = "photos-swav"
[train.optim]
kind = "sgd"
lr = 0.1
warmup_steps = 20
"""
RUNS = {"cifar": (CIFAR, "cifar10-train.parquet", 4000), "photos": (PHOTOS, "imagenet-sample-1000.tar", 80)}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its waited-for and living children."""
    import psutil

    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(sum(p.cpu_times()[:2]) for p in family)
    except psutil.NoSuchProcess:
        return 0.0


def finished(status: dict[str, dict[str, Any]], images: int, steps: int) -> bool:
    outcomes = sum(status.get("fetch", {}).get("outcomes", {}).values())
    train, evaluate = status.get("train", {}), status.get("evaluate", {})
    last = (train.get("last_snapshot") or {}).get("step", 0)
    probed = not evaluate.get("banks") or (evaluate.get("last") or {}).get("step") == last
    return outcomes >= images and train.get("step", 0) >= steps and last >= steps and probed


def stored(home: Path) -> Counter[str]:
    """sha256 of the bytes found in the tars, at the places the sidecars name -> how often."""
    found: Counter[str] = Counter()
    for tar in sorted((home / "store" / "shards").rglob("*.tar")):
        rows = read_sidecar(Path(sidecar_key(str(tar)))).to_pylist()
        data = tar.read_bytes()
        for row in rows:
            if row["outcome"] == STORED:
                body = data[row["member_offset"] : row["member_offset"] + row["member_size"]]
                found[hashlib.sha256(body).hexdigest()] += 1
    return found


def run(kind: str, home: Path, steps: int | None, count: int | None, limit_s: float) -> None:
    template, source, default_steps = RUNS[kind]
    steps = steps or default_steps
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    images = load(DATA / source, count)
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.serve", str(DATA / source), *(["--count", str(count)] if count else [])],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout
    base = server.stdout.readline().split()[-1]
    (home / "urls.txt").write_text("".join(f"{base}{i}.jpg\n" for i in range(len(images))))
    (home / "run.toml").write_text(template.format(urls=home / "urls.txt", data=DATA, steps=steps))
    began = time.monotonic()
    loop = subprocess.Popen([sys.executable, "-m", "streamlearn", "up", "--config", str(home / "run.toml"), "--home", str(home)])
    cpu = 0.0
    try:
        while loop.poll() is None and time.monotonic() - began < limit_s:
            status = read_status(home)
            cpu = max(cpu, cpu_seconds(int(status.get("train", {}).get("pid", 0) or 0)))
            if finished(status, len(images), steps):
                break
            time.sleep(1)
    finally:
        loop.send_signal(signal.SIGTERM)
        loop.wait(timeout=90)
        server.terminate()
    report(home, images, cpu, time.monotonic() - began)


def report(home: Path, images: Any, cpu: float, wall: float) -> None:
    want, got = Counter(hashlib.sha256(i).hexdigest() for i in images), stored(home)
    print(
        f"\nimages served {sum(want.values())}, stored {sum(got.values())}, missing {sum((want - got).values())}, surplus {sum((got - want).values())}"
    )
    print(f"learner: {cpu / 60:.1f} CPU minutes, workers included; {wall / 60:.1f} minutes in all")
    curve = [line for line in read_lines(home / "history" / "evaluate.jsonl") if "knn" in line]
    for line in sorted(curve, key=lambda r: r["step"]):
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items() if k not in {"at", "digest"}}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=RUNS)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--count", type=int, help="only the first N images")
    parser.add_argument("--limit-s", type=float, default=3600)
    args = parser.parse_args()
    run(args.kind, args.home.resolve(), args.steps, args.count, args.limit_s)
