"""What the learner says of itself: metrics, heartbeat, history.  It looks and never touches."""

import logging
import math
import time
from datetime import datetime
from typing import Any

from streamlearn.contract.config import Config
from streamlearn.contract.metrics import SIGNS, WAITS, LearnerMetrics, set_waiting
from streamlearn.contract.status import Heartbeat, now
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.device import Device
from streamlearn.learn.losses import effective_rank
from streamlearn.learn.seams import Stream
from streamlearn.learn.state import TrainState
from streamlearn.learn.trainer import Step

RECORD_EVERY = 10  # steps between lines of history
RANK_EVERY = 50  # steps between looks at the effective rank
logger = logging.getLogger(__name__)


class Recorder:
    """Watches and tells: metrics, heartbeat, history."""

    def __init__(self, config: Config, state: TrainState, metrics: LearnerMetrics, heartbeat: Heartbeat, stream: Stream):
        self.config, self.metrics, self.heart, self.stream = config, metrics, heartbeat, stream
        self.wait_s, self.began, self.images_before = 0.0, time.monotonic(), -1
        self.idle = False  # nothing to learn, and the log says so
        self.handed = time.monotonic()  # when the batch at hand was handed over
        self.images, self.fresh = state.images, state.fresh  # told to the metrics so far
        self.losses: list[float] = []
        self.rank = math.nan
        self.failures = 0  # told to the metrics so far
        self.told: dict[str, int] = {}  # likewise, of the stream's counters
        self.written: tuple[int, str] | None = None  # the newest checkpoint that was told
        self.metrics.chance.set(state.guard.ln_k)
        self.device = Device(next(state.model.parameters()).device)

    def waited(self, seconds: float) -> None:
        self.wait_s += seconds
        self.idle = False
        self.handed = time.monotonic()
        self.metrics.wait_seconds.inc(seconds)

    def look(self, state: TrainState, step: Step) -> None:
        if self.images_before < 0:
            self.images_before, self.wait_s, self.began = state.images, 0.0, time.monotonic()  # the wait for the first was before
        self.metrics.step_seconds.observe(time.monotonic() - self.handed)
        fresh, seen = state.fresh - self.fresh, state.images - self.images
        self.images, self.fresh = state.images, state.fresh
        self.metrics.images.labels("fresh").inc(fresh)
        self.metrics.images.labels("replay").inc(seen - fresh)
        self.metrics.steps.inc()
        self.metrics.step.set(state.step)
        self.metrics.loss.set(step.loss)
        if math.isfinite(step.prequential) or not step.sound:
            self.metrics.prequential.set(step.prequential)  # nan of a sound step: nothing in it was fresh
        self.metrics.lr.set(step.rate)
        self.metrics.grad_norm.set(step.grad_norm)
        self.metrics.halvings.set(len(state.policy.halvings))
        if step.skipped:
            self.metrics.skipped.inc()
        elif step.sound:
            self.losses.append(step.prequential if math.isfinite(step.prequential) else step.loss)
        else:
            self.metrics.bad_steps.inc()
            self.heart.history(event="bad_step", step=state.step, loss=str(step.loss))
        for sign in SIGNS:
            self.metrics.sign.labels(sign).set(sign in state.guard.signs)
        self.rated(state)
        if state.step % RANK_EVERY == 0 and step.sound:
            self.rank = float(effective_rank(step.z_BD.cpu()))
            self.metrics.rank.set(self.rank)
        if state.step % RECORD_EVERY == 0:
            self._record(state, step)
        self.beat(state, "learning", loss=step.loss if math.isfinite(step.loss) else None, lr=step.rate)

    def took(self, inputs: list[dict[str, Any]]) -> None:
        """Orders and what else came from outside: each is told with the step it is in force from."""
        for entry in inputs:
            logger.info("step %d: %s", entry["step"], {k: v for k, v in entry.items() if k not in ("step", "at")})
            told = {k: v for k, v in entry.items() if k != "at"}
            self.heart.history(**{"event": "input", **told})
            if entry["kind"] == "command":
                self.metrics.orders.labels(entry["action"]).inc()

    def rated(self, state: TrainState) -> None:
        """What the rate's policy has done, and what it waits for."""
        for event in state.policy.told():
            logger.info("learning rate: %s", event)
            self.heart.history(**event)
        loss = state.policy.loss
        self.metrics.window.set(loss.steps)
        if loss.trend is not None:
            self.metrics.gain.set(loss.trend.gain)
            self.metrics.doubt.set(loss.trend.doubt)
        for why in WAITS:
            self.metrics.plateau.labels(why).set(state.policy.waits == why)

    def _record(self, state: TrainState, step: Step) -> None:
        measures = state.objective.measures()
        self.metrics.code_entropy.set(measures["code_entropy"])
        self.metrics.perplexity.set(measures["perplexity"])
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses.clear()
        rounded: dict[str, Any] = {k: round(v, 4) for k, v in measures.items()}
        looked = {k: round(v, 4) for k, v in state.guard.looked.items()} | {"well": state.guard.well} if state.guard.looked else None
        norm = round(step.grad_norm, 4) if math.isfinite(step.grad_norm) else None
        self.heart.history(
            step=state.step,
            loss=mean,
            lr=step.rate,
            images=state.images,
            fresh=state.fresh,
            grad_norm=norm,
            signs=list(state.guard.signs),
            looked=looked,
            **rounded,
        )
        counters = self._stream()
        spent = time.monotonic() - self.began
        self.heart.beat(images_per_s=round((state.images - self.images_before) / max(spent, 1e-9), 1))
        self.heart.beat(wait_share=round(self.wait_s / max(spent, 1e-9), 3), stream=counters, **rounded)
        self.wait_s, self.began, self.images_before = 0.0, time.monotonic(), state.images

    def _stream(self) -> dict[str, int]:
        """The stream's counters, told to the metrics."""
        m, counters = self.metrics, self.stream.counters()
        for name, counter in (
            ("corrupt", m.corrupt),
            ("downloads", m.downloads),
            ("download_bytes", m.download_bytes),
            ("failures", m.stream_failures),
            ("worker_deaths", m.worker_deaths),
            ("cache_hits", m.cache_hits),
            ("cache_evictions", m.cache_evictions),
        ):
            counter.inc(counters.get(name, 0) - self.told.get(name, 0))
        for name, gauge in (
            ("expired_unseen", m.unseen),
            ("batches_ahead", m.batches_ahead),
            ("shards_ahead", m.shards_ahead),
            ("cache_bytes", m.cache_bytes),
        ):
            gauge.set(counters.get(name, 0))
        self.told = counters
        self._device()
        return counters

    def _device(self) -> None:
        name, used = self.device.name, self.device.used()
        if used is not None:
            self.metrics.gpu_busy.labels(name).set(used.busy)
            self.metrics.gpu_memory.labels(name).set(used.memory)
            self.metrics.gpu_memory_size.labels(name).set(used.memory_size)

    def waits(self, state: TrainState) -> None:
        """There is no batch, for want of images, or of a store.  Said once in the log: `train anneal` has nobody who reads its heartbeat."""
        if not self.idle:
            logger.info("step %d: nothing to learn yet; it waits for images, or for the store", state.step)
        self.idle = True
        self.beat(state, "waiting", stream=self._stream())

    def beat(self, state: TrainState, what: str, *, force: bool = False, **more: Any) -> None:
        self.metrics.heartbeat.set_to_current_time()
        known: dict[str, Any] = {
            "state": what,
            "step": state.step,
            "images": state.images,
            "fresh": state.fresh,
            "bad_steps": state.bad_steps,
            "skipped_steps": state.skipped,
            "rollbacks": len(state.rollbacks),
            "collapse_signs": list(state.guard.signs),
        }
        known |= {
            "halvings": len(state.policy.halvings),
            "lr_held": state.policy.held,
            "plateau_waits": state.policy.waits,
            "cursor": state.stream.get("cursor", {}),
            "round": state.stream.get("round", 0),
        }
        known |= self.stream.waiting()
        set_waiting(self.metrics.waiting, known["waiting_on"], known["waiting_s"])
        if newest := state.stream.get("window", ("", ""))[1]:
            self.metrics.watermark.set(datetime.fromisoformat(newest).timestamp())
        if math.isfinite(self.rank):
            known["effective_rank"] = round(self.rank, 2)
        self.heart.beat(force=force, **known, **more)

    def checkpointed(self, checkpoints: Checkpoints) -> None:
        """What has been committed or has failed since; the newest may still be on its way to the store."""
        if checkpoints.written is not None and checkpoints.written != self.written:
            self.written = step, at = checkpoints.written
            self.metrics.checkpoints.inc()
            self.metrics.checkpoint_at.set(datetime.fromisoformat(at).timestamp())
            self.heart.beat(force=True, last_checkpoint={"step": step, "at": at}, checkpoint_failures=self.failures)
        if checkpoints.failures > self.failures:
            self.metrics.checkpoint_failures.inc(checkpoints.failures - self.failures)
            self.failures = checkpoints.failures
            self.heart.beat(force=True, checkpoint_failures=self.failures)

    def withheld(self, state: TrainState) -> None:
        self.metrics.withheld.inc()
        logger.error("no snapshot of step %d: %s", state.step, ", ".join(state.guard.signs) or "the last steps were not finite")
        self.heart.history(event="snapshot_withheld", step=state.step, signs=list(state.guard.signs))

    def published(self, state: TrainState, tag: str, digest: str) -> None:
        logger.info("published %s (%s)", tag, digest[:19])
        self.metrics.snapshots.inc()
        self.metrics.snapshot_at.set_to_current_time()
        self.heart.history(event="snapshot", step=state.step, tag=tag, digest=digest)
        self.beat(state, "learning", force=True, last_snapshot={"tag": tag, "digest": digest, "step": state.step, "at": now()})
