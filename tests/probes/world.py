"""Small banks in every format, and snapshots to measure."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from prometheus_client import CollectorRegistry

from streamlearn.contract.config import BankConfig, Config, ProbeConfig
from streamlearn.contract.metrics import EvaluatorMetrics
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.status import Heartbeat
from streamlearn.probes.evaluator import Evaluator
from tests.ingest.server import picture


class Killed(BaseException): ...


def shade(kind, seed, side=20):
    """A noisy image whose colour is its class's."""
    g = np.random.default_rng((kind, seed))
    base = np.random.default_rng(kind).integers(40, 215, 3)
    pixels = np.clip(base + g.normal(0, 40, (side, side, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def bank_file(folder, count=60, classes=3, name="bank.parquet", image=lambda i, c: picture(i, size=(20, 20)), first=0):
    path = folder / name
    labels = [first + i % classes for i in range(count)]
    pq.write_table(pa.table({"jpeg": [image(i, c) for i, c in enumerate(labels)], "label": labels}), path)
    return str(path)


def class_folders(root, count=40, classes=2):
    for i in range(count):
        path = root / f"class{i % classes}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return root


def shard(path, samples):
    """samples: [(key, {ext: bytes})]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for ext, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def labelled(i, **label):
    return f"{i:05d}", {"jpg": picture(i), "json": json.dumps(label).encode()}


def config(home, banks=None, **probe):
    banks = banks or (BankConfig(name="b", train=str(home / "bank.parquet")),)
    return Config(
        home=str(home), probe=ProbeConfig(**{"banks": banks, "poll_s": 0.05, "view_images": 8, "views": 3, "drift_period_s": 0.0} | probe)
    )


def evaluator(home, registry=None, settings=None):
    registry = registry or OciLayout(home / "registry")
    heart = Heartbeat(home, "evaluate", period_s=0)
    return Evaluator(settings or config(home), registry, EvaluatorMetrics(CollectorRegistry()), heart, home=home)


def measure_all(role):
    count = 0
    while role.measure_next():
        count += 1
    return count


def weights(seed):
    from streamlearn.learn.backbones import build

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build("regnety-tiny", "cifar").state_dict()
