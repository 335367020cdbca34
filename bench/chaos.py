"""The drill: a whole loop on brokers and an S3 store, everything that can go wrong does, and a real Prometheus with the shipped rules watches.

    python -m bench.chaos --home runs/chaos --minutes 30
    python -m bench.chaos --home runs/chaos --minutes 2      the short form: each class of faults once, if there is time

Real roles under `streamlearn up`, real HTTP and images (bench.kills); librdkafka's mock brokers and an S3 in memory behind a proxy that refuses,
resets, delays and truncates a little all the time (bench.crash_world).  Roles are killed at random moments throughout.  Beside that, again
and again until the time is over, one class of faults after another, each held until its alert fires or its share of the time is up:

  store out       every request to S3 is answered with 503
  brokers out     all of them are down
  disk full       nothing more can be written in the home (a small tmpfs; needs root)
  role hangs      SIGSTOP
  clock step      all roles' clocks go back a quarter of an hour (needs a C compiler: bench/chaos_clock.py)

`--pace` lets the rules' times (`for`, ranges, thresholds in seconds) pass so many times as fast, because an alert that waits ten minutes cannot come
often in thirty; 1 runs the shipped files as they are.  At the end everything heals, what is left is learnt, and the audit of bench.kills looks at every
offset, image, batch and snapshot.  Prints that, and for each class its alert and after how long it came.  Exit code 1 if anything is missing or
double, the sequence is broken, or a class that was injected never raised its alert.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGCONT, SIGSTOP

from bench import crash_world
from bench.chaos_clock import Clock
from bench.chaos_watch import Told, watching
from bench.crash_world import PARTITIONS, RETRIES, S3, Brokers
from bench.kills import ROLES, TEMPLATE, Findings, audit_home, feed, kill_at_random, living
from bench.real import DATA, finished
from streamlearn.cli.roles import ROLES as PORTS
from streamlearn.cli.roles import Home
from streamlearn.contract.config import Config
from streamlearn.contract.config_file import load
from streamlearn.contract.errors import Retryable, StreamlearnError, Stuck
from streamlearn.contract.event_log import SOURCE_STATE, EventLog
from streamlearn.contract.status import read_status
from streamlearn.operate.drain import left
from tests.adapters.faultproxy import Fault
from tests.ops.prometheus import Prometheus, free_ports, running

CLASSES = ("store out", "brokers out", "disk full", "role hangs", "clock step")
DISK = "768m"
STEP_S = 900  # that clocks are set back by
START_S = 4.0  # that a role which is started while brokers are out waits for each try
RATE = 5  # new images a second
KILLS_S = (5.0, 25.0)  # from one kill to the next: a role needs some seconds to get up
REST_S = 5.0  # between two classes of faults
ENDING_S = 900.0  # for what is left, once everything has healed
MORE = """
metrics_port = {port}
{template}
[log]
kind = "kafka"
partitions = {partitions}
[log.kafka]
{kafka}
[store]
{store}
"""


class Everything(Fault):
    """The store is out."""

    def matches(self, method: str, path: str) -> bool:
        return True


@dataclass(frozen=True)
class Trouble:
    """A class of faults."""

    alert: str
    spared: frozenset[str]  # roles that are not killed meanwhile: a fresh process has waited for nothing
    begin: Callable[[], object]  # also called while it lasts
    end: Callable[[], object]
    skip: str = ""  # why it cannot be had here


@dataclass
class World:
    """What the loop runs on."""

    home: Path
    brokers: Brokers
    s3: S3
    clock: Clock
    rng: random.Random
    disk: str  # why the home has no disk of its own; empty: it has
    hung: tuple[str, int] = ("", 0)

    def troubles(self) -> dict[str, Trouble]:
        stores, every = frozenset({"fetch", "train"}), frozenset(ROLES)
        out, calm, cluster = [Everything("answer"), *self.s3.proxy.faults], list(self.s3.proxy.faults), self.brokers.cluster
        return {
            "store out": Trouble("FetchWaiting", stores, lambda: self.faults(out), lambda: self.faults(calm)),
            "brokers out": Trouble("FetchWaiting", stores, cluster.down, cluster.up),
            "disk full": Trouble("DiskFull", frozenset(), self._fill, (self.home / "ballast").unlink, self.disk),
            "role hangs": Trouble("RoleDown", every, self._stop, self._go_on),
            "clock step": Trouble(
                "RoleSilent", frozenset(), lambda: self.clock.step(-STEP_S), lambda: self.clock.step(0), self.clock.lacks
            ),
        }

    def faults(self, faults: list[Fault]) -> None:
        self.s3.proxy.faults = faults

    def _fill(self) -> None:
        with contextlib.suppress(OSError), (self.home / "ballast").open("ab", buffering=0) as f:
            while f.write(b"\0" * 2**16):
                pass

    def _stop(self) -> None:
        if self.hung[0]:
            return
        role = self.rng.choice(ROLES)
        if (pid := living(self.home, role)) is not None:
            os.kill(pid, SIGSTOP)
            self.hung = role, pid

    def _go_on(self) -> None:
        if self.hung[0] and living(self.home, self.hung[0]) == self.hung[1]:
            os.kill(self.hung[1], SIGCONT)
        self.hung = "", 0


@dataclass
class Drill:
    world: World
    prometheus: Prometheus
    images: int
    base: str
    minutes: float
    pace: float
    loop: "subprocess.Popen[bytes]"
    wanted: tuple[str, ...]  # classes of faults
    killed: Counter[str] = field(default_factory=Counter)
    told: dict[str, Told] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    fed: int = 0
    next_kill: float = 0.0
    last_feed: float = 0.0

    def tick(self, spared: frozenset[str]) -> None:
        """New images, a kill when one is due."""
        if self.loop.poll() is not None:
            raise SystemExit(f"the loop has ended with {self.loop.returncode}")
        now = time.monotonic()
        if self.fed < self.images and now - self.last_feed > self.minutes:  # a sixtieth of all at a time
            self.fed, self.last_feed = feed(self.world.home.parent / "urls.txt", self.base, self.images, self.fed), now
        roles = [role for role in ROLES if role not in spared]
        if roles and now > self.next_kill:
            kill_at_random(self.world.home, self.world.rng, self.killed, roles)
            self.next_kill = now + self.world.rng.uniform(2, 10)
        restarting = self.told.setdefault("kills", Told("RoleRestarting", times=1))
        if not restarting.after_s and self.killed and restarting.wanted in self.prometheus.firing():
            restarting.after_s.append(now - self.began)
        time.sleep(0.5)

    def until(self, holds: Callable[[], bool], limit_s: float, spared: frozenset[str], more: Callable[[], object] = lambda: None) -> bool:
        deadline = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > deadline:
                return False
            more()
            self.tick(spared)
        return True

    def one(self, name: str, trouble: Trouble, limit_s: float) -> None:
        """One fault, held until its alert fires."""
        told = self.told.setdefault(name, Told(trouble.alert, skipped=trouble.skip))
        if trouble.skip or not self.until(lambda: trouble.alert not in self.prometheus.firing(), limit_s, trouble.spared):
            return  # not to be had, or the alert of the fault before still fires: nothing could be told from it
        began, told.times = time.monotonic(), told.times + 1
        try:
            raised = self.until(lambda: trouble.alert in self.prometheus.firing(), limit_s, trouble.spared, more=trouble.begin)
        finally:
            trouble.end()
        if raised:
            told.after_s.append(time.monotonic() - began)
        print(f"{time.monotonic() - self.began:6.0f} s  {name}: {trouble.alert} {'raised' if raised else 'NOT raised'}", file=sys.stderr)
        self.until(lambda: False, REST_S, frozenset())

    def run(self) -> None:
        troubles, every = {name: t for name, t in self.world.troubles().items() if name in self.wanted}, frozenset(ROLES)
        if not self.until(lambda: self.prometheus.up(set(ROLES)), ENDING_S, every):
            raise SystemExit(f"the loop does not get up; see {self.world.home.parent / 'up.log'}")
        self.began = time.monotonic()
        end = self.began + 60 * self.minutes
        while time.monotonic() < end:
            names = sorted(troubles, key=lambda name: (self.told[name].times if name in self.told else 0, self.world.rng.random()))
            share_s = max(60.0, 60 * self.minutes / len(names))
            for name in names:
                if time.monotonic() < end:
                    self.one(name, troubles[name], share_s)
            self.until(lambda: False, 1.0, frozenset())  # where nothing can be injected but kills

    def settle(self, config: Config) -> bool:
        """Everything is well again: feed the rest, wait until it is learnt and measured."""
        self.world.brokers.calm.set()
        self.world.faults([])
        self.minutes = 0.0  # all that is left to be announced, at once
        time.sleep(1.5)  # brokers that are down come back
        adapters = Home(self.world.home, config)
        log = adapters.log()
        return self.until(lambda: self.fed == self.images and settled(adapters, log, self.images), ENDING_S, frozenset(ROLES))


def settled(adapters: Home, log: EventLog, images: int) -> bool:
    """Everything fetched, everything learnt as fresh, the last snapshot probed."""
    catalog, said = adapters.catalog(log.log_id), read_status(adapters.path)
    try:
        found, stored = left(log, catalog, said["train"]["cursor"]), sum(row.num_samples for row in catalog.rows())
    except (Retryable, Stuck, KeyError) as e:
        print(f"looking again: {e}", file=sys.stderr)
        return False
    fetched = not (found.candidates or found.due or found.later) and stored >= images
    return fetched and said["train"].get("fresh", 0) >= stored and finished(said, 0, 0)


def written(values: Mapping[str, object]) -> str:
    """Lines of TOML."""
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())


def configured(folder: Path, home: Path, brokers: Brokers, store: Mapping[str, object], name: str, port: int) -> Path:
    kafka = brokers.config()
    keys = ("servers", "topic_prefix", "api_version", "request_timeout_s", "delivery_timeout_s", "session_timeout_s")
    template = TEMPLATE.format(home=folder, data=DATA).replace("[fetch]", f"[fetch]\nretry_delays_s = {list(RETRIES)}")
    text = MORE.format(
        port=port,
        template=template,
        partitions=PARTITIONS,
        kafka=written({key: getattr(kafka, key) for key in keys} | {"start_timeout_s": START_S}),
        store=written({"kind": "s3", **store}),
    )
    file = folder / name
    file.write_text(text)
    return file


@contextlib.contextmanager
def disk(home: Path) -> Iterator[str]:
    """The home as a disk of its own; why not, where it cannot be."""
    home.mkdir(parents=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(home)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:
        yield f"no small disk can be had: {done.stderr.strip()}" if done.returncode else ""
    finally:
        if not done.returncode:
            subprocess.run(["umount", "--lazy", str(home)], check=True)


def drill(
    folder: Path, minutes: float, pace: float, seed: int, images: int, wanted: tuple[str, ...] = CLASSES
) -> tuple[Drill, bool, Findings]:
    crash_world.environment()
    home, port = folder / "home", free_ports(len(PORTS))
    context = multiprocessing.get_context("forkserver")
    with contextlib.ExitStack() as stack:
        no_disk = stack.enter_context(disk(home))
        brokers = stack.enter_context(crash_world.brokers(seed))
        brokers.cluster.make_topic(brokers.prefix + SOURCE_STATE, PARTITIONS)
        s3 = stack.enter_context(crash_world.s3(seed, context))
        world = World(home, brokers, s3, Clock(folder), random.Random(seed), no_disk)
        source = [sys.executable, "-m", "bench.serve", str(DATA / "cifar10-train.parquet"), "--count", str(images)]
        server = stack.enter_context(contextlib.closing(_Server(source)))
        (folder / "urls.txt").touch()
        keys = ("bucket", "prefix", "region", "endpoint_url", "path_style", "attempts", "read_timeout_s")
        faulty, direct = ({key: getattr(config, key) for key in keys} for config in (s3.faulty, s3.direct))
        file = configured(folder, home, brokers, faulty, "run.toml", port)
        well = load(configured(folder, home, brokers, direct, "well.toml", port))
        env = os.environ | {"OMP_NUM_THREADS": "1"} | world.clock.environment()
        up = [sys.executable, "-m", "streamlearn", "up", "--config", str(file), "--home", str(home)]
        prometheus = stack.enter_context(watching(folder, {role: port + PORTS.index(role) for role in ROLES}, pace))
        with running(up, folder / "up.log", env=env) as loop:
            found = Drill(world, prometheus, images, server.base, minutes, pace, loop, wanted)
            found.run()
            done = found.settle(well)
        return found, done, audit_home(home, images, well)


class _Server:
    """The images' web server, a process of its own."""

    def __init__(self, argv: list[str]):
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.base = self.process.stdout.readline().split()[-1]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="a folder for everything; emptied first")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--pace", type=float, help="[default: that all classes come several times: 180 / minutes, at least 1]")
    parser.add_argument("--images", type=int, help=f"[default: {RATE} a second]")
    parser.add_argument(
        "--faults", nargs="+", choices=CLASSES, default=CLASSES, metavar="CLASS", help=f"of {', '.join(CLASSES)}; kills always"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if shutil.which("prometheus") is None:
        print("prometheus is not installed: Debian's prometheus", file=sys.stderr)
        return 2
    folder, pace = args.home.resolve(), args.pace or max(1.0, 180 / args.minutes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        found, done, findings = drill(
            folder, args.minutes, pace, args.seed, args.images or round(60 * RATE * args.minutes), tuple(args.faults)
        )
    except StreamlearnError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(
        f"kill -9: {found.killed.total()} {dict(found.killed)}; S3 faults {dict(found.world.s3.tally)}; brokers {dict(found.world.brokers.tally)}"
    )
    print("\n".join(findings.lines), f"\nsettled: {'yes' if done else 'NO'}\n\nrules at {pace:g} times their pace")
    print("\n".join(told.line(name, pace) for name, told in found.told.items()))
    silent = [name for name, told in found.told.items() if told.times and not told.after_s]
    return int(bool(findings.wrong or silent or not done))


if __name__ == "__main__":
    sys.exit(main())
