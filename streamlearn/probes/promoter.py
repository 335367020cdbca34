"""The evaluator's hand on the channels: judges what has been measured on every bank, and moves `stable` and `best` where the gate says so.

The newest snapshot is judged first, each once against each holder; what `waits` is asked again after a while.  Killed at any
moment it begins anew: a verdict is made from the registry alone, and a move has one commit point (snapshots/promote.py).  What another
promoter did first, or a pin, is told and left alone.
"""

import json
import logging
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from streamlearn.contract import durable
from streamlearn.contract.config_snapshots import SnapshotsConfig
from streamlearn.contract.errors import Conflict, Corrupt, NotFound, StoreFull
from streamlearn.contract.metrics import EvaluatorMetrics
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.contract.registry_gc import collect
from streamlearn.contract.status import Heartbeat, now
from streamlearn.probes.drift_watch import read_state
from streamlearn.probes.gate import PROMOTED, WAITING, Verdict, judge
from streamlearn.snapshots.artifact import version
from streamlearn.snapshots.history import CHANNELS, STABLE
from streamlearn.snapshots.promote import promote
from streamlearn.snapshots.publish import step_of
from streamlearn.snapshots.retain import retain

BACKLOG = 20  # newest snapshots that are judged at all
AGAIN_S = 30.0  # between two looks at what waits
BY = "evaluate"
logger = logging.getLogger(__name__)


class Promoter:
    def __init__(self, config: SnapshotsConfig, registry: Registry, metrics: EvaluatorMetrics, heartbeat: Heartbeat, home: Path):
        self.config, self.registry, self.metrics, self.heart, self.home = config, registry, metrics, heartbeat, home
        self.judged: dict[tuple[str, str, str], tuple[str, float]] = {}  # (channel, snapshot, holder) -> (outcome, when)
        self.told: dict[str, dict[str, object]] = {}  # channel -> its last verdict
        self.retained = -1  # newest step at the last retention

    def look(self, measured: Sequence[tuple[int, str]], banks: Collection[str]) -> None:
        """`measured`: (step, digest) of what has its results on every bank, in order of steps; `banks`: names of all that there are.

        Raises Retryable where the registry is out of reach.
        """
        if self.config.promote == "auto":
            for channel in CHANNELS:
                self._channel(channel, measured[-BACKLOG:], banks)
        if self.config.keep and measured and measured[-1][0] != self.retained and isinstance(self.registry, OciLayout):
            self._retain(self.registry)
            self.retained = measured[-1][0]

    def _channel(self, channel: str, measured: Sequence[tuple[int, str]], banks: Collection[str]) -> None:
        known = self.registry.find(channel)
        held = known.digest if known else ""
        if held:
            steps = {digest: step for step, digest in measured}
            self.metrics.channel_step.labels(channel).set(steps[held] if held in steps else step_of(self.registry, held))
        for step, digest in reversed(measured):
            if digest == held and channel == STABLE:
                return  # what is older is no candidate
            if digest == held or not self._due((channel, digest, held)):
                continue
            try:
                verdict = judge(self.registry, digest, channel, self.config.gate, banks=banks)
            except (Corrupt, NotFound) as e:  # a damaged result or record: the next snapshot may do without it
                self._tell(Verdict(channel, WAITING, digest, step, held, (f"cannot be judged: {e}",), ()))
                continue
            if verdict.outcome == PROMOTED and not self._promoted(verdict):
                return
            self._tell(verdict)
            if verdict.outcome == PROMOTED or verdict.pinned:
                return

    def _due(self, key: tuple[str, str, str]) -> bool:
        outcome, when = self.judged.get(key, (WAITING, -AGAIN_S))
        return outcome == WAITING and time.monotonic() - when >= AGAIN_S

    def _promoted(self, verdict: Verdict) -> bool:
        """False: another was there first, or has pinned it; judged again at the next look."""
        try:
            promote(
                self.registry, verdict.channel, verdict.digest, by=BY, why=verdict.why, verdict=verdict.to_json(), expect=verdict.against
            )
        except Conflict as e:
            logger.warning("%s stays where it is: %s", verdict.channel, e)
            return False
        self.metrics.channel_step.labels(verdict.channel).set(verdict.step)
        return True

    def _tell(self, verdict: Verdict) -> None:
        key = (verdict.channel, verdict.digest, verdict.against)
        again = key in self.judged and self.judged[key][0] == verdict.outcome
        self.judged[key] = verdict.outcome, time.monotonic()
        if again:
            return
        self.metrics.verdicts.labels(verdict.channel, verdict.outcome).inc()
        tag = version(verdict.step)
        self.told[verdict.channel] = {"tag": tag, "verdict": verdict.outcome, "why": verdict.why}
        self.heart.beat(gate=self.told, force=True)
        line = {"at": now(), "channel": verdict.channel, "step": verdict.step, "digest": verdict.digest} | self.told[verdict.channel]
        try:
            durable.append_line(self.home / "history" / "gate.jsonl", json.dumps(line))
        except StoreFull as e:
            logger.warning("%s", e)
        logger.info("%s %s for %s: %s", tag, verdict.outcome, verdict.channel, verdict.why)

    def _retain(self, registry: OciLayout) -> None:
        try:
            gone = retain(registry, keep=self.config.keep, keep_moves=self.config.keep_moves, also=needed(self.home)).gone
            if gone:
                done = collect(registry)  # of those of a day ago: today's are young
                logger.info("let go of %d versions; dropped %d files, %.1f MB", len(gone), done.files, done.bytes / 1e6)
        except Corrupt as e:
            logger.error("nothing is let go: %s", e)


def needed(home: Path) -> set[str]:
    """Digests of snapshots that the home measures by: drift's references."""
    return {source["snapshot"]["digest"] for source in read_state(home)["sources"].values() if source.get("snapshot")}
