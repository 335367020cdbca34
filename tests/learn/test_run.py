"""The role: resumes, checkpoints, publishes, stops; the same snapshots whether or not it was killed."""

import hashlib
import threading
from datetime import datetime

import pytest
import torch
from prometheus_client import CollectorRegistry

from streamlearn.contract.durable import read_lines
from streamlearn.contract.errors import ConfigError, Retryable, StoreFull
from streamlearn.contract.metrics import LearnerMetrics
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat, now, read_status
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.learn.recorder import RECORD_EVERY, Recorder
from streamlearn.learn.run import run_train
from streamlearn.learn.state import fresh_state
from streamlearn.learn.trainer import Step
from tests.learn.world import PlainStream, same, small_config


class Killed(BaseException): ...


class Shelf:
    """Takes what is published; dies at a step if told to."""

    def __init__(self, die_at=None):
        self.exports, self.die_at = {}, die_at

    def __call__(self, export):
        if export.step == self.die_at:
            raise Killed
        digest = hashlib.sha256(b"".join(w.numpy().tobytes() for _, w in sorted(export.weights.items()))).hexdigest()
        self.exports[export.step] = (digest, export)
        return f"0.{export.step}.0", digest


def learn(home, end, shelf, config=None, stop=None, registry=None, warm=None, store=None):
    config = config or small_config(checkpoint_steps=2, snapshot_steps=4, bn_images=8, max_steps=end)
    metrics, heart = LearnerMetrics(registry or CollectorRegistry()), Heartbeat(home, "train", period_s=0)
    stop = stop or threading.Event()
    gallery = home / "history" / "gallery.json"
    return run_train(
        config,
        lambda s: PlainStream(s, 100, stop),
        store or FolderStore(home / "store"),
        shelf,
        metrics,
        heart,
        stop=stop,
        gallery=gallery,
        warm=warm,
    )


def test_it_goes_on_from_where_it_was(tmp_path):
    whole, parts = Shelf(), Shelf()
    a = learn(tmp_path / "a", 10, whole)
    learn(tmp_path / "b", 3, parts)
    learn(tmp_path / "b", 7, parts)
    b = learn(tmp_path / "b", 10, parts)
    assert same(a.state_dict(), b.state_dict()) == set()
    assert {s: d for s, (d, _) in whole.exports.items()} == {s: d for s, (d, _) in parts.exports.items()}
    assert sorted(whole.exports) == [4, 8]


def test_killed_between_checkpoint_and_snapshot_it_publishes_the_same_snapshot_later(tmp_path):
    whole, late = Shelf(), Shelf(die_at=4)
    learn(tmp_path / "a", 6, whole)
    with pytest.raises(Killed):
        learn(tmp_path / "b", 6, late)
    assert Checkpoints(FolderStore(tmp_path / "b" / "store"), keep=3).load()["step"] == 4
    late.die_at = None
    learn(tmp_path / "b", 6, late)
    assert late.exports[4][0] == whole.exports[4][0]


def test_what_is_published_says_where_it_comes_from(tmp_path):
    shelf = Shelf()
    learn(tmp_path, 4, shelf)
    export = shelf.exports[4][1]
    assert export.cursor == {"candidates/0": 4} and export.metrics["images"] == 32
    assert not any(name.startswith("head") for name in export.weights) and export.width == 368


class FullAfter(FolderStore):
    """A store that has room for one checkpoint, and no more."""

    full_at = ""

    def put(self, key, data):
        if key.endswith(".pt") and any(known.endswith(".pt") for known in self.list("checkpoints/")):
            self.full_at = self.full_at or now()
            raise StoreFull(f"{key}: no space left")
        return super().put(key, data)


def test_the_newest_checkpoint_is_told_with_the_time_it_was_committed_at_and_no_other_is(tmp_path):
    store, first, second = FullAfter(tmp_path / "store"), CollectorRegistry(), CollectorRegistry()
    learn(tmp_path, 10, Shelf(), registry=first, store=store)
    status = read_status(tmp_path)["train"]
    assert status["last_checkpoint"]["step"] == 2 and status["last_checkpoint"]["at"] <= store.full_at
    assert (
        status["checkpoint_failures"] == first.get_sample_value("learner_checkpoint_failures_total") == 5
    )  # at 4, 6, 8, 10, and at its end
    assert first.get_sample_value("learner_checkpoints_total") == 1
    assert 0 < first.get_sample_value("learner_checkpoint_timestamp_seconds") <= datetime.fromisoformat(store.full_at).timestamp()
    learn(tmp_path, 2, Shelf(), registry=second, store=store)  # it goes on from there, and writes nothing
    assert "last_checkpoint" not in read_status(tmp_path)["train"]
    assert second.get_sample_value("learner_checkpoints_total") == second.get_sample_value("learner_checkpoint_timestamp_seconds") == 0


