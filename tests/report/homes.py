"""Homes to report on: one that is told, one whose figures and pictures are real; and a browser that looks at the page."""

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from streamlearn.contract.config import BankConfig
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.shards import STORED, Outcome, ShardWriter, sidecar_key, write_sidecar
from streamlearn.learn.backbones import build
from streamlearn.probes.banks import load_bank
from streamlearn.snapshots.publish import publish
from streamlearn.stream.views import normalised
from tests.conftest import missing
from tests.ingest.server import picture
from tests.probes.world import config, evaluator, measure_all
from tests.snapshots.test_publish import export

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
AT = "2026-11-21T05:00:00.000Z"
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ),
    *("--disable-component-update", "--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr"),
)
PHONE_PX, DESKTOP_PX = 390, 1200


def tell(home, role, *lines):
    path = home / "history" / f"{role}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps({"at": AT} | x) + "\n" for x in lines)


def told(home):
    """600 steps, three snapshots, a halving, a crash in the fetcher, a gallery."""
    steps = range(10, 610, 10)
    common = {"grad_norm": 1.0, "code_entropy": 0.4, "perplexity": 0.8}
    taken = ({"step": s, "loss": 5 - s / 300, "lr": 0.3 if s < 400 else 0.15, "images": 128 * s, "fresh": 40 * s} | common for s in steps)
    tell(home, "train", *taken)
    last = {"step": 600, "loss": None, "lr": 0.15, "images": 76_800, "fresh": 24_000}
    tell(home, "train", {"event": "halved", "step": 400, "lr": 0.15}, last | common)
    probe = {"bank": "world <b>", "raw_knn": 0.2, "raw_ridge": 0.22, "random_knn": 0.15, "random_ridge": 0.2, "alarms": []}
    probe |= {"effective_rank": 12.0, "rankme": 80.0, "generation": "2026Q4"}
    snapshots = ({"tag": f"0.{s}.0", "digest": digest(s), "step": s, "knn": s / 1500, "ridge": s / 1200} | probe for s in (200, 400, 600))
    tell(home, "evaluate", *snapshots)
    tell(home, "fetch", {"stored": 500, "outcomes": {"stored": 500, "rejected:gone": 3}}, {"stored": 100, "outcomes": {"stored": 100}})
    _gallery(home)
    return home


def digest(step):
    return f"sha256:{step:064x}"


def _gallery(home):
    key = "shards/a.tar"
    (home / "store" / "shards").mkdir(parents=True)
    writer = ShardWriter(home / "store" / key)
    starts = [writer.add(i, picture(i), "jpg", {}) for i in range(4)]
    writer.close()
    outcomes = [Outcome(offset=i, outcome=STORED, ext="jpg", member_offset=at, member_size=len(picture(i))) for i, at in enumerate(starts)]
    write_sidecar(home / "store" / sidecar_key(key), outcomes)
    gallery = {"step": 600, "prototypes": [{"id": 5, "use": 9, "refs": [f"{key}#{i}" for i in range(4)] + ["shards/gone.tar#0"]}]}
    (home / "history" / "gallery.json").write_text(json.dumps(gallery))


def drifted(home, name="web <i>"):
    """Two windows of a source, the second drifted."""
    window = {"at": AT, "images": 4096}
    windows = [
        window | {"found": "same", "distance": 1.0, "threshold": 1.5},
        window | {"found": "drift", "distance": 3.0, "threshold": 1.5},
    ]
    state = {
        "schema": "streamlearn.drift/1",
        "version": 3,
        "sources": {name: {"windows": windows, "waiting": [["a", 0, 1]], "passed_over": 0}},
    }
    (home / "drift").mkdir(exist_ok=True)
    (home / "drift" / "state.json").write_text(json.dumps(state))


def real(home, data_dir, *, train=20, test=10, steps=(1, 16)):
    """CIFAR in two quarters (classes split), a network that learns a little of each, measured by the evaluator."""
    banks = tuple(_bank(home, data_dir, *quarter, train=train, test=test) for quarter in (("2026Q3", range(5)), ("2026Q4", range(5, 10))))
    settings, registry = config(home, banks), OciLayout(home / "registry")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = build("regnety-tiny", "cifar")
        head = torch.nn.Linear(int(trunk.width), 5)
        optimizer = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.03, momentum=0.9)
        taken = 0
        for bank, end in zip(banks, ("2026-08-02", "2026-11-02"), strict=True):
            held = load_bank(bank, 32)
            images, before = normalised(held.train.images_NSSC, (0.5,) * 3, (0.2,) * 3), taken
            for step in steps:
                while taken < before + step:
                    some = torch.randint(0, len(images), (32,))
                    loss = torch.nn.functional.cross_entropy(head(trunk.train()(images[some])), held.train.labels[some])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    taken += 1
                made = export(taken, window=("2026-08-01T00:00:00.000Z", f"{end}T00:00:00.000Z"))
                publish(registry, dataclasses.replace(made, weights={k: v.clone() for k, v in trunk.state_dict().items()}))
    measure_all(evaluator(home, registry, settings))
    return settings, registry


def _bank(home, data_dir, generation, classes, *, train, test):
    for split, count in (("train", train), ("test", test)):
        table = pq.read_table(data_dir / f"cifar10-{split}.parquet", columns=["jpeg", "label"])
        labels = np.array(table.column("label").to_pylist())
        chosen = np.concatenate([np.flatnonzero(labels == c)[:count] for c in classes])
        held = pa.table({"jpeg": table.column("jpeg").take(chosen), "label": [NAMES[c] for c in labels[chosen]]})
        pq.write_table(held, home / f"{generation}-{split}.parquet")
    files = {split: str(home / f"{generation}-{split}.parquet") for split in ("train", "test")}
    return BankConfig(name=f"cifar-{generation.lower()}", generation=generation, **files)


def looked_at(page, folder, width):
    """Width in px that the page needs in a window of `width`, what the browser complains of, and the picture."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("chromium is not installed")
    frame = folder / f"frame-{width}.html"
    frame.write_text(
        f"<!doctype html><body style='margin:0'><iframe id=f style='border:0;width:{width}px;height:6000px' src='file://{page}'></iframe><pre id=o></pre>"
        "<script>f.onload=()=>{o.textContent='needs '+f.contentDocument.documentElement.scrollWidth}</script>"
    )
    shot, flags = folder / f"{width}.png", [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},6000"]
    words = []
    for more in (["--virtual-time-budget=5000", "--dump-dom"], [f"--screenshot={shot}"]):
        done = subprocess.run([*flags, *more, f"file://{frame}"], capture_output=True, text=True, check=True, timeout=300)
        words.append(done.stdout + done.stderr)
    return int(re.search(r"needs (\d+)", words[0])[1]), [line for w in words for line in w.splitlines() if "CONSOLE" in line], shot
