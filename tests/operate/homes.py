"""A home small enough to be backed up at every step: a real dataset, planned rounds, checkpoints, a registry with a tag, files of its own."""

import shutil

import pytest

from streamlearn.cli.roles import Home
from streamlearn.contract.config import Config, StreamConfig
from streamlearn.contract.config_file import from_json
from streamlearn.contract.event_log import CANDIDATES, TAKEDOWNS, NewRecord
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.registry import EMPTY, MANIFEST
from streamlearn.learn.checkpoint import Checkpoints
from streamlearn.operate.backup import Running, back_up
from streamlearn.operate.backup_set import BackupSet
from streamlearn.operate.restore import Outside, config_of, restore
from streamlearn.stream.plan import Planner
from streamlearn.stream.position import Position, finished
from streamlearn.supervise import exclusive


class Killed(BaseException):
    """Not an Exception: nothing of ours may survive it."""


class Knife:
    """Dies at the n-th thing that is done, before or after it."""

    def __init__(self, nth, when):
        self.left, self.when = nth, when

    def around(self, call, *args, **how):
        self.left -= 1
        if self.left == 0 and self.when == "before":
            raise Killed
        done = call(*args, **how)
        if self.left == 0 and self.when == "after":
            raise Killed
        return done


class DyingStore(FolderStore):
    knife = Knife(0, "never")

    def put(self, key, data):
        return self.knife.around(super().put, key, data)

    def put_file(self, key, path):
        return self.knife.around(super().put_file, key, path)

    def delete(self, key):
        return self.knife.around(super().delete, key)


@pytest.fixture
def home(made, tmp_path):
    """24 images of which one round has been learnt."""
    folder = tmp_path / "home"
    shutil.copytree(made, folder)
    (folder / "config.json").write_text(Config(home=str(folder)).model_dump_json())
    (folder / "history").mkdir(exist_ok=True)
    (folder / "history" / "train.jsonl").write_text('{"step": 1}\n')
    (folder / "status").mkdir(exist_ok=True)
    (folder / "status" / "train.json").write_text("{}")
    running(folder).log.append([NewRecord(TAKEDOWNS, b"url:http://x/1.jpg", b"{}")])
    learn(folder, step=4)
    publish(folder, "0.4.0")
    return folder


def running(folder):
    home = Home(folder, from_json((folder / "config.json").read_text(), where="config.json"))
    log = home.log()
    return Running(folder, log, home.store(), home.catalog(log.log_id), home.registry())


def learn(folder, step, *, parted=False, **more):
    """Plan the next round and checkpoint after it; `parted`: as many ranks do."""
    at, config = running(folder), Config(stream=StreamConfig(round_samples=1, max_replay_per_fresh=1000))
    checkpoints = Checkpoints(at.store, keep=2, parted=parted)
    saved = checkpoints.load()
    position = Position.from_state(config.stream, saved["stream"]) if saved else Position.start(config.stream)
    position = finished(Planner(config.stream, at.catalog, at.store, batch=8).planned(position))
    checkpoints.save({"step": step, "stream": position.to_state()} | more, step, wait=True)
    return position


def publish(folder, tag):
    registry = running(folder).registry
    config = registry.put_blob(b"{}", EMPTY)
    layer = registry.put_blob(f"weights of {tag}".encode() * 100, "application/octet-stream")
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.to_json(), "layers": [layer.to_json()]}
    return registry.put_manifest(manifest, tag=tag)


def backed_up(folder, place, **how):
    return back_up(running(folder), BackupSet(FolderStore(place), str(place)), by_name=how.pop("by_name", False), **how)


def restored(place, folder, *, number=None, force=False, outside=Outside()):
    there = BackupSet(FolderStore(place), str(place))
    backup = there.read(number)
    config = config_of(backup, there, folder, place.parent / "scratch")
    with exclusive(folder, restoring=True):
        return restore(there, backup, folder, config, outside, force=force)


def tree(folder):
    """Every file of a home with its bytes, but the configuration (it names the home) and what SQLite rearranges."""
    skip = {"config.json", ".lock"}
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skip and not p.name.startswith("log.sqlite"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def records(folder):
    """What the log holds."""
    log = running(folder).log
    found = [log.read(CANDIDATES, p, 0, 1000) for p in range(log.partitions(CANDIDATES))]
    return found, log.table(TAKEDOWNS), log.log_id
