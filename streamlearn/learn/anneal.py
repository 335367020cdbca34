"""A release candidate: a branch of a run whose rate falls linearly to zero, while the trunk learns on as if nothing were.

  1. read     a checkpoint of the trunk, verified
  2. commit   it as the branch's first checkpoint, with the plan: linear to zero over so many steps       <- THE COMMIT POINT
  3. learn    as any run does, from the trunk's shards; checkpoints, history and rounds lie in the branch
  4. publish  the last step's averaged weights, to the branch's registry

Killed after   what is left                 who mends it
  1            nothing
  2, 3         a branch with a checkpoint   the same command goes on from it
  4            nothing

The rate of a stream is constant, so its weights jitter about where they would settle; 5 to 10 % of the steps suffice to let them
(learning science: DESIGN.md, section 5).  The trunk's store is only read.
"""

from dataclasses import dataclass
from typing import Any

from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.object_store import ObjectStore
from streamlearn.learn.checkpoint import Checkpoints


@dataclass(frozen=True)
class Plan:
    first: int  # step of the trunk's checkpoint
    steps: int

    @property
    def end(self) -> int:
        return self.first + self.steps


def branch(trunk: ObjectStore, own: ObjectStore, config: Config, *, share: float, steps: int = 0) -> Plan:
    """Steps 1 and 2, unless they are done: `steps` (0: `share` of the trunk's) from its newest sound checkpoint.

    Raises ConfigError where there is nothing to branch from, or `own` is no branch.
    """
    kept = Checkpoints(own, keep=config.train.keep_checkpoints)
    saved = kept.load()
    if saved is not None:
        return _plan(saved, steps)
    saved = Checkpoints(trunk, keep=1).load()
    if saved is None:
        raise ConfigError("the trunk has no checkpoint yet: let it learn first")
    first, warm = int(saved["step"]), config.train.optim.warmup_steps
    if first <= warm:
        raise ConfigError(f"the trunk's newest checkpoint is of step {first}, in the warm-up ({warm} steps): let it learn first")
    if saved["policy"].get("anneal") is not None:
        raise ConfigError("the trunk is itself a branch that was annealed; branch from the run that it came from")
    plan = Plan(first, steps or max(1, round(share * first)))
    saved["policy"]["anneal"] = [plan.first, plan.steps]
    kept.save(saved, first, wait=True)
    if kept.failures:
        raise ConfigError("the branch's folder has no room for a checkpoint; free some space")
    return plan


def _plan(saved: dict[str, Any], steps: int) -> Plan:
    plan = saved["policy"].get("anneal")
    if plan is None:
        raise ConfigError("this home is no branch: it has checkpoints of a run of its own; name a new folder")
    if steps and steps != plan[1]:
        raise ConfigError(f"this branch was begun with {plan[1]} steps, not {steps}; leave --steps out to go on, or name a new folder")
    return Plan(*plan)


def annealing(config: Config, plan: Plan, *, home: str, name: str) -> Config:
    """The trunk's configuration, as the branch goes by it: to the plan's end, with one snapshot, there."""
    train = config.train.model_copy(update={"max_steps": plan.end, "snapshot_steps": plan.end, "name": name})
    snapshots = config.snapshots.model_copy(update={"registry": ""})
    return config.model_copy(update={"home": home, "train": train, "snapshots": snapshots})
