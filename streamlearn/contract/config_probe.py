"""The configuration of the evaluator: banks and protocols."""

from typing import Literal, Self

from pydantic import Field, model_validator

from streamlearn.contract.section import Fraction, Section


class BankConfig(Section):
    """A labelled bank: an image folder (one sub-folder a class), a parquet file with bytes and label, or webdataset shards."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")  # in every result and plot
    train: str  # the bank: a folder of images, a .parquet file, a .tar of webdataset, or a folder of such .tar files
    test: str = ""  # empty: every fifth image of `train`, by hash of its bytes
    image_column: str = "jpeg"  # of a parquet: the encoded bytes
    label_column: str = "label"  # of a parquet or of a shard's .json (without .json: its .cls); lists make the bank multi-label
    ignore_column: str = ""  # of a multi-label bank: the classes that are not judged in an image (VOC's difficult objects)
    generation: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,62})?$")  # its column in the transfer matrix: 2026Q4
    digest: str = Field(default="", pattern=r"^(sha256:[0-9a-f]{64})?$")  # what it must be; a bank that has changed is not measured
    max_train: int = Field(default=10_000, ge=10)  # images used, balanced over the classes
    max_test: int = Field(default=10_000, ge=10)  # likewise


class ProbeConfig(Section):
    """How snapshots are measured."""

    banks: tuple[BankConfig, ...] = ()
    k: int = Field(default=20, ge=1)  # neighbours of the weighted k-NN
    temperature: float = Field(default=0.07, gt=0)  # of its votes
    batch: int = Field(default=256, ge=1)  # images in one forward pass
    threads: int = Field(default=1, ge=0)  # torch CPU threads, kept from the learner
    poll_s: float = Field(default=2.0, gt=0)  # between looks at the registry
    device: str = "cpu"  # of the forward passes, as torch names it
    device_share: float = Field(default=0.25, gt=0, le=1)  # of a GPU's time, at most, while a learner of this home learns on it too
    cache_bytes: int = Field(default=2**30, ge=0)  # features kept on disk; 0: none
    thorough: Literal["never", "newest", "all"] = "never"  # which snapshots get the logistic sweep and low-shot too, once all else is done
    low_shot_seeds: int = Field(default=5, ge=2)  # draws of the 1 % and of the 10 %
    view_images: int = Field(default=100, ge=0)  # whose views alignment and LiDAR are measured on; 0: neither is
    views: int = Field(default=10, ge=2)  # of each
    drift_window: int = Field(default=4096, ge=0)  # stored images of one source that are compared with its first as many; 0: no drift
    drift_period_s: float = Field(default=300.0, ge=0)  # between two windows of a source; what comes in between is passed over
    drift_false_alarm: Fraction = 0.01  # share of windows without drift that may be called drift

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if 0 < self.drift_window < 256:
            raise ValueError(
                f"drift_window = {self.drift_window}: 64 components need 256 images or more, 4096 to be sure of; 0 switches it off"
            )
        return self
