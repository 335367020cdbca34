"""Kill -9 any role, many times, at random moments of one run; then audit everything.

    python -m bench.kills --home runs/kills --kills 50 --images 2000

Real images over real HTTP, real processes, SIGKILL.  Prints what was killed how often, and the audit: images stored and learnt exactly
once, shards readable and as digested, snapshots whole, probes recorded once.  Exit code 1 if anything is wrong.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.real import DATA, finished
from ingest.audit import verify as verify_dataset
from streamlearn.cli.roles import Home
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Config
from streamlearn.contract.config_file import from_json
from streamlearn.contract.event_log import CANDIDATES, EventLog
from streamlearn.contract.shards import OUTCOMES, index_shard, read_sidecar, sidecar_key
from streamlearn.contract.status import read_status
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.snapshots.publish import results
from streamlearn.snapshots.pull import list_snapshots, verify
from streamlearn.stream.audit import audit

ROLES = ("connect", "fetch", "train", "evaluate")
TEMPLATE = """
[[connectors]]
name = "web"
class = "urls"
path = "{home}/urls.txt"
[fetch]
allow_networks = ["127.0.0.0/8"]
host_rate = 0
concurrency = 8
[shard]
max_samples = 40
max_age_s = 1.0
[stream]
crops = [{{ count = 2, size = 32, scale = [0.3, 1.0] }}]
jitter = 0.4
blur = 0
fresh_fraction = 0.5
max_replay_per_fresh = 1
round_samples = 200
workers = 1
[model]
backbone = "regnety-tiny"
head = [64, 32]
[objective]
prototypes = 32
epsilon = 0.015
freeze_prototypes = 10
[train]
batch = 32
threads = 1
checkpoint_steps = 5
snapshot_steps = 20
bn_images = 64
name = "kills"
[train.optim]
kind = "sgd"
lr = 0.1
warmup_steps = 5
[[probe.banks]]
name = "cifar10"
train = "{data}/cifar10-test.parquet"
max_train = 200
max_test = 100
[supervise]
backoff_s = 0.05
backoff_max_s = 0.2
crash_loop = 100000
report_s = 0
"""


@dataclass
class Findings:
    """What the audit saw; `wrong` lists every broken promise."""

    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, what: str, good: bool, detail: object = "") -> None:
        self.lines.append(f"{'ok   ' if good else 'WRONG'} {what} {detail}".rstrip())
        if not good:
            self.wrong.append(what)


def feed(urls: Path, base: str, images: int, done: int) -> int:
    """Let the list of URLs grow while the run goes on, so that every role has work whenever it is killed."""
    more = range(done, min(done + max(1, images // 60), images))
    with urls.open("a") as f:
        f.writelines(f"{base}{i}.jpg\n" for i in more)
    return more.stop if more else done


def kill_at_random(home: Path, rng: random.Random, killed: Counter[str], roles: Sequence[str] = ROLES) -> None:
    """SIGKILL one living role, chosen at random."""
    role = rng.choice(roles)
    if (pid := living(home, role)) is None:
        return
    os.kill(pid, signal.SIGKILL)
    killed[role] += 1


def living(home: Path, role: str) -> int | None:
    """The process of a role of this home."""
    pid = read_status(home).get(role, {}).get("pid")
    return pid if isinstance(pid, int) and _runs_role(pid, role) else None


def _runs_role(pid: int, role: str) -> bool:
    """Only ever kill what this run started: the command line must say so."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"role" in words and role.encode() in words


