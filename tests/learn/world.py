"""A learner small enough for tests, on batches that are a pure function of their place."""

import threading
from dataclasses import dataclass

import torch

from streamlearn.contract.config import Config, CropConfig, ModelConfig, ObjectiveConfig, OptimConfig, StreamConfig, TrainConfig


def small_config(**train):
    return Config(
        stream=StreamConfig(crops=(CropConfig(count=2, size=16, scale=(0.3, 1.0)),), blur=0.0),
        model=ModelConfig(backbone="regnety-tiny", head=(16, 8)),
        objective=ObjectiveConfig(prototypes=6, queue=16, freeze_prototypes=2, epsilon=0.05),
        train=TrainConfig(batch=8, optim=OptimConfig(kind="lars", lr=0.5, warmup_steps=3), ema_decay=0.9, **train),
    )


@dataclass
class FakeBatch:
    """A batch as the stream would hand it over."""

    crops: tuple
    fresh: torch.Tensor
    state: dict
    wait_s: float = 0.0

    @property
    def named(self):
        return torch.ones_like(self.fresh)

    def part(self, rank, ranks):
        """One rank's."""
        own = slice(rank * len(self.fresh) // ranks, (rank + 1) * len(self.fresh) // ranks)
        return FakeBatch(tuple(crop[:, own] for crop in self.crops), self.fresh[own], self.state)

    def taken(self, features_BD):
        return self.state


def batch(place, spoil=False):
    g = torch.Generator().manual_seed(place)
    x = torch.randn(2, 8, 3, 16, 16, generator=g)
    if spoil:
        x[0, 0, 0, 0, 0] = float("nan")
    fresh = torch.rand(8, generator=g) < 0.5
    return FakeBatch((x,), fresh, {"place": place + 1, "cursor": {"candidates/0": place + 1}, "round": 0, "window": ["", ""]})


def batches(start, end, spoilt=()):
    return (batch(i, i in spoilt) for i in range(start, end))


class PlainStream:
    """A stream of synthetic batches with the interface that the role asks for."""

    def __init__(self, state, end, stop=None):
        self.place, self.end, self.stop = (state or {"place": 0})["place"], end, stop or threading.Event()

    def batches(self):
        yield None  # nothing to learn yet
        for i in range(self.place, self.end):
            if self.stop.is_set():
                return
            yield batch(i)

    def sample(self, state, count):
        return [f"s#{i}" for i in range(min(count, 8))]

    def eval_images(self, refs, size):
        return torch.randn(len(refs), 3, size, size, generator=torch.Generator().manual_seed(5))

    def counters(self):
        return {"corrupt": 0}

    def waiting(self):
        return {"waiting": "", "waiting_on": "", "waiting_s": 0.0}

    def close(self):
        return None


def flat(value, at=""):
    """Every leaf of a nested state with its path."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{at}.{key}")
    else:
        yield at, value


def same(a, b):
    """The paths at which two states differ."""
    left, right = dict(flat(a)), dict(flat(b))
    different = set(left) ^ set(right)
    for path in set(left) & set(right):
        x, y = left[path], right[path]
        if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y):
            different.add(path)
    return different
