"""The role `train`: resume, learn, checkpoint, publish, for ever.

At every `snapshot_steps` the checkpoint is committed first, then the snapshot is published from it.  A learner killed between
the two publishes it when it comes back (the same state gives the same bytes, so publishing twice is publishing once).

Of many ranks (docs/scale.md) each runs this.  Before every step they meet: whether all have their part of the batch, whether any was told to stop,
and what the first has taken from outside.  So all take the same steps, in force of the same orders; only the first speaks and publishes.
"""

import json
import logging
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError, Corrupt, Retryable
from streamlearn.contract.export import Export, WarmStart
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.status import Heartbeat
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.ema import batchnorms, calibrated
from streamlearn.learn.guard import Ill, sound
from streamlearn.learn.inputs import Inputs, Sources, in_force
from streamlearn.learn.model import Model
from streamlearn.learn.parallel import same_buffers, whole
from streamlearn.learn.ranks import joined
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
    ranks = joined(timeout_s=config.train.ranks_timeout_s)
    while True:
        checkpoints = Checkpoints(store, keep=config.train.keep_checkpoints, ranks=ranks, timeout_s=config.train.ranks_timeout_s)
        state = resume(config, checkpoints, heartbeat, warm)
        stream = open_stream(state.stream or None)
        recorder = Recorder(config, state, metrics, heartbeat, stream)
        inputs = Inputs(store, state, sources) if sources is not None and ranks.first else None
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
    saved = checkpoints.load(room=state.room())
    if saved is None:
        logger.info("starting at step 0")
        return state if warm is None else fresh_state(config, partial(warmed, config=config, heartbeat=heartbeat, warm=warm))
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


