"""Has a source changed?  Each source's stored images in windows, compared with its first window (drift.py has the measure).

For each source whose period has passed and of whom a whole window of new images is stored:
  1. read      sidecars of the rows after the cursor; which images are whose
  2. features  of the window, by the snapshot that the source's reference was made with
  3. put       drift/<digest>.safetensors, where this window is the reference
  4. replace   drift/state.json: cursors, references, distances              <- THE COMMIT POINT
  5. tell      metrics, history

Killed after   what is left                                   who mends it
  2            nothing                                        the window is measured again, the same figures
  3            a reference that the state does not name       overwritten with the same bytes when the window is measured again
  4            a window that history and metrics lack         `streamlearn probe drift` reads the state

Only the newest whole window is measured; images that came before it are passed over and counted.  A source's reference is made with the newest
snapshot of that time, which stays its measure: another model would be another distance.  Where that snapshot has gone from the registry,
or cannot be read, the source gets a new reference.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from streamlearn.contract import durable
from streamlearn.contract.catalog import Catalog, ShardRow
from streamlearn.contract.config import Config
from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.metrics import OTHER, EvaluatorMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.registry import Registry
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from streamlearn.contract.status import now
from streamlearn.probes.drift import Reference
from streamlearn.probes.features import of_pixels
from streamlearn.probes.measure import Snapshot, open_snapshot
from streamlearn.probes.turns import Turns
from streamlearn.snapshots.package import version
from streamlearn.snapshots.publish import steps
from streamlearn.stream.decode import Pixels, decode
from streamlearn.stream.views import eval_crop

SCHEMA = "streamlearn.drift/1"
KEPT = 400  # windows of a source in the state
BACKLOG = 32  # windows of stored images whose sidecars are read at one look, at most: the newest
GATHER_S = 15.0  # between looks at the catalog
SEED = 0  # of the bootstrap
Ref = tuple[str, int, int]  # shard, first byte, bytes
logger = logging.getLogger(__name__)


class DriftWatch:
    def __init__(
        self,
        config: Config,
        registry: Registry,
        catalog: Catalog,
        store: ObjectStore,
        *,
        home: Path,
        metrics: EvaluatorMetrics,
        turns: Turns,
        clock: Callable[[], float] = time.time,
    ):
        self.config, self.probe, self.registry, self.catalog, self.store = config, config.probe, registry, catalog, store
        self.folder, self.metrics, self.turns, self.clock = home / "drift", metrics, turns, clock
        self.sources = {connector.name for connector in config.connectors}
        self.state = read_state(home)
        self.gathered_at = -GATHER_S
        self.known: dict[tuple[str, int], tuple[Reference, float]] = {}  # (reference's digest, images in a window) -> it, and the threshold

    def look(self) -> bool:
        """Measure one window; False where there is none to measure."""
        if not self.probe.drift_window or not steps(self.registry):
            return False
        if self.clock() - self.gathered_at >= GATHER_S:
            self._gather()
            self.gathered_at = self.clock()
        for name, source in sorted(self.state["sources"].items()):
            due = source["measured_at"] is None or source["measured_at"] + self.probe.drift_period_s <= self.clock()
            if due and len(source["waiting"]) >= self.probe.drift_window:
                self._measure(name, source)
                return True
        return False

    def _gather(self) -> None:
        """Step 1.  The state moves on in memory; it is written with the next window, and until then gathered again after a crash."""
        version, rows = self.catalog.follow(self.state["version"])
        rows = [row for row in rows if row.num_samples and not row.replaces]  # what replaces a shard holds nothing new
        for row in self._newest(rows):
            try:
                table = read_sidecar(self.store.get(sidecar_key(row.key)))
            except NotFound:
                continue  # purged since
            columns = [table.column(c).to_pylist() for c in ("outcome", "source", "member_offset", "member_size")]
            for outcome, name, start, size in zip(*columns, strict=True):
                if outcome == STORED:
                    source = self.state["sources"].setdefault(name, {"waiting": [], "passed_over": 0, "measured_at": None, "windows": []})
                    source["waiting"].append([row.key, start, size])
        self.state["version"] = version
        for source in self.state["sources"].values():
            self._pass_over(source, len(source["waiting"]) - self.probe.drift_window)

    def _newest(self, rows: list[ShardRow]) -> list[ShardRow]:
        """Only the newest windows are measured: an evaluator that begins late need not read months of sidecars."""
        samples, first = 0, len(rows)
        while first > 0 and samples < BACKLOG * self.probe.drift_window:
            first -= 1
            samples += rows[first].num_samples
        return rows[first:]

    def _pass_over(self, source: dict[str, Any], count: int) -> None:
        if count > 0:
            del source["waiting"][:count]
            source["passed_over"] += count

    def _measure(self, name: str, source: dict[str, Any]) -> None:
        n = self.probe.drift_window
        snapshot = self._frozen(name, source)
        pixels = self._pixels([tuple(ref) for ref in source["waiting"]], snapshot.size)
        source["waiting"], source["measured_at"] = [], self.clock()
        if len(pixels) < n // 2:
            logger.warning("drift of %s: %d of %d images can still be read; the window is passed over", name, len(pixels), n)
            return
        features_ND = of_pixels(snapshot.trunk, pixels, snapshot.mean, snapshot.std, self.probe.batch, self.turns)
        if not bool(features_ND.isfinite().all()):
            logger.warning("drift of %s: features of step %d are not finite; the window is passed over", name, snapshot.step)
            return
        held = self._reference(source, len(pixels))
        entry: dict[str, Any] = {"at": now(), "images": len(pixels), "found": "reference"}
        if held is None:
            self._become_reference(source, snapshot, features_ND)
        else:
            distance, limit = held[0].distance(features_ND), held[1]
            entry |= {"found": "drift" if distance > limit else "same", "distance": round(distance, 6), "threshold": round(limit, 6)}
        source["windows"] = [*source["windows"], entry][-KEPT:]
        durable.write(self.folder / "state.json", json.dumps(self.state).encode())
        self._tell(name, entry)

    def _frozen(self, name: str, source: dict[str, Any]) -> Snapshot:
        known = source.get("snapshot")
        if known:
            try:
                return open_snapshot(self.registry, known["step"], known["digest"], self.probe.device)
            except (Corrupt, NotFound) as e:
                logger.warning("drift of %s: a new reference: the snapshot of the old one is not to be had: %s", name, e)
                source.pop("snapshot")
                source.pop("reference", None)
        step = steps(self.registry)[-1]
        return open_snapshot(self.registry, step, self.registry.manifest(version(step))[0].digest, self.probe.device)

    def _reference(self, source: dict[str, Any], images: int) -> tuple[Reference, float] | None:
        """With its threshold for windows of so many images."""
        digest = source.get("reference")
        if not digest:
            return None
        if (digest, images) not in self.known:
            path = self.folder / f"{digest}.safetensors"
            data = path.read_bytes() if path.exists() else b""
            if hashlib.sha256(data).hexdigest() != digest:
                logger.warning("%s: missing or damaged; this window is the new reference", path)
                return None
            made = Reference(safetensors.torch.load(data)["features"])
            self.known[digest, images] = made, made.threshold(images, false_alarm=self.probe.drift_false_alarm, seed=SEED)
        return self.known[digest, images]

    def _become_reference(self, source: dict[str, Any], snapshot: Snapshot, features_ND: Tensor) -> None:
        data = safetensors.torch.save({"features": features_ND.contiguous()})
        digest = hashlib.sha256(data).hexdigest()
        durable.write(self.folder / f"{digest}.safetensors", data)
        source["snapshot"], source["reference"] = {"step": snapshot.step, "digest": snapshot.digest}, digest

    def _pixels(self, refs: list[Ref], size: int) -> Pixels:
        """What can be read of them: shards are rewritten and purged while we look."""
        found = []
        for key, start, length in refs:
            try:
                found.append(eval_crop(decode(self.store.get_range(key, start, length)), size))
            except (NotFound, Corrupt):
                continue  # taken down, expired, or damaged: the learner counts those
        return np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)

    def _tell(self, name: str, entry: dict[str, Any]) -> None:
        label = name if name in self.sources else OTHER
        self.metrics.drift_windows.labels(label, entry["found"]).inc()
        if "distance" in entry:
            self.metrics.drift.labels(label).set(entry["distance"])
            self.metrics.drift_threshold.labels(label).set(entry["threshold"])
            logger.log(
                logging.WARNING if entry["found"] == "drift" else logging.INFO,
                "source %s: %s: Fréchet-64 %.4g, without drift at most %.4g", name, entry["found"], entry["distance"], entry["threshold"],
            )  # fmt: skip


def read_state(home: Path) -> dict[str, Any]:
    """Cursors, references and distances of all sources (docs/probes.md).  Raises Corrupt."""
    path = home / "drift" / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']!r}, only {SCHEMA} is known here")
    except FileNotFoundError:
        return {"schema": SCHEMA, "version": -1, "sources": {}}
    except (ValueError, KeyError, TypeError) as e:
        raise Corrupt(f"{path}: {e}; delete it: every source gets a new reference") from e
    return state
