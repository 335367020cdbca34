"""Restoring a backup into a home that is empty, or whose content is put aside (`force`).

  1. read     the list of the backup; its digest is in its name
  2. refuse   a home that holds something, a bucket that holds another state, a shard that is only named and not there: nothing is changed yet
  3. stage    every file into HOME/.restoring, each held against its digest and synced
  4. mark     HOME/.restoring/whole
  5. aside    what the home held goes into HOME/.replaced-<time>                                     (force)
  6. bucket   where the store is one: its list of checkpoints goes first; then what is not of the backup; then shards, state, catalog, list of
              checkpoints last.  Of Kafka: values of compacted topics that it lacks
  7. move     from the stage into place, config.json last                                            <- THE COMMIT POINT

Killed after   what is left                                      who mends it
  1, 2         nothing
  3            a part of a stage                                 the next restore begins it anew
  4 to 6       a home without config.json: no role starts in it  the next restore: what it finds goes aside too
  7            nothing; the stage is empty

`streamlearn up` refuses a home with a stage in it.  Paths of the configuration that led into the former home lead into this one.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamlearn.contract import durable
from streamlearn.contract.config import Config
from streamlearn.contract.config_file import from_json
from streamlearn.contract.errors import ConfigError, NotFound
from streamlearn.contract.event_log import EventLog, NewRecord
from streamlearn.contract.object_store import POINTER, ObjectStore
from streamlearn.contract.status import now
from streamlearn.operate.backup import LOG_FILE, SHARDS, TABLES_FILE
from streamlearn.operate.backup_set import Backup, BackupSet, Entry
from streamlearn.supervise import RESTORING

WHOLE = "whole"  # the mark
OURS = {".lock", RESTORING, "lost+found"}
SHOWN = 5


@dataclass(frozen=True)
class Outside:
    """What the configuration in the backup puts elsewhere; None: it lies in the home."""

    store: ObjectStore | None = None
    log: EventLog | None = None


def config_of(backup: Backup, target: BackupSet, home: Path, scratch: Path) -> Config:
    """The configuration in the backup, its paths leading into `home`.  Raises ConfigError, Corrupt."""
    entry = next((e for e in backup.entries if (e.room, e.path) == ("home", "config.json")), None)
    if entry is None:
        raise ConfigError(f"{target.name}: backup {backup.number} holds no config.json: it is of a home that has never run")
    target.get(entry, scratch)
    text = json.dumps(_moved(json.loads(scratch.read_text()), backup.home, str(home)))
    scratch.unlink()
    return from_json(text, where=f"{target.name}, backup {backup.number}, config.json")


def restore(
    target: BackupSet,
    backup: Backup,
    home: Path,
    config: Config,
    outside: Outside,
    *,
    force: bool,
    told: Callable[[str], object] = lambda _: None,
) -> Path | None:
    """Steps 2 to 7; where the home's former content is now.  The caller holds the home's lock.  Raises ConfigError, Corrupt, StoreFull."""
    half = (home / RESTORING / WHOLE).exists()
    held = sorted(p.name for p in home.iterdir() if p.name not in OURS and not p.name.startswith(".replaced-"))
    if held and not (force or half):
        raise ConfigError(
            f"{home}: holds {', '.join(held[:SHOWN])}{' and more' if len(held) > SHOWN else ''}; restore into an empty folder, or use --force: "
            "what is there is then put aside, not deleted"
        )
    if outside.store is not None:
        _check_bucket(backup, outside.store, force=force or half)
    stage = home / RESTORING
    shutil.rmtree(stage, ignore_errors=True)
    for entry in backup.entries:
        place = _place(entry, outside)
        if place:
            _staged(target, entry, stage / place)
            told(place)
    durable.write(stage / "config.json", config.model_dump_json(indent=1).encode())
    durable.write(stage / WHOLE, b"")
    aside = home / f".replaced-{now().replace(':', '')}" if held else None
    for name in held:
        durable.move(home / name, home / f"{aside}/{name}")
    if outside.store is not None:
        _fill_bucket(target, backup, outside.store, stage / "scratch", told)
    if outside.log is not None:
        _tell_tables(target, backup, outside.log, stage / "scratch")
    for path in sorted(stage.iterdir(), key=lambda p: p.name == "config.json"):
        if path.name not in (WHOLE, "scratch"):
            durable.move(path, home / path.name)
    shutil.rmtree(stage)
    return aside


def verify(target: BackupSet, backup: Backup, scratch: Path, told: Callable[[str], object] = lambda _: None) -> None:
    """Read all of it, as a restore would.  Raises Corrupt."""
    for entry in backup.entries:
        target.get(entry, scratch)
        told(f"{entry.room}/{entry.path}")
    scratch.unlink(missing_ok=True)


def _place(entry: Entry, outside: Outside) -> str:
    """Its path in the home; empty: it does not lie there."""
    if entry.room == "home":
        return "" if entry.path == "config.json" else entry.path  # that one is written anew
    if entry.room == "store":
        return f"store/{entry.path}" if outside.store is None else ""
    if entry.room == "log":
        return entry.path if entry.path == LOG_FILE else ""
    return f"{entry.room}/{entry.path}"


def _staged(target: BackupSet, entry: Entry, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target.get(entry, path)
        durable.sync(path)
    except OSError as e:
        raise durable.translate(e, path) from e


def _moved(value: Any, before: str, after: str) -> Any:
    """Paths into the former home, at whatever depth."""
    if isinstance(value, dict):
        return {k: _moved(v, before, after) for k, v in value.items()}
    if isinstance(value, list):
        return [_moved(v, before, after) for v in value]
    if isinstance(value, str) and (value == before or value.startswith(f"{before}/")):
        return after + value[len(before) :]
    return value


def _check_bucket(backup: Backup, store: ObjectStore, *, force: bool) -> None:
    state = [key for key in store.list("") if not key.startswith(SHARDS)]
    if state and not force:
        raise ConfigError(
            f"the store holds another state ({', '.join(state[:SHOWN])}…); restore into an empty store.prefix (--set store.prefix=…, whose shards "
            "must be there or in the backup), or use --force: it is then deleted, but its shards are not"
        )
    lacking = [n.key for n in backup.named if not _is_there(store, n.key, n.bytes)]
    if lacking:
        raise ConfigError(
            f"{len(lacking)} objects that the backup only names are not in the store, such as {lacking[0]}; restore with the store.bucket and "
            "store.prefix that hold them, or copy them there first"
        )


def _is_there(store: ObjectStore, key: str, size: int) -> bool:
    try:
        return store.size(key) == size
    except NotFound:
        return False


def _fill_bucket(target: BackupSet, backup: Backup, store: ObjectStore, scratch: Path, told: Callable[[str], object]) -> None:
    entries = {e.path: e for e in backup.entries if e.room == "store"}
    store.delete(POINTER)
    for key in store.list(""):
        if key not in entries and not key.startswith(SHARDS):
            store.delete(key)
    last = {POINTER: 2}
    for key in sorted(entries, key=lambda k: (last.get(k, "_delta_log/" in k), k)):
        if key.startswith(SHARDS) and _is_there(store, key, entries[key].bytes):
            continue
        target.get(entries[key], scratch)
        store.put_file(key, scratch)
        told(key)


def _tell_tables(target: BackupSet, backup: Backup, log: EventLog, scratch: Path) -> None:
    """What compacted topics held and this log does not: takedowns, cursors of connectors, what hosts asked for."""
    entry = next((e for e in backup.entries if (e.room, e.path) == ("log", TABLES_FILE)), None)
    if entry is None:
        return
    target.get(entry, scratch)
    for topic, table in json.loads(scratch.read_text()).items():
        try:
            held = log.table(topic)
        except NotFound:
            log.ensure_topic(topic, len(backup.elsewhere["kafka"]["bounds"][topic]))
            held = {}
        lacking = {bytes.fromhex(k): bytes.fromhex(v) for k, v in table.items() if bytes.fromhex(k) not in held}
        log.append([NewRecord(topic, key, value) for key, value in lacking.items()])
