"""What an operator may tell a learner: numbered orders in the store, and the learner's record of when it took them.

`commands/<n:06d>.json` is put if absent, under the next free number: of two operators each gets one of their own, and the learner takes them in
that order.  `inputs/<m:08d>.json` is the learner's: all that reached it from outside, with the step (learn/inputs.py has the protocol).
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.status import now

COMMANDS, INPUTS = "train/commands/", "train/inputs/"
ACTIONS = ("halve", "set", "hold", "release")
MOST = 1e38  # a rate beyond float32 would end the learner at every start
SHOWN = 50  # orders in a list, at most: the newest


@dataclass(frozen=True)
class Order:
    """One word about the learning rate."""

    action: str  # of ACTIONS
    value: float | None = None  # the rate, of `set`
    by: str = ""  # user@host
    reason: str = ""
    at: str = ""  # RFC 3339

    def check(self) -> None:
        """Raises ConfigError."""
        if self.action not in ACTIONS:
            raise ConfigError(f"action {self.action!r}: one of {', '.join(ACTIONS)}")
        if (self.value is None) == (self.action == "set"):
            raise ConfigError(f"{self.action} {'needs a rate' if self.action == 'set' else 'takes no rate'}, got {self.value}")
        if self.value is not None and not 0 < self.value <= MOST:
            raise ConfigError(f"rate {self.value}: must be a number above 0, and at most {MOST:g}")


def command_key(number: int) -> str:
    return f"{COMMANDS}{number:06d}.json"


def input_key(number: int) -> str:
    return f"{INPUTS}{number:08d}.json"


def send(store: ObjectStore, order: Order) -> int:
    """Its number.  Raises ConfigError."""
    order.check()
    data = json.dumps(asdict(order) | {"at": order.at or now()}, indent=1).encode()
    number = _newest(store, COMMANDS) + 1
    while not store.put_if_absent(command_key(number), data):
        number += 1
    return number


def read_order(store: ObjectStore, number: int) -> Order | None:
    """None where there is none yet.  Raises Corrupt where it is no order."""
    try:
        raw = store.get(command_key(number))
    except NotFound:
        return None
    try:
        order = Order(**json.loads(raw))
        order.check()
    except (ValueError, TypeError, ConfigError) as e:
        raise Corrupt(f"{command_key(number)}: no order: {e}; give it anew with `streamlearn train lr`") from e
    return order


def read_input(store: ObjectStore, number: int) -> dict[str, Any] | None:
    """None where there is none yet.  Raises Corrupt."""
    try:
        found = json.loads(store.get(input_key(number)))
    except NotFound:
        return None
    except ValueError as e:
        raise Corrupt(f"{input_key(number)}: {e}; restore it from a backup") from e
    if not isinstance(found, dict) or "step" not in found or "kind" not in found:
        raise Corrupt(f"{input_key(number)}: no input of a learner; restore it from a backup")
    return found


def orders(store: ObjectStore) -> list[tuple[int, Order | None, int | None]]:
    """(number, order, step it is in force from), the newest SHOWN; None: it cannot be read; it is not taken yet."""
    newest = _newest(store, COMMANDS)
    taken: dict[int, int] = {}
    number = _newest(store, INPUTS)
    while number > 0 and (found := read_input(store, number)) is not None and len(taken) < SHOWN:
        if found["kind"] in ("command", "refused"):
            taken[found["number"]] = found["step"]
        number -= 1
    listed: list[tuple[int, Order | None, int | None]] = []
    for n in range(max(1, newest - SHOWN + 1), newest + 1):
        try:
            order = read_order(store, n)
        except Corrupt:
            order = None
        listed.append((n, order, taken.get(n)))
    return listed


def _newest(store: ObjectStore, prefix: str) -> int:
    numbers = (key.removeprefix(prefix).removesuffix(".json") for key in store.list(prefix))
    return max((int(n) for n in numbers if n.isdigit()), default=0)
