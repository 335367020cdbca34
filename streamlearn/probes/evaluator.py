"""The role `evaluate`: measures every new snapshot on every bank, and records the result beside it.

  1. list     snapshots without a result for (bank, protocol)
  2. read     model.safetensors and config.json of one, verified
  3. measure
  4. attach   the result to the snapshot, as an OCI referrer            <- THE COMMIT POINT
  5. tell     history, metrics

Killed before 4: measured again.  Killed between 4 and 5: recorded, but missing in the history; the report reads the registry too.  The
protocol and the bank's digest are in the result's annotations, so a measurement is never recorded twice.
"""

import json
import logging
import os
import threading
import time
from typing import Any

import torch
from torch import Tensor

from streamlearn.contract.config import BankConfig, Config
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.metrics import EvaluatorMetrics
from streamlearn.contract.registry import Registry
from streamlearn.contract.status import Heartbeat
from streamlearn.probes.banks import Bank, load_bank
from streamlearn.probes.features import RAW_SIDES, features, raw_pixels, untrained
from streamlearn.probes.knn import accuracy, knn
from streamlearn.probes.label_free import effective_rank, participation_ratio, rankme
from streamlearn.probes.linear import ridge
from streamlearn.snapshots.package import version
from streamlearn.snapshots.publish import has_result, record_result, results, versions
from streamlearn.snapshots.pull import read_file
from streamlearn.snapshots.trunk import load_trunk
from streamlearn.stream.views import normalised

SEEDS = (0, 1, 2)  # of the untrained networks that the curve is compared with
logger = logging.getLogger(__name__)


def run_evaluate(config: Config, registry: Registry, metrics: EvaluatorMetrics, heartbeat: Heartbeat, stop: threading.Event) -> None:
    """Follow the registry until `stop`."""
    os.nice(5)  # learning comes first
    if config.probe.threads:
        torch.set_num_threads(config.probe.threads)
    if not config.probe.banks:
        logger.warning("no [[probe.banks]] in the configuration: snapshots are published but not measured")
    evaluator = Evaluator(config, registry, metrics, heartbeat)
    while not stop.is_set():
        metrics.heartbeat.set_to_current_time()
        if not evaluator.measure_next():
            stop.wait(config.probe.poll_s)