def warmed(state: TrainState, config: Config, heartbeat: Heartbeat, warm: Callable[[], WarmStart]) -> None:
    taken = warm_start(state, config, warm())
    logger.info("warm start: %s", taken)
    heartbeat.history(event="warm_start", step=0, **taken)


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
        self.over = False  # some rank is at its end
        self.inputs, self.ranks = inputs, state.objective.ranks

    def run(self) -> None:
        if self.state.step and self.state.step % self.config.train.snapshot_steps == 0 and self.well():
            self.snapshot()  # the one that a kill may have prevented; else it is there already
        self.recorder.beat(self.state, "learning", force=True)
        try:
            limits = {"max_bad": self.config.train.max_bad_steps, "micro_batch": self.config.train.micro_batch}
            train(self.state, self.batches(), [self.recorder.look, self.save], **limits)
        finally:
            self.checkpoints.wait()
        if self.ranks.told(self.state.step != self.checkpoints.last_step and self.state.step > 0):
            self.recorder.beat(self.state, "stopping", force=True)
            self.checkpoint(wait=True)
        self.recorder.checkpointed(self.checkpoints)
        logger.info("stopped at step %d", self.state.step)

    def batches(self) -> Iterator[Batch]:
        limit = self.config.train.max_steps
        for batch in self.stream.batches():
            over = self.stop.is_set() or bool(limit and self.state.step >= limit)
            while not (go := self.meet(ready=batch is not None, over=over)) and not over and not self.over and batch is not None:
                self.recorder.waits(self.state)  # others wait for their parts
                over = self.stop.is_set()
            if over or self.over:
                return
            if batch is None or not go:
                self.recorder.waits(self.state)
                continue
            self.recorder.waited(batch.wait_s)
            yield batch
            if limit and self.state.step >= limit:
                return
        self.meet(ready=False, over=True)

    def meet(self, *, ready: bool, over: bool) -> bool:
        """Between two steps, all ranks: whether all are ready for the next.  Sets `over` where one of them is at its end."""
        rate = self.state.policy.rate(self.state.step)  # before the first rank has taken anything
        news = self.inputs.take(self.state) if self.inputs is not None and ready and not over else []
        if self.ranks.world > 1:
            where = zlib.crc32(repr((self.state.step, rate)).encode())
            waits, ends, told, high, low = self.ranks.agreed(not ready, over, len(news), where, -where)
            if high != -low:
                raise Corrupt("the ranks are not at the same step, or have different rates: a fault of streamlearn's; start them again")
            if told:
                news = self.ranks.told(news)
                if not self.ranks.first:
                    for entry in news:
                        in_force(self.state, entry)
            ready, self.over = not waits, bool(ends)
        self.recorder.took(news)
        return ready

    def by_first(self, work: Callable[[], None]) -> None:
        """What only the first rank does, however long it takes; the others wait for it."""
        if self.ranks.first:
            work()
            self.heed(done=True)
        while not self.ranks.first and not self.heed(done=False):
            pass

    def heed(self, *, done: bool) -> bool:
        """Whether the first rank is done; all are stopped where one was told to stop."""
        ended, stopped = self.ranks.agreed(done, self.stop.is_set())
        if stopped:
            self.stop.set()
        return bool(ended)

    def pause(self, seconds: float) -> bool:
        """Of the first, in the middle of its work.  True: told to stop."""
        self.heed(done=False)
        return self.stop.wait(seconds)

    def well(self) -> bool:
        """On every rank: each sees its own part of what is sharded."""
        return not any(self.ranks.agreed(not sound(self.state)))

    def checkpoint(self, *, wait: bool) -> bool:
        """Whether the state was sound."""
        if self.ranks.world > 1:
            same_buffers(self.state.model, self.state.ema.model)
        well = self.well()
        self.checkpoints.save(self.state.state_dict(), self.state.step, wait=wait, sound=well)
        return well

    def save(self, state: TrainState, step: Step) -> None:
        """A watcher: checkpoints and snapshots at their steps."""
        self.recorder.checkpointed(self.checkpoints)  # one that was written behind the training's back
        publish_now = state.step % self.config.train.snapshot_steps == 0
        if step.skipped or not (publish_now or state.step % self.config.train.checkpoint_steps == 0):
            return  # a skipped stretch must not push the checkpoints before it out of the newest K: the next rollback may need them
        well = self.checkpoint(wait=publish_now)
        self.recorder.checkpointed(self.checkpoints)
        if publish_now and well:
            self.snapshot()
        elif publish_now:
            self.recorder.withheld(state)

    def snapshot(self) -> None:
        """Publish the averaged weights of this very step."""
        average, weights = self.state.ema.model, whole(self.state.ema.model)  # of shards all ranks make the whole together
        if weights:
            average = Model(self.config.model)
            average.load_state_dict(weights)
            average.to(self.state.objective.prototypes.weight.device)
        self.by_first(partial(self.send, average))

    def send(self, average: Model) -> None:
        """Calibrated; wait out a full store, or a registry that cannot be reached."""
        refs = self.stream.sample(self.state.stream, self.config.train.bn_images)
        size = self.config.stream.crops[0].size
        images = self.calibration(refs, size)
        if images is None:
            return
        if len(images) < 2 and batchnorms(self.state.model.trunk):
            logger.error("no snapshot of step %d: %d images to calibrate BatchNorm on", self.state.step, len(images))
            return
        device = next(average.parameters()).device
        trunk = calibrated(average.trunk, images.to(device))
        export = self.export({k: v.cpu() for k, v in trunk.state_dict().items()}, size)
        began = time.monotonic()
        while True:
            try:
                tag, digest = self.publish(export)
                break
            except Retryable as e:
                logger.error("snapshot of step %d waits: %s", self.state.step, e)
                if self.pause(e.after_s) or time.monotonic() - began > FULL_LIMIT_S:
                    raise
        self.recorder.published(self.state, tag, digest)
        if self.gallery is not None and len(images):
            self.show_prototypes(average.head, trunk, images, refs)

    def calibration(self, refs: list[str], size: int) -> Tensor | None:
        """The images; None where the learner is told to stop before it has them: the next start publishes."""
        while True:
            try:
                return self.stream.eval_images(refs, size)
            except Retryable:
                self.recorder.waits(self.state)
                if self.pause(1.0):  # the stream itself goes on trying, in its own time
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
    def show_prototypes(self, head: torch.nn.Module, trunk: torch.nn.Module, images: Tensor, refs: list[str]) -> None:
        """The most typical images of the most used prototypes, for the report: references, not pictures."""
        assert self.gallery is not None
        head.eval()
        z = torch.nn.functional.normalize(head(torch.cat([trunk(chunk) for chunk in images.split(128)])), dim=1)
        head.train()
        scores_NK = z @ self.state.objective.prototypes.weight.T
        use = torch.bincount(scores_NK.argmax(1), minlength=scores_NK.shape[1])
        chosen = use.topk(min(GALLERY[0], len(use))).indices
        prototypes = []
        for k in chosen.tolist():
            best = scores_NK[:, k].topk(min(GALLERY[1], len(refs), len(scores_NK))).indices
            prototypes.append({"id": k, "use": int(use[k]), "refs": [refs[i] for i in best.tolist()]})
        durable.write(self.gallery, json.dumps({"step": self.state.step, "prototypes": prototypes}).encode())
