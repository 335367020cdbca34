"""The role `evaluate`: measures every new snapshot on every bank, and records the result beside it.

  1. list     snapshots without a result for (bank, protocol), the oldest first
  2. claim    (snapshot, bank, protocol), among the evaluators of this home
  3. read     model.safetensors and config.json of one, verified
  4. measure  features come from the cache, or go there
  5. attach   the result to the snapshot, as an OCI referrer            <- THE COMMIT POINT
  6. tell     history, metrics, continual.json
  7. judge    what is measured on every bank; move `stable` and `best` (promoter.py, which has commit points of its own)

Killed after   what is left                                 who mends it
  2            nothing: the kernel ends the claim
  4            features in the cache, perhaps a torn file   measured again, from the cache; a torn file is none (feature_cache.py)
  5            a result that history and continual.json     the next start writes continual.json from the registry; the report reads
               lack                                         the registry too
  6            a snapshot that was not judged               the next start judges it

The protocol and the bank's digest are in the result's annotations, so a measurement is never recorded twice, and the claim keeps it
from being made twice (claims.py).  When the machine is the learner's: turns.py.  Drift of the sources: drift_watch.py.
"""

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from streamlearn.contract.catalog import Catalog
from streamlearn.contract.config import Config
from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, Retryable
from streamlearn.contract.metrics import EvaluatorMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.registry import Registry
from streamlearn.contract.status import Heartbeat
from streamlearn.probes.bank_book import BankBook
from streamlearn.probes.banks import Bank, load_bank
from streamlearn.probes.claims import claim
from streamlearn.probes.drift_watch import DriftWatch
from streamlearn.probes.measure import EACH, THOROUGH, Measurer, Snapshot, open_snapshot
from streamlearn.probes.overview import Overview
from streamlearn.probes.promoter import Promoter
from streamlearn.probes.turns import Stopped, turns_of
from streamlearn.snapshots.artifact import version
from streamlearn.snapshots.publish import has_result, record_result, steps

QUIET = ("bank_digest", "protocol", "right")  # of a result, not for the history
logger = logging.getLogger(__name__)


def run_evaluate(
    config: Config,
    registry: Registry,
    metrics: EvaluatorMetrics,
    heartbeat: Heartbeat,
    stop: threading.Event,
    *,
    home: Path,
    intake: tuple[Catalog, ObjectStore] | None = None,
) -> None:
    """Follow the registry until `stop`; and the catalog, for drift, where `intake` is given."""
    os.nice(5)  # learning comes first
    if config.probe.threads:
        torch.set_num_threads(config.probe.threads)
    evaluator: Evaluator | None = None
    watch: DriftWatch | None = None
    while not stop.is_set():
        metrics.heartbeat.set_to_current_time()
        try:
            if evaluator is None:  # here, because it reads the whole registry, which may be out of reach
                evaluator = Evaluator(config, registry, metrics, heartbeat, home=home, stop=stop)
                watch = DriftWatch(config, registry, *intake, home=home, metrics=metrics, turns=evaluator.turns) if intake else None
            busy = evaluator.measure_next() or (watch is not None and watch.look())
        except Stopped:
            return
        except Retryable as e:  # a registry, store or disk that may come back
            logger.warning("waiting: %s", e)
            heartbeat.beat(state="waiting", waiting=str(e), force=True)
            stop.wait(e.after_s)
            continue
        if not busy:
            stop.wait(config.probe.poll_s)


@dataclass(frozen=True)
class Job:
    kind: str  # of protocol
    step: int
    digest: str
    bank: BankConfig