class Evaluator:
    def __init__(self, config: Config, registry: Registry, metrics: EvaluatorMetrics, heartbeat: Heartbeat):
        self.config, self.registry, self.metrics, self.heart = config, registry, metrics, heartbeat
        self.banks: dict[str, Bank] = {}
        self.baselines: dict[tuple[str, str, str], dict[str, float]] = {}
        self.failed: dict[str, str] = {}  # digest -> why it cannot be measured
        self.done = sum(len(results(registry, d.digest)) for d in versions(registry).values())

    @property
    def protocol(self) -> str:
        probe = self.config.probe
        return f"knn-k{probe.k}-t{probe.temperature:g}+ridge/1"

    def measure_next(self) -> bool:
        """Measure the oldest snapshot that lacks a result; False when there is none."""
        pending = [
            (step, d.digest) for step, d in versions(self.registry).items() if d.digest not in self.failed and self._lacking(d.digest)
        ]
        self.metrics.pending.set(len(pending))
        self.heart.beat(
            state="measuring" if pending else "watching", pending=len(pending), evaluated=self.done, failed=self.failed, banks=self._names()
        )
        if not pending:
            return False
        step, digest = pending[0]
        try:
            self._measure(step, digest)
        except (Corrupt, NotFound, ValueError, KeyError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "state_dict" not in str(e):
                raise
            self.failed[digest] = f"step {step}: {e}"
            self.metrics.failed.inc()
            logger.error("snapshot %s of step %d cannot be measured: %s", digest[:19], step, e)
        return True

    def _names(self) -> list[str]:
        return [bank.name for bank in self.config.probe.banks]

    def _lacking(self, digest: str) -> list[BankConfig]:
        """Banks without a result.  A bank that is not loaded yet is loaded only when its digest is needed."""
        lacking = []
        for bank in self.config.probe.banks:
            known = self.banks.get(bank.name)
            if known is None or not has_result(self.registry, digest, known.digest, self.protocol):
                lacking.append(bank)
        return lacking

    def _measure(self, step: int, digest: str) -> None:
        settings = json.loads(read_file(self.registry, digest, "config.json"))
        trunk = load_trunk(self.registry, digest)
        for config in self._lacking(digest):
            began = time.monotonic()
            bank = self._bank(config, settings["pretrained_cfg"]["input_size"][-1])
            if has_result(self.registry, digest, bank.digest, self.protocol):
                continue
            result = self._probe(trunk, settings, bank) | self._baseline(settings, bank)
            found = {"step": step, "bank": bank.name, "bank_digest": bank.digest, "protocol": self.protocol, **result}
            record_result(self.registry, digest, found)
            self.metrics.seconds.observe(time.monotonic() - began)
            self._tell(step, digest, found)

    def _bank(self, config: BankConfig, size: int) -> Bank:
        if config.name not in self.banks:
            self.heart.beat(state=f"loading bank {config.name}", force=True)
            self.banks[config.name] = load_bank(config, size)
        return self.banks[config.name]

    def _probe(self, trunk: torch.nn.Module, settings: dict[str, Any], bank: Bank) -> dict[str, float]:
        cfg = settings["pretrained_cfg"]
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        bank_ND = features(trunk, bank.train, mean, std, self.config.probe.batch)
        test_MD = features(trunk, bank.test, mean, std, self.config.probe.batch)
        knn_, ridge_ = self._both(bank, bank_ND, test_MD)
        ranks = {"effective_rank": effective_rank(test_MD), "rankme": rankme(test_MD), "participation_ratio": participation_ratio(test_MD)}
        return {"knn": knn_, "ridge": ridge_} | {k: round(v, 3) for k, v in ranks.items()}

    def _both(self, bank: Bank, bank_ND: Tensor, test_MD: Tensor) -> tuple[float, float]:
        probe, truth = self.config.probe, bank.test.labels_N
        near = knn(bank_ND, bank.train.labels_N, test_MD, k=probe.k, temperature=probe.temperature)
        return accuracy(near, truth), accuracy(ridge(bank_ND, bank.train.labels_N, test_MD), truth)

    def _baseline(self, settings: dict[str, Any], bank: Bank) -> dict[str, float]:
        """Raw pixels at their best side, and the mean of untrained networks: measured once for a bank and architecture."""
        ours, cfg = settings["streamlearn"], settings["pretrained_cfg"]
        key = (bank.digest, ours["backbone"], ours["stem"])
        if key not in self.baselines:
            mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
            batch = self.config.probe.batch
            raw, random = [], []
            for side in (s for s in RAW_SIDES if s <= cfg["input_size"][-1]):
                self.heart.beat(state="measuring raw pixels", force=True)
                raw.append(self._both(bank, raw_pixels(bank.train, side), raw_pixels(bank.test, side)))
            some = normalised(bank.train.images_NSSC[:: max(1, len(bank.train.labels_N) // 1024)], mean, std)
            for seed in SEEDS:
                self.heart.beat(state="measuring untrained", force=True)
                net = untrained(ours["backbone"], ours["stem"], some, seed)
                random.append(self._both(bank, features(net, bank.train, mean, std, batch), features(net, bank.test, mean, std, batch)))
            self.baselines[key] = {
                "raw_knn": max(k for k, _ in raw),
                "raw_ridge": max(r for _, r in raw),
                "random_knn": sum(k for k, _ in random) / len(random),
                "random_ridge": sum(r for _, r in random) / len(random),
            }
        return self.baselines[key]

    def _tell(self, step: int, digest: str, found: dict[str, Any]) -> None:
        self.done += 1
        self.metrics.evaluated.inc()
        for probe in ("knn", "ridge"):
            self.metrics.accuracy.labels(found["bank"], probe).set(found[probe])
        self.metrics.rank.labels(found["bank"]).set(found["effective_rank"])
        line = {k: v for k, v in found.items() if k not in ("bank_digest", "protocol")}
        self.heart.history(tag=version(step), digest=digest, **line)
        self.heart.beat(force=True, evaluated=self.done, last={"tag": version(step), **line})
        logger.info(
            "%s on %s: k-NN %.3f (untrained %.3f, raw pixels %.3f), ridge %.3f, effective rank %.1f",
            version(step), found["bank"], found["knn"], found["random_knn"], found["raw_knn"], found["ridge"], found["effective_rank"],
        )  # fmt: skip


def check_banks(config: Config) -> None:
    """Before anything is started: every bank can be loaded.  Raises ConfigError."""
    for bank in config.probe.banks:
        try:
            load_bank(bank.model_copy(update={"max_train": 50, "max_test": 50}), config.stream.crops[0].size)
        except FileNotFoundError as e:
            raise ConfigError(f"probe bank {bank.name}: {e.filename}: no such file") from e
