"""Where backups lie: one folder or bucket a home, any number of backups, each byte once.

    blobs/<sha256[:2]>/<sha256>                content, under its digest
    backups/<number:06d>-<sha256[:12]>.json    what one backup consists of; the digest is that of the file itself

Blobs are never changed, so a backup that is killed leaves the former ones whole, and what it has copied is found by the next.  `forget` deletes
the oldest lists first and then the blobs that no list names: killed in between, the next `forget` finds them.  One home writes to it, one
backup at a time.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.object_store import ObjectStore

SCHEMA = "streamlearn.backup/1"
BACKUPS, BLOBS = "backups/", "blobs/"


@dataclass(frozen=True)
class Entry:
    """One file of a backup."""

    room: str  # home, store, registry or log
    path: str  # relative in its room
    sha256: str
    bytes: int
    modified: float = 0.0  # as its room said when it was copied; 0: never to be believed


@dataclass(frozen=True)
class Named:
    """An object that the backup only names: it stays where it is."""

    key: str
    sha256: str  # empty: not known
    bytes: int


@dataclass(frozen=True)
class Backup:
    """What one backup consists of."""

    number: int
    at: str  # RFC 3339, when it began: all that was committed before is in it
    home: str
    log_id: str
    step: int  # of the checkpoint; -1: none
    catalog_version: int
    positions: dict[str, int]  # topic/partition -> offsets below it are covered
    entries: tuple[Entry, ...]
    named: tuple[Named, ...] = ()
    elsewhere: dict[str, Any] = field(default_factory=dict)  # what is kept by others, as it was: registry's tags, Kafka's bounds
    schema: str = SCHEMA

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    def encoded(self) -> bytes:
        plain = asdict(self) | {"entries": [list(asdict(e).values()) for e in self.entries]}
        return json.dumps(plain | {"named": [list(asdict(n).values()) for n in self.named]}, sort_keys=True).encode()

    @classmethod
    def decoded(cls, data: bytes, where: str) -> "Backup":
        """Raises Corrupt, ConfigError for one of a newer version."""
        try:
            raw = json.loads(data)
            if raw["schema"] != SCHEMA:
                raise ConfigError(f"{where}: schema {raw['schema']!r}, this version knows {SCHEMA}; install the streamlearn that wrote it")
            rows = {"entries": tuple(Entry(*row) for row in raw["entries"]), "named": tuple(Named(*row) for row in raw["named"])}
            return cls(**raw | rows)
        except (ValueError, KeyError, TypeError) as e:
            raise Corrupt(f"{where}: not a list of a backup: {e}; restore another one (--number)") from e


class BackupSet:
    """The backups of one home."""

    def __init__(self, store: ObjectStore, name: str):
        self.store, self.name = store, name  # as the user calls it

    def numbers(self) -> dict[int, str]:
        """Number -> key, oldest first."""
        keys = [key for key in self.store.list(BACKUPS) if key.removeprefix(BACKUPS)[:6].isdigit() and key.endswith(".json")]
        return {int(key.removeprefix(BACKUPS)[:6]): key for key in sorted(keys)}

    def read(self, number: int | None = None) -> Backup:
        """The newest, or this one.  Raises NotFound, Corrupt."""
        known = self.numbers()
        if not known or (number is not None and number not in known):
            there = ", ".join(map(str, known)) or "none"
            raise NotFound(
                f"{self.name}: no backup{'' if number is None else f' {number}'}; there are: {there}; `streamlearn backup` makes one"
            )
        key = known[max(known) if number is None else number]
        data = self.store.get(key)
        if hashlib.sha256(data).hexdigest()[:12] != key.removesuffix(".json").rpartition("-")[2]:
            raise Corrupt(f"{self.name}: {key} does not match its digest; restore an older backup (--number)")
        return Backup.decoded(data, f"{self.name}/{key}")

    def commit(self, backup: Backup) -> str:
        """THE COMMIT POINT of a backup; its key."""
        data = backup.encoded()
        key = f"{BACKUPS}{backup.number:06d}-{hashlib.sha256(data).hexdigest()[:12]}.json"
        self.store.put(key, data)
        return key

    def holds(self, sha256: str, size: int) -> bool:
        try:
            return self.store.size(blob_key(sha256)) == size
        except NotFound:
            return False

    def put(self, path: Path, expected: str = "") -> tuple[str, int, bool]:
        """(sha256, bytes, whether it was new).  Raises Corrupt where its digest does not begin as `expected` says, StoreFull."""
        with path.open("rb") as f:
            sha256, size = hashlib.file_digest(f, "sha256").hexdigest(), f.tell()
        if not sha256.startswith(expected):
            raise Corrupt(f"{path.name}: sha256 {sha256[:12]}…, it must be {expected[:12]}…")
        if self.holds(sha256, size):
            return sha256, size, False
        self.store.put_file(blob_key(sha256), path)
        return sha256, size, True

    def get(self, entry: Entry, path: Path) -> None:
        """Verified.  Raises Corrupt, naming the blob and what to do."""
        try:
            self.store.get_file(blob_key(entry.sha256), path)
        except NotFound as e:
            raise Corrupt(f"{self.name}: {entry.room}/{entry.path}: {e}; restore another backup (--number)") from e
        with path.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != entry.sha256:
            raise Corrupt(
                f"{self.name}: {entry.room}/{entry.path}: blob {blob_key(entry.sha256)} has sha256 {found[:12]}…: damaged; delete it and back up "
                "again while its source lives, or restore another backup (--number)"
            )

    def forget(self, keep: int, told: Callable[[str], object] = lambda _: None) -> int:
        """Delete all but the newest `keep` backups, and what only they held; the number of blobs deleted."""
        known = list(self.numbers().items())
        needed = {entry.sha256 for number, _ in known[-keep:] for entry in self.read(number).entries}  # read first: a damaged list stops it
        for _, key in known[:-keep]:
            self.store.delete(key)
            told(key)
        old = [key for key in self.store.list(BLOBS) if key.rpartition("/")[2] not in needed]
        for key in old:
            self.store.delete(key)
        return len(old)


def blob_key(sha256: str) -> str:
    return f"{BLOBS}{sha256[:2]}/{sha256}"
