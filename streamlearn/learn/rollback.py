"""Going back to the last sound checkpoint, past the stretch that made the learner ill.

  1. find     the newest checkpoint that was sound when it was written
  2. mark     in its state: the steps up to where illness was found are to be skipped, and why; the rate halved, where that is to blame
  3. commit   it as a checkpoint of the same step; the pointer forgets all after it        <- THE COMMIT POINT
  4. go on    from it: batches of the stretch are taken and not learnt, so the sequence stays what it was

Killed after   what is left                                      who mends it
  1, 2         nothing                                           the next start goes on from the newest checkpoint, and falls ill again
  3            objects of the checkpoints that were forgotten    nobody needs to; a rollback that is not killed deletes them

A collapse is laid to the rate, and values that are not finite to the data, unless going back has not helped: the second time in a row the rate is halved
for these too.  A row ends when a sound checkpoint lies clear of the stretch before it.  After `train.max_rollbacks` in a row the learner stops.
"""

import logging
from typing import Any

from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.guard import LOOK_EVERY, Ill
from streamlearn.learn.state import fresh_state

CLEAR = 5 * LOOK_EVERY  # steps after a stretch that a learner must have been sound for
logger = logging.getLogger(__name__)


class GivenUp(ConfigError):
    """Going back does not help: a person is needed, so the role is not started again (supervise.py)."""


def roll_back(config: Config, checkpoints: Checkpoints, ill: Ill) -> dict[str, Any]:
    """Steps 1 to 3; what was done, for the record.  Raises GivenUp."""
    state = fresh_state(config)
    saved = checkpoints.load(sound_at=ill.since, room=state.room())
    if saved is None:
        raise GivenUp(
            f"step {ill.step}: {ill}; there is no sound checkpoint to go back to. Mend the cause, and start with a new home"
        ) from ill
    state.load_state_dict(saved)
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
    halved = ill.halve or row > 1
    if halved:
        state.policy.retreat(state.step)
    checkpoints.replace(state.state_dict(), state.step)
    logger.error("step %d: %s; back to step %d, and on from %d%s", ill.step, ill, state.step, ill.step, ", rate halved" if halved else "")
    return {"step": ill.step, "to": state.step, "why": str(ill), "halved": halved, "in_a_row": row}


def in_a_row(rollbacks: list[list[Any]]) -> int:
    """How many of the newest [to, from, why] went back behind the end of the one before, or hardly beyond it."""
    row = 1
    while row < len(rollbacks) and rollbacks[-row][0] < rollbacks[-row - 1][1] + CLEAR:
        row += 1
    return row