def test_it_tells_what_it_does(tmp_path):
    learn(tmp_path, 10, Shelf())
    status = read_status(tmp_path)["train"]
    assert status["step"] == 10 and status["last_snapshot"]["tag"] == "0.8.0" and status["last_checkpoint"]["step"] == 10
    lines = list(read_lines(tmp_path / "history" / "train.jsonl"))
    assert [line["step"] for line in lines if "lr" in line and "event" not in line] == [10]
    assert [line["step"] for line in lines if line.get("event") == "snapshot"] == [4, 8]


def test_its_counters_count_what_this_process_learnt(tmp_path):
    first = learn(tmp_path, 4, Shelf())
    registry = CollectorRegistry()
    state = learn(tmp_path, 10, Shelf(), registry=registry)
    images = {kind: registry.get_sample_value("learner_images_total", {"kind": kind}) for kind in ("fresh", "replay")}
    assert images["fresh"] == state.fresh - first.fresh > 0
    assert sum(images.values()) == state.images - first.images > images["fresh"]
    assert registry.get_sample_value("learner_steps_total") == registry.get_sample_value("learner_step_seconds_count") == 6
    assert registry.get_sample_value("learner_step_number") == 10


class DryStream(PlainStream):
    """Its store is down at first, and again when it is asked for images."""

    why, refused, seen = "", 0, None

    def batches(self):
        self.why = "the store is down"
        yield None
        self.seen = read_status(self.home)["train"]
        self.why = ""
        yield from super().batches()

    def waiting(self):
        return {"waiting": self.why, "waiting_on": "store", "waiting_s": 7.0 if self.why else 0.0}

    def eval_images(self, refs, size):
        if not self.refused:
            self.refused += 1
            raise Retryable("the store is down", after_s=0.0)
        return super().eval_images(refs, size)


def test_a_store_that_is_down_is_said_and_ends_neither_steps_nor_snapshots(tmp_path):
    stream, shelf, registry = DryStream(None, 100), Shelf(), CollectorRegistry()
    stream.home = tmp_path
    config = small_config(checkpoint_steps=2, snapshot_steps=4, bn_images=8, max_steps=6)
    metrics, heart = LearnerMetrics(registry), Heartbeat(tmp_path, "train", period_s=0)
    run_train(config, lambda _: stream, FolderStore(tmp_path / "store"), shelf, metrics, heart, stop=threading.Event())
    assert (stream.seen["state"], stream.seen["waiting"]) == ("waiting", "the store is down")
    assert read_status(tmp_path)["train"]["waiting"] == "" and sorted(shelf.exports) == [4] and stream.refused == 1
    assert registry.get_sample_value("learner_waiting_seconds", {"on": "store"}) == 0.0


def test_told_to_stop_it_checkpoints_and_ends(tmp_path):
    stop = threading.Event()

    class StopsSoon(Shelf):
        def __call__(self, export):
            stop.set()
            return super().__call__(export)

    state = learn(tmp_path, 50, StopsSoon(), stop=stop)
    assert state.step == 4 and Checkpoints(FolderStore(tmp_path / "store"), keep=3).load()["step"] == 4


def test_a_checkpoint_of_another_model_is_refused_with_the_remedy(tmp_path):
    learn(tmp_path, 2, Shelf())
    other = small_config(max_steps=3)
    other = other.model_copy(update={"objective": other.objective.model_copy(update={"prototypes": 7})})
    with pytest.raises(ConfigError, match=r"the checkpoint of step 2 does not fit .*new home"):
        learn(tmp_path, 3, Shelf(), other)


def test_a_checkpoint_of_another_optimizer_is_refused_with_the_remedy(tmp_path):
    learn(tmp_path, 2, Shelf())
    other = small_config(max_steps=3)
    optim = other.train.optim.model_copy(update={"kind": "sgd"})
    other = other.model_copy(update={"train": other.train.model_copy(update={"optim": optim})})
    with pytest.raises(
        ConfigError, match=r"the checkpoint of step 2 does not fit .*train.optim.kind = 'lars', here it is 'sgd'; set them back"
    ):
        learn(tmp_path, 3, Shelf(), other)


def test_the_wait_for_the_first_batch_is_no_share_of_the_time_after_it(tmp_path, caplog):
    config = small_config()
    caplog.set_level("INFO")
    state = fresh_state(config)
    recorder = Recorder(
        config, state, LearnerMetrics(CollectorRegistry()), Heartbeat(tmp_path, "train", period_s=0), PlainStream(None, 100)
    )
    for _ in range(3):
        recorder.waits(state)
    assert [line for line in caplog.messages if "nothing to learn" in line] == [
        "step 0: nothing to learn yet; it waits for images, or for the store"
    ]
    recorder.waited(3600.0)
    for state.step in range(1, RECORD_EVERY + 1):
        recorder.look(state, Step(1.0, 1.0, 1.0, 0.1, True, False, torch.zeros(1, 1)))
    assert 0 <= read_status(tmp_path)["train"]["wait_share"] <= 1
