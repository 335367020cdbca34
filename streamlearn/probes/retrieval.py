"""Pictures of learning: the images of a bank that a snapshot finds nearest to a few of its test images, for the report.

The same queries for all snapshots, chosen by nothing but their place in the bank: the first test image of each of a few classes.  A column is
added while a snapshot is measured, from the features at hand, to one small file a bank, `retrieval/<bank>.json` (docs/probes.md has its
schema), which is replaced whole.  It is a picture: a file that is torn, or of a bank that has changed, is begun anew, a full disk leaves it
as it is, and of two evaluators of one home that write at once one's column is lost.

At most `COLUMNS` snapshots are kept: always the first and the newest, and between them as even as can be on the logarithm of the step,
because most is learnt early.
"""

import base64
import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from streamlearn.contract import durable
from streamlearn.contract.errors import StoreFull
from streamlearn.probes.banks import Bank, Split
from streamlearn.probes.feature_cache import Tensors
from streamlearn.probes.features import raw_pixels
from streamlearn.stream.decode import Pixels

SCHEMA = "streamlearn.retrieval/1"
QUERIES, NEAR, COLUMNS = 6, 5, 4
ASKED = 500  # test images, at most, whose neighbours are counted
RAW_SIDE = 32  # px of the raw pixels that the snapshots are compared with
THUMB = 64  # px
NAME = 60  # characters of a class's name
logger = logging.getLogger(__name__)


def add_column(home: Path, bank: Bank, found: Tensors, *, step: int, digest: str) -> None:
    """The neighbours by one snapshot's features: `train` (N,D) and `test` (M,D)."""
    path = path_of(home, bank.name)
    held = _held(path, bank)
    others = [c for c in held["columns"] if c["step"] != step]
    made = {"step": step, "digest": digest} | _column(bank, found["train"], found["test"], held["queries"])
    held["columns"] = kept(sorted([*others, made], key=lambda c: int(c["step"])))
    shown = {i for column in (held["pixels"], *held["columns"]) for row in column["near"] for i, _ in row}
    held["images"] = {str(i): held["images"].get(str(i)) or _picture(bank, bank.train, i) for i in sorted(shown)}
    try:
        durable.write(path, json.dumps(held).encode())
    except StoreFull as e:
        logger.warning("no picture of what step %d finds: %s", step, e)


def path_of(home: Path, bank: str) -> Path:
    return home / "retrieval" / f"{bank}.json"


def kept(columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `COLUMNS` of them, sorted by step: the first and the last, and those between that leave the most even steps."""
    chosen = list(columns)
    while len(chosen) > COLUMNS:
        place = [math.log1p(c["step"]) for c in chosen]
        del chosen[min(range(1, len(chosen) - 1), key=lambda i: place[i + 1] - place[i - 1])]
    return chosen


def queries(bank: Bank) -> list[int]:
    """Indices of test images: the first of each of some classes, spread evenly over the classes; of a multi-label bank over the images."""
    labels = bank.test.labels
    if bank.multi:
        return _spread(len(labels), QUERIES)
    present = labels.unique().tolist()
    return [int((labels == present[i]).nonzero()[0, 0]) for i in _spread(len(present), QUERIES)]


def nearest(bank_ND: Tensor, test_QD: Tensor) -> Tensor:
    """(Q,NEAR) indices by cosine, the nearest first."""
    return (F.normalize(test_QD.float(), dim=1) @ F.normalize(bank_ND.float(), dim=1).T).topk(min(NEAR, len(bank_ND)), dim=1).indices


def _column(bank: Bank, bank_ND: Tensor, test_MD: Tensor, asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`near`: for each query [index, whether it is right]; `right`: share of the neighbours of `asked` test images that are."""
    at_Q = torch.tensor([q["index"] for q in asked])
    near_QK = nearest(bank_ND, test_MD[at_Q])
    right_QK = _right(bank, at_Q, near_QK)
    some = torch.tensor(_spread(len(test_MD), ASKED))
    share = float(_right(bank, some, nearest(bank_ND, test_MD[some])).double().mean())
    near = [
        [[i, int(ok)] for i, ok in zip(row, marks, strict=True)] for row, marks in zip(near_QK.tolist(), right_QK.tolist(), strict=True)
    ]
    return {"near": near, "right": round(share, 6), "asked": len(some)}


def _right(bank: Bank, at_Q: Tensor, near_QK: Tensor) -> Tensor:
    """(Q,K): of the same class; of a multi-label bank, having one in common."""
    mine, theirs = bank.test.labels[at_Q], bank.train.labels[near_QK]
    if bank.multi:
        return ((mine == 1)[:, None] & (theirs == 1)).any(2)
    return theirs == mine[:, None]


def _held(path: Path, bank: Bank) -> dict[str, Any]:
    """The file as it is, or its beginning."""
    found = read(path)
    if found is not None and found["bank_digest"] == bank.digest:
        return found
    asked = [{"index": i} | _picture(bank, bank.test, i) for i in queries(bank)]
    side = min(RAW_SIDE, bank.test.images_NSSC.shape[1])
    pixels = _column(bank, raw_pixels(bank.train, side), raw_pixels(bank.test, side), asked)
    return {
        "schema": SCHEMA, "bank": bank.name, "bank_digest": bank.digest, "queries": asked, "pixels": pixels, "columns": [], "images": {},
    }  # fmt: skip


def read(path: Path) -> dict[str, Any] | None:
    """None where there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None


def _picture(bank: Bank, split: Split, index: int) -> dict[str, str]:
    """`jpeg` (base64) and `name`: its class, or classes."""
    label = split.labels[index]
    held = (label == 1).nonzero()[:, 0].tolist() if bank.multi else [int(label)]
    return {"jpeg": _jpeg(split.images_NSSC[index]), "name": ", ".join(bank.classes[c] for c in held)[:NAME]}


def _jpeg(image_SSC: Pixels) -> str:
    image = Image.fromarray(np.ascontiguousarray(image_SSC))
    image.thumbnail((THUMB, THUMB))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of 0 ... count - 1, evenly."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]
