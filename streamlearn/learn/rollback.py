"""Going back to the last sound checkpoint, past the stretch that made the learner ill.

  1. find     the newest checkpoint that was sound when it was written; where going back to that one has not helped, the one before it, if there is one
  2. mark     in its state: the steps up to where illness was found are to be skipped, and why; orders of these steps; the rate that follows
  3. commit   it as a checkpoint of the same step; the pointer forgets all after it        <- THE COMMIT POINT
  4. go on    from it: batches of the stretch are taken and not learnt, so the sequence stays what it was

Killed after   what is left                                      who mends it
  1, 2         nothing                                           the next start goes on from the newest checkpoint, and falls ill again
  3            objects of the checkpoints that were forgotten    nobody needs to; a rollback that is not killed deletes them

A collapse is laid to the rate, and values that are not finite to the data, unless going back has not helped: the second time in a row the rate is halved
for these too.  A row ends when a sound checkpoint lies clear of the stretch before it.  After `train.max_rollbacks` in a row the learner stops.

Orders: what an operator says after a rollback goes before it.  What was said before, in the steps that are passed over, is settled in step 2 and not
taken again: a hold and a lower rate stay; a rate above that of the checkpoint does not, for it is what has to be blamed, and then nothing is halved.
"""

import logging
from typing import Any

from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.guard import LOOK_EVERY, Ill
from streamlearn.learn.inputs import settle
from streamlearn.learn.state import TrainState, fresh_state

CLEAR = 5 * LOOK_EVERY  # steps after a stretch that a learner must have been sound for
logger = logging.getLogger(__name__)


class GivenUp(ConfigError):
    """Going back does not help: a person is needed, so the role is not started again (supervise.py)."""


def roll_back(config: Config, checkpoints: Checkpoints, ill: Ill) -> dict[str, Any]:
    """Steps 1 to 3; what was done, for the record.  Raises GivenUp."""
    state, rates = found(config, checkpoints, ill)
    row = in_a_row([*state.rollbacks, [state.step, ill.step, str(ill)]])
    if row > config.train.max_rollbacks:
        told = "; ".join(f"{at} -> {to}: {why}" for to, at, why in state.rollbacks[1 - row :]) if row > 1 else "none"
        raise GivenUp(
            f"step {ill.step}: {ill}. {row - 1} rollbacks in a row have not helped ({told}). Next: look at the newest shards "
            "(`streamlearn dataset show`), pause the source that sent them, lower the rate (`streamlearn train lr --set`), and start again: "
            f"the checkpoint of step {state.step} is sound. train.max_rollbacks = {config.train.max_rollbacks} is the limit"
        ) from ill
    state.rollbacks.append([state.step, ill.step, str(ill)])
    state.skip_until = ill.step
    settle(checkpoints.store, state)
    raised = state.policy.full > rates[0]
    halved = (row > 1 or ill.halve) and not raised
    state.policy.retreat(state.step, at_most=min(rates), halve=halved)
    checkpoints.replace(state.state_dict(), state.step)
    rate = state.policy.full
    logger.error("step %d: %s; back to step %d, and on from %d at a rate of %g", ill.step, ill, state.step, ill.step, rate)
    return {"step": ill.step, "to": state.step, "why": str(ill), "halved": halved, "lr": rate, "in_a_row": row} | (
        {"order_undone": True} if raised else {}
    )


def found(config: Config, checkpoints: Checkpoints, ill: Ill) -> tuple[TrainState, list[float]]:
    """Step 1: the state, with all rollbacks there were, and the rates that must not be exceeded: the one there, and where rollbacks have led since."""
    state = fresh_state(config)
    saved = checkpoints.load(sound_at=ill.since, room=state.room())
    if saved is None:  # no longer kept; what was written after that and was not suspected yet is better than nothing
        saved = checkpoints.load(sound_at=ill.step, room=state.room())
    if saved is None:
        raise GivenUp(
            f"step {ill.step}: {ill}; there is no sound checkpoint to go back to. Mend the cause, and start with a new home"
        ) from ill
    state.load_state_dict(saved)
    last, rates = state.rollbacks[-1:], [state.policy.full]
    if last and state.step < last[0][1]:  # nothing was learnt since the last one: its weights may not be as sound as they seemed
        before = checkpoints.load(sound_at=last[0][0] - 1, room=state.room())
        if before is not None:
            rollbacks = state.rollbacks
            state.load_state_dict(before)
            state.rollbacks = rollbacks
            rates = [state.policy.full, *rates]
    return state, rates


def in_a_row(rollbacks: list[list[Any]]) -> int:
    """How many of the newest [to, from, why] went back behind the end of the one before, or hardly beyond it."""
    row = 1
    while row < len(rollbacks) and rollbacks[-row][0] < rollbacks[-row - 1][1] + CLEAR:
        row += 1
    return row
