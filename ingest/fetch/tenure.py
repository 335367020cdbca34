"""Who asks a host: one owner at a time, over restarts, rebalances and deaths.

A host's name is the key of its candidates, so it has one partition number, the same in `candidates` and in every retry topic; the consumer
group deals out numbers (contract/event_log.EventLog.subscribe).  Whoever has the number asks the host, and nobody else does: what leads to
another's host, by a redirect or because it was put into the wrong partition, is handed over (client.py, pack.py).

Taking a number over
  1. owned      the group says that it is ours
  2. table      what its hosts have asked for is read from the topic `hosts`, all that was there by then
  3. since      FROM HERE ON its hosts may be asked, as if each had been asked for all that it allows just before: no burst, a whole
                spacing (or Crawl-delay) before the first request (hosts.py)

Leaving one: a rebalance takes it back, or the role stops
  1. end        no request to its hosts begins any more
  2. leave      those on their way are ended, the robots.txt among them (Lane.leave, Client.leave)
  3. tell       what its hosts have asked for and `hosts` does not hold yet is appended
  4. let go     FROM HERE ON the group may give it to another (Subscription.hold_only, or close)

Retry-After, open breakers and Crawl-delays are appended as soon as they are known, compacted by host, and forgotten when they are over.

Ended by           what is lost                                              what holds all the same
  SIGTERM          nothing
  kill -9          what a server said in the last moments, before its        spacing: the dead owner's last request is behind it by a session
                   append was acknowledged                                   time-out; the next owner starts with nothing in hand
  SIGSTOP, a hang  nothing                                                   no request begins a session time-out after the last heartbeat that
                                                                             was confirmed (Subscription.sure); what was on its way then
                                                                             may overlap with the next owner's
  a lost `hosts`   what hosts have asked for                                 spacing; a host that is asked too early says so again
The one embedded fetcher owns every number from its start, and comes by the same way.
"""

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from ingest.fetch.hosts import Hosts
from streamlearn.contract.event_log import HOSTS, EventLog, NewRecord, Subscription, partition_of

MOST = 1000  # records of one append
logger = logging.getLogger(__name__)
Place = tuple[str, int]


class Tenure:
    """The numbers we have.  Of the event loop's thread, but for `read` and `append`."""

    def __init__(
        self,
        log: EventLog,
        subscription: Subscription,
        topics: Iterable[str],
        partitions: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.log, self.subscription, self.topics, self.partitions, self.clock = log, subscription, tuple(topics), partitions, clock
        self._since: dict[int, float] = {}  # number -> since when its hosts may be asked; infinite while it is being taken over

    @property
    def held(self) -> frozenset[Place]:
        """All that we have, or are taking over."""
        return frozenset((topic, number) for topic in self.topics for number in self._since)

    @property
    def taken(self) -> frozenset[int]:
        """Numbers that may be worked on."""
        return frozenset(number for number, since in self._since.items() if since < math.inf)

    def since(self, host: str) -> float:
        number, owned = self._number(host), self.subscription.owned()  # asked each time: it may have been taken back a moment ago
        return self._since.get(number, math.inf) if all((topic, number) in owned for topic in self.topics) else math.inf

    def sure(self) -> bool:
        return self.subscription.sure()

    def end(self) -> frozenset[int]:
        """Step 1 of leaving: the numbers that are not ours any more."""
        gone = self._since.keys() - self._owned()
        for number in gone:
            del self._since[number]
        return frozenset(gone)

    def let_go(self) -> None:
        self.subscription.hold_only(self.held)

    def begin(self) -> frozenset[int]:
        """Step 1 of taking over: the numbers that are ours now."""
        new = self._owned() - self._since.keys()
        self._since |= dict.fromkeys(new, math.inf)
        return new

    def read(self, new: frozenset[int]) -> dict[str, object]:
        """Step 2: host -> what it has asked for.  Raises Retryable."""
        found = {key.decode(): value for key, value in self.log.table(HOSTS).items() if key.isascii()}  # as names of hosts are
        return {name: _json(value) for name, value in found.items() if self._number(name) in new}

    def finish(self, new: frozenset[int], asked_for: dict[str, object], hosts: Hosts) -> None:
        """Step 3; a number that was taken back meanwhile is left out."""
        still = new & {number for number, since in self._since.items() if since == math.inf}
        for name, kept in asked_for.items():
            if not hosts.take_up(name, kept):
                hosts.tell(name)  # it is over: to be forgotten
        now = self.clock()
        self._since |= dict.fromkeys(still, now)
        logger.info("asking the hosts of partition numbers %s", sorted(self.taken))

    def give_up(self, new: frozenset[int]) -> None:
        """The table could not be read: to be tried again."""
        for number in new:
            if self._since.get(number) == math.inf:
                del self._since[number]

    def append(self, records: list[NewRecord]) -> None:
        for start in range(0, len(records), MOST):
            self.log.append(records[start : start + MOST])

    def _owned(self) -> frozenset[int]:
        """Numbers of which every topic is ours: a topic that was made a moment ago may be missing."""
        owned = self.subscription.owned()
        return frozenset(n for n in range(self.partitions) if all((topic, n) in owned for topic in self.topics))

    def _number(self, host: str) -> int:
        return _number(host, self.partitions)


@functools.lru_cache(2**16)  # asked three times for each request
def _number(host: str, partitions: int) -> int:
    return partition_of(host.encode(errors="replace"), partitions)


def records(hosts: Hosts, names: Iterable[str]) -> list[NewRecord]:
    """What there is to be told of some hosts; nothing left of one: that it be forgotten."""
    found = []
    for name in names:
        kept: dict[str, Any] = hosts.kept(name)
        found.append(NewRecord(HOSTS, name.encode(errors="replace"), json.dumps(kept).encode() if kept else b""))
    return found


def _json(value: bytes) -> object:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