def drive(home: Path, images: int, kills: int, seed: int, limit_s: float) -> Counter[str]:
    """Run the loop, feed it, kill it; returns the kills by role once everything is learnt."""
    rng, killed, fed = random.Random(seed), Counter[str](), 0
    source = [sys.executable, "-m", "bench.serve", str(DATA / "cifar10-train.parquet"), "--count", str(images)]
    server = subprocess.Popen(source, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    base = server.stdout.readline().split()[-1]
    (home / "run.toml").write_text(TEMPLATE.format(home=home, data=DATA))
    loop = subprocess.Popen([sys.executable, "-m", "streamlearn", "up", "--config", str(home / "run.toml"), "--home", str(home)])
    began = time.monotonic()
    try:
        while loop.poll() is None and time.monotonic() - began < limit_s:
            fed = feed(home / "urls.txt", base, images, fed)
            time.sleep(rng.uniform(0.2, 2.5))
            if sum(killed.values()) < kills:
                kill_at_random(home, rng, killed)
            elif fed >= images and settled(home, images):
                break
    finally:
        loop.send_signal(signal.SIGTERM)
        loop.wait(timeout=120)
        server.terminate()
    return killed


def settled(home: Path, images: int) -> bool:
    """Everything fetched, everything learnt as fresh, the last snapshot probed."""
    home_ = Home(home)
    covered = sum(r.num_samples for r in home_.catalog(home_.log().log_id).rows())
    train = read_status(home).get("train", {})
    return covered >= images and train.get("fresh", 0) >= images and finished(read_status(home), 0, 0)


def audit_home(home: Path, images: int, config: Config | None = None) -> Findings:
    """`config`: where it is not the home's, such as one whose store and brokers are well."""
    config = config or from_json((home / "config.json").read_text(), where="config.json")
    found, adapters = Findings(), Home(home, config)
    log, store, scratch = adapters.log(), adapters.store(), home / "audit.part"
    rows = adapters.catalog(log.log_id).rows()
    urls: Counter[str] = Counter()
    offsets: Counter[tuple[str, int, int]] = Counter()
    for row in rows:
        store.get_file(row.key, scratch)
        if hashlib.sha256(scratch.read_bytes()).hexdigest() != row.sha256 or len(index_shard(scratch)) != row.num_samples:
            found.check(f"shard {row.key} is as the catalog says", False)
        store.get_file(sidecar_key(row.key), scratch)
        for outcome in read_sidecar(scratch).to_pylist():
            assert outcome["outcome"] in OUTCOMES
            offsets[row.topic, row.partition, outcome["offset"]] += 1
            if outcome["outcome"] == "stored":
                urls[outcome["url"]] += 1
    scratch.unlink(missing_ok=True)
    report = verify_dataset(log, store, adapters.catalog(log.log_id), deep=True, sample=0)
    found.check("catalog, log and objects agree to the byte", report.good, [f"{f.kind} {f.where}: {f.what}" for f in report.findings] or "")
    found.check("every shard is readable and as digested", not found.wrong, f"({len(rows)} shards)")
    ends = {(t, p): log.bounds(t, p)[1] for t, p in {(r.topic, r.partition) for r in rows}}
    found.check(
        "every offset has exactly one outcome", set(offsets.values()) == {1} and len(offsets) == sum(ends.values()), f"({len(offsets)})"
    )
    announced = _announced(log) if config.log.kind == "kafka" else Counter(dict.fromkeys(urls, 1))
    whole = len(urls) == images and urls.keys() == announced.keys() and urls <= announced
    found.check("every image is stored exactly once", whole, f"({len(urls)} of {images}; announced {announced.total()} times)")
    _audit_learning(found, config, adapters, urls.total())
    _audit_snapshots(found, adapters)
    return found


def _announced(log: EventLog) -> Counter[str]:
    """URL -> candidates of it.  On Kafka, whose cursors and candidates are two writes, a killed connector may announce some again."""
    found: Counter[str] = Counter()
    for partition in range(log.partitions(CANDIDATES)):
        at, end = log.bounds(CANDIDATES, partition)
        while at < end:
            records = log.read(CANDIDATES, partition, at, 1000)
            found.update(Candidate.from_json(record.value).url for record in records)
            at = records[-1].offset + 1
    return found


def _audit_learning(found: Findings, config: Any, embedded: Home, images: int) -> None:
    state = Checkpoints(embedded.store(), keep=config.train.keep_checkpoints).load()
    assert state is not None
    seen = audit(config.stream, embedded.store(), state["stream"])
    once = len(seen.fresh) == images and set(seen.fresh.values()) == {1}
    found.check("every image is learnt as fresh exactly once", once, f"({len(seen.fresh)} of {images})")
    found.check(
        "the learner took each batch of the sequence once", seen.batches == state["step"], f"(step {state['step']}, {seen.batches} batches)"
    )


def _audit_snapshots(found: Findings, embedded: Home) -> None:
    registry = embedded.registry()
    listed = list_snapshots(registry)
    for snapshot in listed:
        verify(registry, snapshot.digest)
    found.check("every snapshot is whole", bool(listed), f"({len(listed)} snapshots)")
    doubled = [s.digest for s in listed if len(results(registry, s.digest)) > 1]
    found.check("no snapshot is probed twice", not doubled, doubled)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=1800)
    args = parser.parse_args()
    shutil.rmtree(args.home, ignore_errors=True)
    args.home.mkdir(parents=True)
    killed = drive(args.home.resolve(), args.images, args.kills, args.seed, args.limit_s)
    findings = audit_home(args.home.resolve(), args.images)
    print(f"\nkill -9: {sum(killed.values())} {dict(killed)}")
    print("\n".join(findings.lines))
    sys.exit(bool(findings.wrong))
