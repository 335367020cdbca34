"""The training loop.  Read it once and you know what a step does, and in which order."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from streamlearn.learn.accumulate import backward
from streamlearn.learn.guard import LOOK_EVERY, Ill
from streamlearn.learn.objectives import parameters_of
from streamlearn.learn.state import TrainState

logger = logging.getLogger(__name__)


class Batch(Protocol):
    """What the stream hands over."""

    @property
    def crops(self) -> tuple[Tensor, ...]:
        """One (V_r,B,3,S_r,S_r) float32 a resolution, augmented and normalised; the first resolution's views assign codes."""

    @property
    def fresh(self) -> Tensor:
        """(B,) bool: learnt for the first time."""

    def taken(self, features_BD: Tensor | None, /) -> dict[str, Any]:
        """Where the stream stands once this batch is taken.  It is told what the images looked like, for its choice of what to replay."""


@dataclass(frozen=True)
class Step:
    """What one step showed: for watchers."""

    loss: float  # nats, before the update
    prequential: float  # the same over the fresh images only; nan when there were none
    grad_norm: float
    rate: float
    sound: bool
    halved: bool
    z_BD: Tensor  # embeddings of the first view
    skipped: bool = False  # not learnt, for it is of a bad stretch


Watcher = Callable[[TrainState, Step], None]  # looks, never touches


class NonFinite(Ill):
    """Too many steps in a row were not finite: the weights or the input are beyond what skipping can mend."""


def train(state: TrainState, batches: Iterable[Batch], watchers: Sequence[Watcher], *, max_bad: int = 20, micro_batch: int = 0) -> None:
    """Learn from `batches` until they end, `micro_batch` images at a time (0: all).  All that changes is in `state`."""
    parameters = parameters_of(state.model, state.objective)
    for batch in batches:
        if state.step < state.skip_until:
            skip(state, batch, watchers)
            continue
        rate = state.policy.rate(state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.zero_grad(set_to_none=True)
        loss, loss_B, z_VBD = backward(state.model, state.objective, batch.crops, state.step, part=micro_batch)
        state.objective.before_step(state.step)  # frozen prototypes lose their gradient here
        norm = gradient_norm(parameters)
        sound = bool(torch.isfinite(loss + norm))  # one look, before anything moves
        halved = False
        if sound:
            state.optimizer.step()
            state.objective.after_step(state.step)
            state.ema.update(state.model, state.step, state.policy.steady_since)
            prequential = float(loss_B[batch.fresh].mean())
            if batch.fresh.any():
                halved = state.policy.observe(prequential, state.step)
        else:
            prequential = float("nan")
            state.ema.undo_buffers(state.model)
        # the mean direction of the assigning views; the stream keeps a moving average of it (MinRed)
        features_BD = F.normalize(z_VBD[: len(batch.crops[0])].sum(0), dim=-1)
        state.stream = batch.taken(features_BD if sound else None)
        count(state, batch, sound, max_bad)
        if sound:
            watch(state, float(loss), z_VBD[0])
        step = Step(float(loss), prequential, float(norm), rate, sound, halved, z_VBD[0])
        for look in watchers:
            look(state, step)


def skip(state: TrainState, batch: Batch, watchers: Sequence[Watcher]) -> None:
    """Take a batch of a bad stretch (rollback.py): the place in the stream and the count move on, and nothing else."""
    state.stream = batch.taken(None)
    state.step += 1
    state.skipped += 1
    nan = float("nan")
    step = Step(nan, nan, nan, state.policy.rate(state.step - 1), False, False, torch.empty(0, 0), skipped=True)
    for look in watchers:
        look(state, step)


def watch(state: TrainState, loss: float, z_BD: Tensor) -> None:
    """Raises Collapsed."""
    try:
        state.guard.observe(loss, z_BD, state.objective.measures() if state.guard.due else None)
    except Ill as e:
        e.step, e.since = state.step, max(0, state.step - state.guard.ill * LOOK_EVERY)
        raise


def count(state: TrainState, batch: Batch, sound: bool, max_bad: int) -> None:
    """The batch is taken, whether or not it could be learnt: the sequence goes on."""
    state.step += 1
    state.images += len(batch.fresh)
    state.fresh += int(batch.fresh.sum())
    state.bad_steps += not sound
    state.bad_in_a_row = 0 if sound else state.bad_in_a_row + 1
    if not sound:
        logger.error("step %d skipped: loss or gradient not finite (%d in a row)", state.step, state.bad_in_a_row)
    if state.bad_in_a_row >= max_bad:
        ill = NonFinite(f"{max_bad} steps in a row were not finite. Lower train.optim.lr, or raise objective.epsilon")
        ill.step = ill.since = state.step  # bad steps leave the weights alone
        raise ill


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """() norm over all gradients, without a host sync."""
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm
