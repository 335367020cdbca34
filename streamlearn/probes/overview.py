"""All results of a registry in memory, and what is made of them: metrics, and `continual.json` in the home (docs/probes.md has its schema).

The file is a picture: it is replaced whole after each result, and made anew from the registry at every start.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.durable import read_lines
from streamlearn.contract.errors import StoreFull
from streamlearn.contract.metrics import EVALUATED, OTHER, EvaluatorMetrics
from streamlearn.contract.registry import Registry
from streamlearn.probes.continual import SCHEMA, Row, matrix, prequential
from streamlearn.probes.label_free import ALARMS
from streamlearn.probes.measure import generation_of
from streamlearn.snapshots.publish import results, versions

FILE = "continual.json"
PROBES = ("knn", "ridge", "logistic", "low_shot_1", "low_shot_10")
POINTS = 500  # of the prequential loss
logger = logging.getLogger(__name__)


class Overview:
    def __init__(self, config: Config, registry: Registry, home: Path, metrics: EvaluatorMetrics | None = None):
        self.home, self.metrics, self.count = home, metrics, 0
        self.names = [bank.name for bank in config.probe.banks]
        self.rows: dict[str, Row] = {}
        self.recorded: dict[tuple[str, str], list[tuple[str, str, int]]] = {}  # (snapshot, bank's name) -> (bank's digest, protocol, px)
        for step, descriptor in versions(registry).items():
            for found in results(registry, descriptor.digest):
                self.add(step, descriptor.digest, found.get("generation") or generation_of(registry, descriptor.digest), found, say=False)

    def add(self, step: int, digest: str, generation: str, found: Mapping[str, Any], *, say: bool = True) -> None:
        """One result; those of one snapshot and bank are merged, whatever the protocols."""
        self.count += 1
        self.recorded.setdefault((digest, found["bank"]), []).append((found["bank_digest"], found["protocol"], found.get("size", 0)))
        row = self.rows.get(digest, Row(step, digest, generation, {}))
        before = row.results.get(found["bank"], {})
        if before and before["bank_digest"] != found["bank_digest"]:
            before = {}  # the bank has changed since: the newest of its results stand
        merged = {**before, **found} | {"right": {**before.get("right", {}), **found.get("right", {})}}
        self.rows[digest] = Row(step, digest, generation, {**row.results, found["bank"]: merged})
        if say and self.metrics is not None:
            self._say(found)

    def continual(self, banks: Sequence[BankConfig], *, seed: int = 0) -> dict[str, Any]:
        """Everything at once, as JSON."""
        by_name = {bank.name: bank.generation for bank in banks}
        rows = list(self.rows.values())
        have = [p for p in PROBES if any(p in r for row in rows for r in row.results.values())]
        history = prequential(read_lines(self.home / "history" / "train.jsonl"))
        return {
            "schema": SCHEMA,
            "probes": {probe: matrix(rows, by_name, probe, seed=seed) for probe in have},
            "prequential": history[:: max(1, len(history) // POINTS)],
        }

    def write(self, banks: Sequence[BankConfig]) -> None:
        found = self.continual(banks)
        try:
            durable.write(self.home / FILE, json.dumps(found, indent=1).encode())
        except StoreFull as e:
            logger.warning("%s", e)
        if self.metrics is None:
            return
        if found["prequential"]:
            self.metrics.prequential.set(found["prequential"][-1]["average"])
        for probe, whole in found["probes"].items():
            for measure, value in whole["measures"].items():
                if value is not None:
                    self.metrics.transfer.labels(measure, probe).set(value)

    def _say(self, found: Mapping[str, Any]) -> None:
        assert self.metrics is not None
        bank = found["bank"] if found["bank"] in self.names else OTHER
        for probe in PROBES:
            if probe in found:
                self.metrics.accuracy.labels(bank, probe).set(found[probe])
        for measure in EVALUATED:
            if measure in found:
                self.metrics.label_free.labels(bank, measure).set(found[measure])
        if "alarms" in found:
            for alarm in ALARMS:
                self.metrics.alarm.labels(bank, alarm).set(alarm in found["alarms"])
            self.metrics.rank.labels(bank).set(found["effective_rank"])