class Banks:
    """Those of the configuration and those registered; each loaded once, a bad one refused with its reason."""

    def __init__(self, config: Config, home: Path):
        self.configured, self.book = config.probe.banks, BankBook(home)
        self.loaded: dict[tuple[str, int], Bank] = {}
        self.refused: dict[str, str] = {}

    def configs(self) -> list[BankConfig]:
        names = {bank.name for bank in self.configured}
        found = [*self.configured, *(r.bank for r in self.book.all() if r.bank.name not in names)]
        return [bank for bank in found if bank.name not in self.refused]

    def get(self, config: BankConfig, size: int) -> Bank | None:
        """None, and never asked for again, if it cannot be used."""
        key = (config.name, size)
        if key not in self.loaded:
            try:
                self.loaded[key] = load_bank(config, size)
            except ConfigError as e:
                self.refused[config.name] = str(e)
                logger.error("%s", e)
                return None
        return self.loaded[key]


class Evaluator:
    def __init__(
        self,
        config: Config,
        registry: Registry,
        metrics: EvaluatorMetrics,
        heartbeat: Heartbeat,
        *,
        home: Path,
        stop: threading.Event | None = None,
    ):
        self.config, self.registry, self.metrics, self.heart, self.home = config, registry, metrics, heartbeat, home
        self.banks = Banks(config, home)
        self.failed: dict[str, str] = {}  # digest -> why it cannot be measured
        probe = config.probe
        self.turns = turns_of(home, probe.device, config.train.device, probe.device_share, stop or threading.Event())
        self.measurer = Measurer(probe, home, self.turns, lambda what: heartbeat.beat(state=f"measuring {what}", force=True))
        self.known: dict[int, str] = {}  # step -> digest: a version never moves, and to ask for each is a request over the network
        self.overview = Overview(config, registry, home, metrics)
        self.promoter = Promoter(config.snapshots, registry, metrics, heartbeat, home)
        self.settled: set[tuple[str, str, str]] = set()  # (kind, snapshot, bank's name): recorded
        self.told: dict[str, float] = {}  # counters, as far as the metrics know them
        if not self.banks.configs():
            logger.warning("no [[probe.banks]] in the configuration, none registered: snapshots are published but not measured")
        self.overview.write(self.banks.configs())

    def measure_next(self) -> bool:
        """Measure the oldest snapshot that lacks a result; False when there is none."""
        jobs = self.jobs()
        pending = len({job.digest for job in jobs})
        self.metrics.pending.set(pending)
        self.heart.beat(
            state="measuring" if pending else "watching",
            pending=pending,
            evaluated=self.overview.count,
            failed=self.failed,
            refused_banks=self.banks.refused,
            banks=[bank.name for bank in self.banks.configs()],
        )
        self.metrics.refused_banks.set(len(self.banks.refused))
        self._judge({job.digest for job in jobs})
        if not jobs:
            return False
        first = jobs[0]
        together = [job for job in jobs if (job.digest, job.kind) == (first.digest, first.kind)]
        try:
            snapshot = self._open(first)
            return max([self._measure(snapshot, job) for job in together])
        except (Corrupt, NotFound) as e:
            self.failed[first.digest] = f"step {first.step}: {e}"
            self.metrics.failed.inc()
            logger.error("snapshot %s of step %d cannot be measured: %s", first.digest[:19], first.step, e)
        return True

    def _judge(self, unmeasured: set[str]) -> None:
        names = {bank.name for bank in (*self.banks.configured, *(r.bank for r in self.banks.book.all()))}
        done = [(step, digest) for step, digest in self.known.items() if digest not in unmeasured and digest not in self.failed]
        if names:
            self.promoter.look(done, names)

    def _open(self, job: Job) -> Snapshot:
        """Raises Corrupt, NotFound."""
        try:
            return open_snapshot(self.registry, job.step, job.digest, self.config.probe.device)
        except (ValueError, KeyError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "state_dict" not in str(e):
                raise
            raise Corrupt(f"not a snapshot as this version makes them: {e}") from e

    def jobs(self) -> list[Job]:
        """What is not known to be recorded: `each` of all snapshots, then `thorough` of those that get it."""
        known = [(step, digest) for step, digest in self._versions().items() if digest not in self.failed]
        chosen = {"never": [], "newest": known[-1:], "all": known}[self.config.probe.thorough]
        banks = self.banks.configs()
        wanted = [Job(EACH, *at, bank) for at in known for bank in banks] + [Job(THOROUGH, *at, bank) for at in chosen for bank in banks]
        return [job for job in wanted if (job.kind, job.digest, job.bank.name) not in self.settled and not self._recorded(job)]

    def _versions(self) -> dict[int, str]:
        """Step -> digest of all, in order of steps; asks only for those that are new."""
        held = {step: self.known.get(step) or getattr(self.registry.find(version(step)), "digest", "") for step in steps(self.registry)}
        self.known = {step: digest for step, digest in held.items() if digest}
        return self.known

    def _recorded(self, job: Job) -> bool:
        """By what the registry held at the start; so old snapshots are not opened again."""
        for digest, protocol, size in self.overview.recorded.get((job.digest, job.bank.name), ()):
            if protocol == self.measurer.protocol(job.kind, size):
                bank = self.banks.get(job.bank, size)
                if bank is not None and bank.digest == digest:
                    self.settled.add((job.kind, job.digest, job.bank.name))
                    return True
        return False

    def _measure(self, snapshot: Snapshot, job: Job) -> bool:
        """Whether anything came of it."""
        if (job.bank.name, snapshot.size) not in self.banks.loaded:
            self.heart.beat(state=f"loading bank {job.bank.name}", force=True)
        bank = self.banks.get(job.bank, snapshot.size)
        if bank is None:
            return True  # refused: there is one job less
        protocol = self.measurer.protocol(job.kind, snapshot.size)
        with claim(self.home, snapshot.digest, bank.digest, protocol) as ours:
            if not ours:
                return False
            began, found = time.monotonic(), None
            if not has_result(self.registry, snapshot.digest, bank.digest, protocol):
                found = self.measurer.measure(job.kind, snapshot, bank)
                record_result(self.registry, snapshot.digest, found)
        self.settled.add((job.kind, snapshot.digest, job.bank.name))
        if found is not None:
            self.metrics.seconds.observe(time.monotonic() - began)
            self._tell(snapshot, found)
        return True

    def _tell(self, snapshot: Snapshot, found: dict[str, Any]) -> None:
        self.metrics.evaluated.inc()
        self.metrics.evaluated_at.set_to_current_time()
        self.overview.add(snapshot.step, snapshot.digest, snapshot.generation, found)
        self._count()
        line = {k: v for k, v in found.items() if k not in QUIET}
        tag = version(snapshot.step)
        self.heart.history(tag=tag, digest=snapshot.digest, **line)
        self.heart.beat(force=True, evaluated=self.overview.count, **({"last": {"tag": tag, **line}} if "knn" in found else {}))
        self.overview.write(self.banks.configs())
        figures = ", ".join(
            f"{name} {found[name]:.3f}" for name in ("knn", "random_knn", "raw_knn", "ridge", "logistic", "low_shot_1") if name in found
        )
        logger.info("%s on %s: %s%s", tag, found["bank"], figures, f"; ALARMS: {', '.join(found['alarms'])}" if found.get("alarms") else "")

    def _count(self) -> None:
        cache, m = self.measurer.cache, self.metrics
        m.cache_bytes.set(cache.bytes())
        for name, value, counter in (
            ("hits", cache.hits, m.cache_hits), ("misses", cache.misses, m.cache_misses), ("yielded", self.turns.yielded_s, m.yielded),
        ):  # fmt: skip
            counter.inc(value - self.told.get(name, 0))
            self.told[name] = value


def check_banks(config: Config) -> None:
    """Before anything is started: every bank can be loaded.  Raises ConfigError."""
    for bank in config.probe.banks:
        try:
            load_bank(bank.model_copy(update={"max_train": 50, "max_test": 50, "digest": ""}), config.stream.crops[0].size)
        except FileNotFoundError as e:
            raise ConfigError(f"probe bank {bank.name}: {e.filename}: no such file") from e
