"""What the learner asks of its surroundings; the composition root hands it over."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from streamlearn.contract.export import Export
from streamlearn.learn.trainer import Batch


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
