"""The role `train`: resume, learn, checkpoint, publish, for ever.

At every `snapshot_steps` the checkpoint is committed first, then the snapshot is published from it.  A learner killed between
the two publishes it when it comes back (the same state gives the same bytes, so publishing twice is publishing once).
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.export import Export, WarmStart
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.ema import batchnorms, calibrated
from streamlearn.learn.guard import Ill
from streamlearn.learn.inputs import Inputs, Sources
from streamlearn.learn.recorder import Recorder
from streamlearn.learn.rollback import roll_back
from streamlearn.learn.seams import Publish, Stream
from streamlearn.learn.state import TrainState, fresh_state
from streamlearn.learn.trainer import Batch, Step, train
from streamlearn.learn.warm import told, warm_start

GALLERY = (8, 8)  # prototypes, images of each
FULL_LIMIT_S = 3600.0  # a store that stays full this long ends the role; everything up to the last checkpoint is safe
logger = logging.getLogger(__name__)


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
    sources: Sources | None = None,
) -> TrainState:
    """Learn until `stop` or `train.max_steps`; the state it ended with.  `warm` is asked only where there is no checkpoint.

    `sources`: of what it heeds from outside (inputs.py); None: nothing, orders neither.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    while True:
        checkpoints = Checkpoints(store, keep=config.train.keep_checkpoints)
        state = resume(config, checkpoints, heartbeat, warm)
        stream = open_stream(state.stream or None)
        recorder = Recorder(config, state, metrics, heartbeat, stream)
        inputs = Inputs(store, state, sources) if sources is not None else None
        learner = Learner(config, state, stream, checkpoints, publish=publish, recorder=recorder, stop=stop, gallery=gallery, inputs=inputs)
        try:
            if inputs is not None:
                inputs.start()
            learner.run()
            return state
        except Ill as ill:
            done = roll_back(config, checkpoints, ill)
            metrics.rollbacks.inc()
            heartbeat.history(event="rollback", **done)
        finally:
            stream.close()
            if inputs is not None:
                inputs.close()


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
        state.policy.reconfigured(saved["policy"], state.step)
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
        inputs: Inputs | None = None,
    ):
        self.config, self.state, self.stream, self.checkpoints = config, state, stream, checkpoints
        self.publish, self.recorder, self.stop, self.gallery = publish, recorder, stop, gallery
        self.inputs = inputs

    def run(self) -> None:
        if self.state.step and self.state.step % self.config.train.snapshot_steps == 0 and self.state.sound:
            self.snapshot()  # the one that a kill may have prevented; else it is there already
        self.recorder.beat(self.state, "learning", force=True)
        try:
            limits = {"max_bad": self.config.train.max_bad_steps, "micro_batch": self.config.train.micro_batch}
            train(self.state, self.batches(), [self.recorder.look, self.save], **limits)
        finally:
            self.checkpoints.wait()
        if self.state.step != self.checkpoints.last_step and self.state.step:
            self.recorder.beat(self.state, "stopping", force=True)
            self.checkpoints.save(self.state.state_dict(), self.state.step, wait=True, sound=self.state.sound)
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
            if self.inputs is not None:
                self.recorder.took(self.inputs.take(self.state))
            yield batch
            if limit and self.state.step >= limit:
                return

    def save(self, state: TrainState, step: Step) -> None:
        """A watcher: checkpoints and snapshots at their steps."""
        publish_now = state.step % self.config.train.snapshot_steps == 0
        if publish_now or state.step % self.config.train.checkpoint_steps == 0:
            self.checkpoints.save(state.state_dict(), state.step, wait=publish_now, sound=state.sound)
            self.recorder.checkpointed(self.checkpoints)
        if publish_now and state.sound:
            self.snapshot()
        elif publish_now:
            self.recorder.withheld(state)

    def snapshot(self) -> None:
        """Publish the averaged, calibrated weights of this very step; wait out a full store, or a registry that cannot be reached."""
        refs = self.stream.sample(self.state.stream, self.config.train.bn_images)
        size = self.config.stream.crops[0].size
        images = self.calibration(refs, size)
        if images is None:
            return
        if len(images) < 2 and batchnorms(self.state.model.trunk):
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
        if self.gallery is not None and len(images):
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
            norm=config.model.norm,
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
