"""Sections of the configuration: the stream."""

from typing import Literal, Self

from pydantic import Field, model_validator

from streamlearn.contract.section import Fraction, Section


class CropConfig(Section):
    """One resolution of the multi-crop (SwAV, arXiv:2006.09882, section 3.2)."""

    count: int = Field(ge=1)  # views of each image
    size: int = Field(ge=8)  # px
    scale: tuple[float, float]  # share of the image's area

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale = {self.scale}: must be 0 < low <= high <= 1")
        return self


class StreamConfig(Section):
    """From catalog to batches."""

    seed: int = 0  # of the order and the augmentations
    crops: tuple[CropConfig, ...] = (
        CropConfig(count=2, size=224, scale=(0.14, 1.0)),
        CropConfig(count=4, size=96, scale=(0.05, 0.14)),
    )
    jitter: float = Field(default=1.0, ge=0)  # colour distortion strength s: .8s .8s .8s .2s, p = 0.8, gray p = 0.2
    augment: Literal["auto", "workers", "device"] = "auto"  # who crops, flips, colours and blurs; auto: the device if that is not the CPU
    decoded_bytes: int = Field(default=2**21, ge=0)  # of an image, on average, that a device crops; beyond it the workers do
    blur: Fraction = 0.5  # probability of Gaussian blur, sigma 0.1-2.0 px
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the pixels, RGB in 0-1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # likewise
    fresh_fraction: float = Field(default=0.5, gt=0, le=1)  # of a round; the rest is replay
    max_replay_per_fresh: float = Field(default=1.0, ge=0)  # replays ever drawn per fresh image ever learnt (idle rounds)
    max_replays: int = Field(default=0, ge=0)  # of one sample while it is kept; 0: any number
    replay: Literal["reservoir", "minred", "fifo"] = "reservoir"  # which samples are kept: a uniform draw, the least redundant, the newest
    reservoir: int = Field(default=65536, ge=1)  # samples that replay draws from
    round_samples: int = Field(default=4096, ge=1)  # fresh samples in a round, at most (whole shards; at least one shard)
    workers: int = Field(default=2, ge=0)  # decode processes; 0: in the trainer's own process
    prefetch: int = Field(default=4, ge=1)  # batches ahead
    cache_bytes: int = Field(default=4 * 2**30, ge=2**20)  # local copies of shards; of all learners that share the folder together
    prefetch_bytes: int = Field(default=2**30, ge=2**20)  # of shards fetched ahead of the batches that need them, within cache_bytes
    downloads: int = Field(default=4, ge=1, le=32)  # of shards at once
    poll_s: float = Field(default=1.0, gt=0)  # between looks at the catalog when there is nothing to learn

    @model_validator(mode="after")
    def _judged(self) -> Self:
        if self.replay == "minred" and self.reservoir < 2 * self.round_samples:
            raise ValueError(
                f"replay = 'minred' with reservoir = {self.reservoir}, round_samples = {self.round_samples}: what a round brings in can only be "
                "weighed against twice as many that were seen; raise reservoir, or lower round_samples"
            )
        return self
