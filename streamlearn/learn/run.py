"""The role `train`: resume, learn, checkpoint, publish, for ever.

At every `snapshot_steps` the checkpoint is committed first, then the snapshot is published from it.  A learner killed between
the two publishes it when it comes back (the same state gives the same bytes, so publishing twice is publishing once).
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.export import Export, WarmStart
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.status import Heartbeat, now
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.ema import calibrated
from streamlearn.learn.losses import effective_rank
from streamlearn.learn.state import TrainState, fresh_state
from streamlearn.learn.trainer import Batch, Step, train
from streamlearn.learn.warm import told, warm_start

RECORD_EVERY = 10  # steps between lines of history
RANK_EVERY = 50  # steps between looks at the effective rank
GALLERY = (8, 8)  # prototypes, images of each
FULL_LIMIT_S = 3600.0  # a store that stays full this long ends the role; everything up to the last checkpoint is safe
logger = logging.getLogger(__name__)


class Stream(Protocol):
    """What the learner asks of the stream besides batches."""

    def batches(self) -> Iterator["Timed | None"]:
        """Batches in their order; None whenever there is nothing to learn yet, or the store has to be waited for."""

    def sample(self, state: dict[str, Any], count: int) -> list[str]:
        """References of images learnt so far: a pure function of `state`."""

    def eval_images(self, refs: list[str], size: int) -> Tensor:
        """(N,3,size,size) normalised, centre-cropped; N can be less than len(refs) where images have vanished.  Raises Retryable."""

    def counters(self) -> dict[str, int]: ...
    def waiting(self) -> dict[str, Any]:
        """For the heartbeat: `waiting`, what for, in words, empty if for nothing; `waiting_s` and more."""

    def close(self) -> None: ...


class Timed(Batch, Protocol):
    @property
    def wait_s(self) -> float: ...


class Publish(Protocol):
    def __call__(self, export: Export, /) -> tuple[str, str]:
        """(tag, digest); publishing the same Export again is harmless."""


def run_train(
    config: Config,
    open_stream: Callable[[dict[str, Any] | None], Stream],
    store: ObjectStore,
    publish: Publish,
    metrics: LearnerMetrics,
    heartbeat: Heartbeat,
    *,
    stop: threading.Event,
    gallery: Path | None = None,
    warm: Callable[[], WarmStart] | None = None,
) -> TrainState:
    """Learn until `stop` or `train.max_steps`; the state it ended with.  `warm` is asked only where there is no checkpoint."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    checkpoints = Checkpoints(store, keep=config.train.keep_checkpoints)
    state = resume(config, checkpoints, heartbeat, warm)
    stream = open_stream(state.stream or None)
    recorder = Recorder(config, state, metrics, heartbeat, stream)
    learner = Learner(config, state, stream, checkpoints, publish=publish, recorder=recorder, stop=stop, gallery=gallery)
    try:
        learner.run()
    finally:
        stream.close()
    return state


def resume(config: Config, checkpoints: Checkpoints, heartbeat: Heartbeat, warm: Callable[[], WarmStart] | None = None) -> TrainState:
    """The newest sound checkpoint, or step 0: at random, or as `warm` says."""
    state = fresh_state(config)
    saved = checkpoints.load()
    if saved is None:
        logger.info("starting at step 0")
        if warm is not None:
            taken = warm_start(state, config, warm())
            logger.info("warm start: %s", taken)
            heartbeat.history(event="warm_start", step=0, **taken)
        return state
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as e:
        first = str(e).splitlines()[0]
        raise ConfigError(
            f"the checkpoint of step {saved.get('step')} does not fit [model], [objective] or [train.optim]: {first}; "
            "set them back, or start with a new home"
        ) from e
    logger.info("going on from step %d, %d halvings, cursor %s", state.step, len(state.policy.halvings), state.stream.get("cursor"))
    heartbeat.history(event="resumed", step=state.step)
    return state


