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
from streamlearn.learn.parallel import norms
from streamlearn.learn.ranks import Ranks
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

    @property
    def named(self) -> Tensor:
        """(B,) bool: the image is the one that was planned, and no stand-in."""

    def taken(self, features_BD: Tensor | None, /) -> dict[str, Any]:
        """Where the stream stands once this batch is taken.  It is told what the images looked like, for its choice of what to replay:
        all of the batch's on every rank."""


@dataclass(frozen=True)
class Step:
    """What one step showed: for watchers."""

    loss: float  # nats, before the update
    prequential: float  # the same over the fresh images only; nan when there were none
    grad_norm: float
    rate: float
    sound: bool
    halved: bool
    z_BD: Tensor  # embeddings of the first view, of all ranks
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
        loss, loss_B, z_VBD = backward(state.model, state.objective, batch.crops, state.step, part=micro_batch, spread=state.spread)
        state.objective.before_step(state.step)  # frozen prototypes lose their gradient here
        average_gradients(state)
        seen = together(state.objective.ranks, batch, loss, loss_B, z_VBD)
        norm = gradient_norm(parameters)
        sound = bool(torch.isfinite(seen.loss + norm))  # one look, before anything moves; what it looks at is the same on all ranks
        halved = False
        if sound:
            state.optimizer.step()
            state.objective.after_step(state.step)
            state.ema.update(state.model, state.step, state.policy.steady_since)
            prequential = float(seen.loss_B[seen.fresh_B].mean())
            if seen.fresh_B.any():
                halved = state.policy.observe(prequential, state.step)
        else:
            prequential = float("nan")
            state.ema.undo_buffers(state.model)
        state.stream = batch.taken(seen.features_BD if sound else None)
        count(state, seen.fresh_B, sound, max_bad)
        if sound:
            watch(state, float(seen.loss), seen.z_BD)
        step = Step(float(seen.loss), prequential, float(norm), rate, sound, halved, seen.z_BD)
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


@dataclass(frozen=True)
class Seen:
    """What a batch showed, the parts of all ranks in their order: the same, to the last bit, on every one."""

    loss: Tensor  # ()
    loss_B: Tensor
    fresh_B: Tensor  # bool
    features_BD: Tensor  # the mean direction of the assigning views; the stream keeps a moving average of it (MinRed)
    z_BD: Tensor  # of the first view


def together(ranks: Ranks, batch: Batch, loss: Tensor, loss_B: Tensor, z_VBD: Tensor) -> Seen:
    """One collective for all."""
    features_BD = F.normalize(z_VBD[: len(batch.crops[0])].sum(0), dim=-1)
    if ranks.world == 1:
        return Seen(loss, loss_B, batch.fresh, features_BD, z_VBD[0])
    flags_B2 = torch.stack([batch.fresh, batch.named], dim=1).to(loss_B)
    told = ranks.gathered(torch.cat([loss_B[:, None], flags_B2, features_BD, z_VBD[0]], dim=1)[None])[0]
    features_BD, z_BD = told[:, 3:].chunk(2, dim=1)
    return Seen(told[:, 0].mean(), told[:, 0], told[:, 1] > 0, features_BD * told[:, 2:3], z_BD)


def average_gradients(state: TrainState) -> None:
    """The objective's own, over the ranks; the model's are averaged while they are made (parallel.py)."""
    for p in state.objective.parameters() if state.objective.ranks.world > 1 else ():
        if p.grad is not None:
            state.objective.ranks.total_of_all(p.grad).div_(state.objective.ranks.world)


def count(state: TrainState, fresh_B: Tensor, sound: bool, max_bad: int) -> None:
    """The batch is taken, whether or not it could be learnt: the sequence goes on."""
    state.step += 1
    state.images += len(fresh_B)
    state.fresh += int(fresh_B.sum())
    state.bad_steps += not sound
    state.bad_in_a_row = 0 if sound else state.bad_in_a_row + 1
    if not sound:
        logger.error("step %d skipped: loss or gradient not finite (%d in a row)", state.step, state.bad_in_a_row)
    if state.bad_in_a_row >= max_bad:
        ill = NonFinite(f"{max_bad} steps in a row were not finite. Lower train.optim.lr, or raise objective.epsilon")
        ill.step = ill.since = state.step  # bad steps leave the weights alone
        raise ill


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """() norm over all gradients, whole ones, without a host sync."""
    norm: Tensor = torch.linalg.vector_norm(norms([p.grad for p in parameters if p.grad is not None]))
    return norm
