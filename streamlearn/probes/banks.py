"""Labelled banks: an image folder with one sub-folder a class, or a parquet with bytes and label."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from streamlearn.contract.config import BankConfig
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.stream.decode import Pixels, decode
from streamlearn.stream.views import eval_crop

TEST_SHARE = 5  # every fifth image by hash, where no test set is given
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
logger = logging.getLogger(__name__)
Labelled = tuple[str, bytes]  # class, encoded image


@dataclass(frozen=True)
class Split:
    images_NSSC: np.ndarray[Any, np.dtype[np.uint8]]
    labels_N: Tensor


@dataclass(frozen=True)
class Bank:
    """Images at evaluation size, in memory."""

    name: str
    digest: str  # over the encoded images and labels that are used
    classes: tuple[str, ...]
    train: Split
    test: Split


def load_bank(config: BankConfig, size: int) -> Bank:
    """Raises ConfigError that names file, column and remedy."""
    train = list(_read(config, config.train))
    if config.test:
        test = list(_read(config, config.test))
    else:
        test = [x for x in train if _hash(x[1]) % TEST_SHARE == 0]
        train = [x for x in train if _hash(x[1]) % TEST_SHARE != 0]
    train, test = _balanced(train, config.max_train), _balanced(test, config.max_test)
    classes = tuple(sorted({label for label, _ in train}))
    strange = {label for label, _ in test} - set(classes)
    if len(classes) < 2 or strange or not test:
        why = (
            f"classes of the test images that are not in the bank: {sorted(strange)[:5]}"
            if strange
            else f"{len(classes)} classes, {len(test)} test images"
        )
        raise ConfigError(f"probe bank {config.name}: {config.train}: {why}; a bank needs two classes or more, and test images of them")
    digest = hashlib.sha256()
    for label, data in [*train, *test]:
        digest.update(label.encode() + b"\0" + hashlib.sha256(data).digest())
    digest.update(str((size, len(train))).encode())
    return Bank(
        config.name, "sha256:" + digest.hexdigest(), classes, _split(train, classes, size, config), _split(test, classes, size, config)
    )


def _read(config: BankConfig, name: str) -> Iterator[Labelled]:
    path = Path(name)
    if path.is_dir():
        yield from _folder(path)
    elif path.suffix == ".parquet":
        yield from _parquet(config, path)
    else:
        raise ConfigError(f"probe bank {config.name}: {name}: neither a folder with one sub-folder a class, nor a .parquet file")


def _folder(path: Path) -> Iterator[Labelled]:
    for image in sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS):
        yield image.relative_to(path).parts[0], image.read_bytes()


def _parquet(config: BankConfig, path: Path) -> Iterator[Labelled]:
    try:
        have = pq.read_schema(path).names
        for column in (config.image_column, config.label_column):
            if column not in have:
                raise ConfigError(f"probe bank {config.name}: {path}: no column {column!r}; there are {', '.join(have)}")
        table = pq.read_table(path, columns=[config.image_column, config.label_column])
    except (pa.ArrowException, OSError) as e:
        raise ConfigError(f"probe bank {config.name}: {path}: not a readable parquet: {e}") from e
    for label, data in zip(table.column(config.label_column).to_pylist(), table.column(config.image_column).to_pylist(), strict=True):
        yield str(label), data


def _balanced(items: Sequence[Labelled], limit: int) -> list[Labelled]:
    """The first images of each class, as many of each as of any other, up to `limit`."""
    groups: dict[str, list[Labelled]] = defaultdict(list)
    for item in items:
        groups[item[0]].append(item)
    share = max(1, limit // max(1, len(groups)))
    return [item for label in sorted(groups) for item in groups[label][:share]]


def _split(items: Sequence[Labelled], classes: tuple[str, ...], size: int, config: BankConfig) -> Split:
    number = {label: i for i, label in enumerate(classes)}
    images: list[Pixels] = []
    labels: list[int] = []
    for label, data in items:
        try:
            images.append(eval_crop(decode(data), size))
            labels.append(number[label])
        except Corrupt as e:
            logger.warning("probe bank %s: an image of class %s is left out: %s", config.name, label, e)
    return Split(np.stack(images), torch.tensor(labels))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big")
