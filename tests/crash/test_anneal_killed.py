"""`streamlearn train anneal` from a shell: a branch off an embedded home is published, killed or not, and the trunk never learns of it."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from bench.shards import publish
from streamlearn.contract.config import Config, CropConfig, ModelConfig, ObjectiveConfig, OptimConfig, StreamConfig, TrainConfig
from streamlearn.contract.durable import read_lines
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.registry import OciLayout
from streamlearn.learn.checkpoint import Checkpoints
from tests.conftest import REPO
from tests.learn.world import same

pytestmark = pytest.mark.timeout(900)  # a dozen processes that import torch
FIRST, BRANCH, ON = 60, 6, 66  # the trunk's step, steps of the branch (share 0.1), where the trunk goes on to


def config(max_steps):
    return Config(
        stream=StreamConfig(crops=(CropConfig(count=2, size=16, scale=(0.3, 1.0)),), blur=0.0, workers=0, round_samples=96, reservoir=64),
        model=ModelConfig(backbone="regnety-tiny", head=(16, 8)),
        objective=ObjectiveConfig(prototypes=6, freeze_prototypes=2),
        train=TrainConfig(
            batch=8, checkpoint_steps=1, keep_checkpoints=2, snapshot_steps=1000, bn_images=16, max_steps=max_steps, threads=1, name="wild",
            optim=OptimConfig(kind="sgd", lr=0.05, warmup_steps=3),
        ),
    )  # fmt: skip


def streamlearn(*args):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", "streamlearn", *map(str, args)], env=environment, stdout=pipe, stderr=pipe, text=True)


def done(process):
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out


def learn(home, end):
    """The trunk's own role, to that step; all it remembers then."""
    (home / "config.json").write_text(config(end).model_dump_json())
    done(streamlearn("role", "train", "--home", home))
    return Checkpoints(FolderStore(home / "store"), keep=3).load()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    home, rng, images = tmp_path_factory.mktemp("trunk"), np.random.default_rng(0), []
    for _ in range(480):
        out = io.BytesIO()
        Image.fromarray(np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((6, 6, 1), np.uint8))).save(out, "PNG")
        images.append(out.getvalue())
    publish(home, images, "png", a_shard=96)
    assert learn(home, FIRST)["step"] == FIRST
    return home


def digests(folder):
    """Of the trunk's store: checkpoints, shards, catalog, records."""
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in (folder / "store").rglob("*") if p.is_file()}


def weights(folder):
    """Digest of the published weights, by tag."""
    registry, found = OciLayout(folder / "registry"), {}
    for tag in registry.tags():
        layers = registry.manifest(tag)[1]["layers"]
        for layer in layers:
            registry.check_blob(layer["digest"])
        found[tag] = next(x["digest"] for x in layers if "model.safetensors" in x["annotations"].values())
    return found


def newest(folder):
    """Step of the newest checkpoint; -1: none."""
    pointer = folder / "store" / "checkpoints" / "latest.json"
    return json.loads(pointer.read_bytes())["checkpoints"][0]["step"] if pointer.exists() else -1


@pytest.mark.slow
def test_a_tenth_is_annealed_and_published_and_the_trunk_goes_on_bit_for_bit(trunk, tmp_path):
    alone, home, release = tmp_path / "alone", tmp_path / "home", tmp_path / "release"
    for copy in (alone, home):
        shutil.copytree(trunk, copy)
    before = digests(home)
    out = done(streamlearn("train", "anneal", release, "--home", home, "--share", 0.1))
    assert digests(home) == before and newest(release) == FIRST + BRANCH
    tag, found = f"0.{FIRST + BRANCH}.0", weights(release)
    assert tag in out and set(found) == {tag, "candidate"} and len(set(found.values())) == 1
    lines = list(read_lines(release / "history" / "train.jsonl"))
    branch = Checkpoints(FolderStore(release / "store"), keep=3).load()
    assert branch["policy"]["anneal"] == [FIRST, BRANCH] and [e["tag"] for e in lines if e.get("event") == "snapshot"] == [tag]
    assert branch["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.05 / BRANCH)  # of the last update; the next would be nothing
    assert same(learn(alone, ON), learn(home, ON)) == set()


def killed(release, home, steps, reached):
    """Run the command until `reached`, and end it with SIGKILL."""
    process = streamlearn("train", "anneal", release, "--home", home, "--steps", steps)
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_again_and_again_nothing_half_is_published_and_the_same_command_ends_with_the_same_weights(trunk, tmp_path):
    steps, whole, release = 40, tmp_path / "whole", tmp_path / "release"
    before = digests(trunk)
    done(streamlearn("train", "anneal", whole, "--home", trunk, "--steps", steps))
    for reached in (
        lambda: newest(release) == FIRST,  # the branch is committed
        lambda: newest(release) > FIRST + 5,
        lambda: newest(release) > FIRST + 15,
        lambda: any((release / "registry" / "blobs").glob("*/*")),  # it is being published
    ):
        killed(release, trunk, steps, reached)
        assert weights(release).items() <= weights(whole).items()  # each tag that is there is of the whole thing
    assert newest(release) == FIRST + steps
    done(streamlearn("train", "anneal", release, "--home", trunk, "--steps", steps))
    assert weights(release) == weights(whole) and f"0.{FIRST + steps}.0" in weights(whole) and digests(trunk) == before