class Learner:
    """The loop's surroundings: when to checkpoint, when to publish, when to end."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        stream: Stream,
        checkpoints: Checkpoints,
        *,
        publish: Publish,
        recorder: "Recorder",
        stop: threading.Event,
        gallery: Path | None,
    ):
        self.config, self.state, self.stream, self.checkpoints = config, state, stream, checkpoints
        self.publish, self.recorder, self.stop, self.gallery = publish, recorder, stop, gallery

    def run(self) -> None:
        if self.state.step and self.state.step % self.config.train.snapshot_steps == 0:
            self.snapshot()  # the one that a kill may have prevented; else it is there already
        self.recorder.beat(self.state, "learning", force=True)
        try:
            limits = {"max_bad": self.config.train.max_bad_steps, "micro_batch": self.config.train.micro_batch}
            train(self.state, self.batches(), [self.recorder.look, self.save], **limits)
        finally:
            self.checkpoints.wait()
        if self.state.step != self.checkpoints.last_step and self.state.step:
            self.recorder.beat(self.state, "stopping", force=True)
            self.checkpoints.save(self.state.state_dict(), self.state.step, wait=True)
        self.recorder.checkpointed(self.checkpoints)
        logger.info("stopped at step %d", self.state.step)

    def batches(self) -> Iterator[Batch]:
        limit = self.config.train.max_steps
        for batch in self.stream.batches():
            if self.stop.is_set() or (limit and self.state.step >= limit):
                return
            if batch is None:
                self.recorder.waits(self.state)
                continue
            self.recorder.waited(batch.wait_s)
            yield batch
            if limit and self.state.step >= limit:
                return

    def save(self, state: TrainState, step: Step) -> None:
        """A watcher: checkpoints and snapshots at their steps."""
        publish_now = state.step % self.config.train.snapshot_steps == 0
        if publish_now or state.step % self.config.train.checkpoint_steps == 0:
            self.checkpoints.save(state.state_dict(), state.step, wait=publish_now)
            self.recorder.checkpointed(self.checkpoints)
        if publish_now:
            self.snapshot()

    def snapshot(self) -> None:
        """Publish the averaged, calibrated weights of this very step; wait out a full store, or a registry that cannot be reached."""
        refs = self.stream.sample(self.state.stream, self.config.train.bn_images)
        size = self.config.stream.crops[0].size
        images = self.calibration(refs, size)
        if images is None:
            return
        if len(images) < 2:
            logger.error("no snapshot of step %d: %d images to calibrate BatchNorm on", self.state.step, len(images))
            return
        device = next(self.state.model.parameters()).device
        trunk = calibrated(self.state.ema.model.trunk, images.to(device))
        export = self.export({k: v.cpu() for k, v in trunk.state_dict().items()}, size)
        began = time.monotonic()
        while True:
            try:
                tag, digest = self.publish(export)
                break
            except Retryable as e:
                logger.error("snapshot of step %d waits: %s", self.state.step, e)
                if self.stop.wait(e.after_s) or time.monotonic() - began > FULL_LIMIT_S:
                    raise
        self.recorder.published(self.state, tag, digest)
        if self.gallery is not None:
            self.show_prototypes(trunk, images, refs)

    def calibration(self, refs: list[str], size: int) -> Tensor | None:
        """The images; None where the learner is told to stop before it has them: the next start publishes."""
        while True:
            try:
                return self.stream.eval_images(refs, size)
            except Retryable:
                self.recorder.waits(self.state)
                if self.stop.wait(1.0):  # the stream itself goes on trying, in its own time
                    return None

    def export(self, weights: dict[str, Tensor], size: int) -> Export:
        state, config = self.state, self.config
        measures = state.objective.measures()
        metrics = {
            "step": state.step,
            "images": state.images,
            "fresh": state.fresh,
            "learning_rate": state.policy.rate(state.step),
            "halvings": len(state.policy.halvings),
            "code_entropy": round(measures["code_entropy"], 6),
            "prototype_perplexity": round(measures["perplexity"], 6),
        }
        return Export(
            name=config.train.name,
            step=state.step,
            weights=weights,
            backbone=config.model.backbone,
            stem=config.model.stem,
            width=int(state.model.trunk.width),  # type: ignore[arg-type]
            size=size,
            mean=config.stream.mean,
            std=config.stream.std,
            metrics=metrics,
            cursor=dict(state.stream.get("cursor", {})),
            window=tuple(state.stream.get("window", ("", ""))),
            generation="",
            config=config.model_dump(mode="json"),
            config_digest=config.digest,
            license=config.train.license,
            source=config.train.source,
            notes={"init": told(state.origin)} if state.origin else {},
        )

    @torch.no_grad()
    def show_prototypes(self, trunk: torch.nn.Module, images: Tensor, refs: list[str]) -> None:
        """The most typical images of the most used prototypes, for the report: references, not pictures."""
        assert self.gallery is not None
        head = self.state.ema.model.head.eval()
        z = torch.nn.functional.normalize(head(torch.cat([trunk(chunk) for chunk in images.split(128)])), dim=1)
        self.state.ema.model.train()
        scores_NK = z @ self.state.objective.prototypes.weight.T
        use = torch.bincount(scores_NK.argmax(1), minlength=scores_NK.shape[1])
        chosen = use.topk(min(GALLERY[0], len(use))).indices
        prototypes = []
        for k in chosen.tolist():
            best = scores_NK[:, k].topk(min(GALLERY[1], len(refs), len(scores_NK))).indices
            prototypes.append({"id": k, "use": int(use[k]), "refs": [refs[i] for i in best.tolist()]})
        durable.write(self.gallery, json.dumps({"step": self.state.step, "prototypes": prototypes}).encode())


class Recorder:
    """Watches and tells: metrics, heartbeat, history."""

    def __init__(self, config: Config, state: TrainState, metrics: LearnerMetrics, heartbeat: Heartbeat, stream: Stream):
        self.config, self.metrics, self.heart, self.stream = config, metrics, heartbeat, stream
        self.wait_s, self.began, self.images_before = 0.0, time.monotonic(), -1
        self.handed = time.monotonic()  # when the batch at hand was handed over
        self.images, self.fresh = state.images, state.fresh  # told to the metrics so far
        self.losses: list[float] = []
        self.rank = math.nan
        self.failures = 0  # told to the metrics so far
        self.told: dict[str, int] = {}  # likewise, of the stream's counters
        self.committed = -1  # step of the newest checkpoint

    def waited(self, seconds: float) -> None:
        self.wait_s += seconds
        self.handed = time.monotonic()
        self.metrics.wait_seconds.inc(seconds)

    def look(self, state: TrainState, step: Step) -> None:
        if self.images_before < 0:
            self.images_before, self.began = state.images, time.monotonic()
        self.metrics.step_seconds.observe(time.monotonic() - self.handed)
        fresh, seen = state.fresh - self.fresh, state.images - self.images
        self.images, self.fresh = state.images, state.fresh
        self.metrics.images.labels("fresh").inc(fresh)
        self.metrics.images.labels("replay").inc(seen - fresh)
        self.metrics.steps.inc()
        self.metrics.step.set(state.step)
        self.metrics.loss.set(step.loss)
        self.metrics.lr.set(step.rate)
        self.metrics.grad_norm.set(step.grad_norm)
        self.metrics.halvings.set(len(state.policy.halvings))
        if step.sound:
            self.losses.append(step.prequential if math.isfinite(step.prequential) else step.loss)
        else:
            self.metrics.bad_steps.inc()
            self.heart.history(event="bad_step", step=state.step, loss=str(step.loss))
        if step.halved:
            logger.info("plateau proved at step %d: learning rate halved to %g", state.step, state.policy.rate(state.step))
            self.heart.history(event="halved", step=state.step, lr=state.policy.rate(state.step))
        if state.step % RANK_EVERY == 0 and step.sound:
            self.rank = float(effective_rank(step.z_BD.cpu()))
            self.metrics.rank.set(self.rank)
        if state.step % RECORD_EVERY == 0:
            self._record(state, step)
        self.beat(state, "learning", loss=step.loss if math.isfinite(step.loss) else None, lr=step.rate)

    def _record(self, state: TrainState, step: Step) -> None:
        measures = state.objective.measures()
        self.metrics.code_entropy.set(measures["code_entropy"])
        self.metrics.perplexity.set(measures["perplexity"])
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        self.losses.clear()
        rounded: dict[str, Any] = {k: round(v, 4) for k, v in measures.items()}
        norm = round(step.grad_norm, 4) if math.isfinite(step.grad_norm) else None
        self.heart.history(step=state.step, loss=mean, lr=step.rate, images=state.images, fresh=state.fresh, grad_norm=norm, **rounded)
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
        return counters

    def waits(self, state: TrainState) -> None:
        """There is no batch, for want of images, or of a store."""
        self.beat(state, "waiting", stream=self._stream())

    def beat(self, state: TrainState, what: str, *, force: bool = False, **more: Any) -> None:
        self.metrics.heartbeat.set_to_current_time()
        known: dict[str, Any] = {
            "state": what,
            "step": state.step,
            "images": state.images,
            "fresh": state.fresh,
            "bad_steps": state.bad_steps,
        }
        known |= {
            "halvings": len(state.policy.halvings),
            "cursor": state.stream.get("cursor", {}),
            "round": state.stream.get("round", 0),
        }
        known |= self.stream.waiting()
        self.metrics.waiting.set(known["waiting_s"])
        if math.isfinite(self.rank):
            known["effective_rank"] = round(self.rank, 2)
        self.heart.beat(force=force, **known, **more)

    def checkpointed(self, checkpoints: Checkpoints) -> None:
        """What is committed by now; the newest may still be on its way to the store."""
        if checkpoints.last_step != self.committed:
            self.committed = checkpoints.last_step
            self.metrics.checkpoints.inc()
        self.metrics.checkpoint_failures.inc(checkpoints.failures - self.failures)
        self.failures = checkpoints.failures
        self.heart.beat(force=True, last_checkpoint={"step": self.committed, "at": now()}, checkpoint_failures=self.failures)

    def published(self, state: TrainState, tag: str, digest: str) -> None:
        logger.info("published %s (%s)", tag, digest[:19])
        self.metrics.snapshots.inc()
        self.metrics.snapshot_at.set_to_current_time()
        self.heart.history(event="snapshot", step=state.step, tag=tag, digest=digest)
        self.beat(state, "learning", force=True, last_snapshot={"tag": tag, "digest": digest, "step": state.step, "at": now()})
