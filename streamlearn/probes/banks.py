"""Labelled banks: which images they are drawn from, their digest, and their pixels at evaluation size.

The digest is over the classes and the encoded bytes of the images that are used, in order: whatever changes in them changes it, and moving
the files, or packing them otherwise, does not.  A bank whose configuration names a digest must have it.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.probes.bank_sources import Item, Source, open_source
from streamlearn.stream.decode import Pixels, decode
from streamlearn.stream.views import eval_crop

TEST_SHARE = 5  # every fifth image by hash, where no test set is given
IGNORED = -1  # in the labels of a multi-label bank
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Images at evaluation size, and (N,) their classes, or (N,C) of a multi-label bank: 1 it has, 0 it has not, -1 is not judged."""

    images_NSSC: np.ndarray[Any, np.dtype[np.uint8]]
    labels: Tensor


@dataclass(frozen=True)
class Bank:
    """In memory."""

    name: str
    digest: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def multi(self) -> bool:
        return self.train.labels.ndim == 2


@dataclass(frozen=True)
class Part:
    """The chosen items of one source."""

    source: Source
    chosen: tuple[int, ...]  # rising: one pass over the source reads them

    @property
    def items(self) -> list[Item]:
        return [self.source.items[i] for i in self.chosen]

    def read(self) -> Iterator[tuple[Item, bytes]]:
        return zip(self.items, self.source.read(self.chosen), strict=True)


@dataclass(frozen=True)
class Chosen:
    """What a bank consists of."""

    classes: tuple[str, ...]
    multi: bool
    train: Part
    test: Part


def choose(config: BankConfig) -> Chosen:
    """Draw the bank.  Raises ConfigError that names bank, file and remedy."""
    source = open_source(config, config.train)
    every = list(range(len(source.items)))
    if config.test:
        other = open_source(config, config.test)
        if other.multi != source.multi:
            raise ConfigError(
                f"probe bank {config.name}: {config.test}: its labels are {'' if other.multi else 'not '}lists, unlike those of {config.train}"
            )
        train, test = every, list(range(len(other.items)))
    else:
        other = source
        held = {i for i, data in zip(every, source.read(every), strict=True) if _hash(data) % TEST_SHARE == 0}
        train, test = [i for i in every if i not in held], sorted(held)
    draw = _evenly if source.multi else _balanced
    parts = (Part(source, draw(source.items, train, config.max_train)), Part(other, draw(other.items, test, config.max_test)))
    classes = tuple(sorted({name for item in parts[0].items for name in item.classes}))
    _sound(config, classes, parts[1])
    return Chosen(classes, source.multi, *parts)


def digest_of(config: BankConfig, chosen: Chosen, look: Callable[[str, Item, bytes], None] = lambda *_: None) -> str:
    """The bank's digest; `look` is shown each image on the way, with the name of its split.  Raises ConfigError if it is not the configured one."""
    whole = hashlib.sha256()
    for name, part in (("train", chosen.train), ("test", chosen.test)):
        whole.update(f"{name} {len(part.chosen)}\n".encode())
        for item, data in part.read():
            look(name, item, data)
            marks = "\t".join((*sorted(item.classes), *(f"-{x}" for x in sorted(item.ignored))))
            whole.update(marks.encode() + b"\0" + hashlib.sha256(data).digest())
    digest = "sha256:" + whole.hexdigest()
    if config.digest and digest != config.digest:
        raise ConfigError(
            f"probe bank {config.name}: {config.train}: its images or labels have changed: digest {digest[:19]}…, not {config.digest[:19]}…; "
            f"restore them (`streamlearn banks verify {config.name}` names what has changed), or register the new ones under another name"
        )
    return digest


def load_bank(config: BankConfig, size: int, shape: Callable[[Pixels, int], Pixels] = eval_crop) -> Bank:
    """Decoded at `size` px, as `shape` makes them square.  Raises ConfigError that names file, column and remedy."""
    chosen = choose(config)
    pixels: dict[str, list[Pixels]] = {"train": [], "test": []}
    kept: dict[str, list[Item]] = {"train": [], "test": []}

    def look(split: str, item: Item, data: bytes) -> None:
        try:
            pixels[split].append(shape(decode(data), size))
            kept[split].append(item)
        except Corrupt as e:
            logger.warning("probe bank %s: %s is left out: %s", config.name, item.where, e)

    digest = digest_of(config, chosen, look)
    for name in ("train", "test"):
        if not kept[name]:
            raise ConfigError(f"probe bank {config.name}: {config.train}: no {name} image can be decoded; name a bank of images")
    train, test = (Split(np.stack(pixels[n]), labels_of(kept[n], chosen)) for n in ("train", "test"))
    return Bank(config.name, digest, chosen.classes, train, test)


def labels_of(items: Sequence[Item], chosen: Chosen) -> Tensor:
    """(N,) int64, or (N,C) int8 of a multi-label bank."""
    number = {name: i for i, name in enumerate(chosen.classes)}
    if not chosen.multi:
        return torch.tensor([number[item.classes[0]] for item in items])
    labels_NC = torch.zeros(len(items), len(number), dtype=torch.int8)
    for row, item in zip(labels_NC, items, strict=True):
        for name in item.ignored:
            if name in number:
                row[number[name]] = IGNORED
        row[[number[name] for name in item.classes]] = 1
    return labels_NC


def _sound(config: BankConfig, classes: tuple[str, ...], test: Part) -> None:
    strange = {name for item in test.items for name in item.classes} - set(classes)
    if len(classes) < 2 or strange or not test.chosen:
        why = (
            f"classes of the test images that are not in the bank: {sorted(strange)[:5]}"
            if strange
            else f"{len(classes)} classes, {len(test.chosen)} test images"
        )
        raise ConfigError(f"probe bank {config.name}: {config.train}: {why}; a bank needs two classes or more, and test images of them")


def _balanced(items: Sequence[Item], among: Sequence[int], limit: int) -> tuple[int, ...]:
    """The first images of each class, as many of each as of any other, up to `limit`."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i in among:
        groups[items[i].classes[0]].append(i)
    share = max(1, limit // max(1, len(groups)))
    return tuple(sorted(i for group in groups.values() for i in group[:share]))


def _evenly(items: Sequence[Item], among: Sequence[int], limit: int) -> tuple[int, ...]:
    """At even distances: with several classes an image, no draw can balance them all."""
    if len(among) <= limit:
        return tuple(among)
    return tuple(among[i * len(among) // limit] for i in range(limit))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big")
