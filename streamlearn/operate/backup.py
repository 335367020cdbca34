"""Backing up a home while everything runs: what depends on other things is copied before them, so nothing in the copy points at what it lacks.

  1. pin      the registry's index, then the list of checkpoints: a snapshot is published after the checkpoint of its step, so each snapshot
              that is copied has its step at or below the checkpoint's
  2. copy     those checkpoints; the blobs of the index
  3. copy     inputs, then the store's other small objects: orders, generations, the recorded rounds, up to the first gap
  4. copy     the catalog: one version V, its log and its data files
  5. copy     tar and sidecar of every shard that is live in V; or only name them, where the store is a bucket
  6. copy     the event log, as it is at one moment, with the fetchers' group offsets put back to V's positions; of Kafka the compacted topics,
              and where the others ended
  7. copy     the home's own files, but caches and what a start makes anew
  8. check    rounds, and so the cursor, reach no further than V does, and V no further than the log: else Corrupt
  9. put      backups/<number>-<digest>.json                                             <- THE COMMIT POINT
 10. forget   older backups, if asked

Killed after   what is left                                     who mends it
  1 to 8       the former backups; blobs that no list names     the next backup finds them there, or `--keep` deletes them
  9            this backup, and one too many                    the next `--keep`

Checkpoint <= rounds <= catalog <= shards, log: so the cursor is never ahead of the data.  What was committed after its thing was copied is as if it
had not happened: offsets above V's positions are fetched again from the log, rounds after the recorded ones are planned anew.

What a pinned list names may be deleted while it is copied (a checkpoint that falls out of the newest K, a shard taken down and purged): then it begins
again from 1, some times; what it has copied it need not copy again.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from streamlearn.contract import durable
from streamlearn.contract.catalog import LIVE, DeltaCatalog, Listing
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound, Retryable
from streamlearn.contract.event_log import CANDIDATES, COMPACTED, EventLog, SqliteLog
from streamlearn.contract.object_store import POINTER, ObjectStore
from streamlearn.contract.oci import digest_of, parse_manifest, parts
from streamlearn.contract.registry import OciLayout, Registry
from streamlearn.contract.shards import sidecar_key
from streamlearn.contract.status import now
from streamlearn.operate.backup_set import Backup, BackupSet, Entry, Named
from streamlearn.operate.parts import files_of, of_version, places, put_back, unbroken
from streamlearn.stream.rounds import Round

CATALOG, SHARDS, CHECKPOINTS, ROUNDS, INPUTS = "catalog/shards/", "shards/", "checkpoints/", "rounds/", "train/inputs/"
LOG_FILE, TABLES_FILE = "log.sqlite", "tables.json"
ATTEMPTS = 3
CHECKED = 64  # newest rounds: older ones rest on older versions of the table
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """What is backed up: a home, with the adapters that its configuration chooses."""

    path: Path
    log: EventLog
    store: ObjectStore
    catalog: DeltaCatalog
    registry: Registry


@dataclass
class Copied:
    """What was done."""

    new: int = 0  # files
    new_bytes: int = 0
    same: int = 0  # files whose content was there already


class Changed(Retryable):
    """Something was deleted under our hands."""


def back_up(source: Running, target: BackupSet, *, by_name: bool, told: Callable[[str], object] = lambda _: None) -> tuple[Backup, Copied]:
    """Steps 1 to 9.  `by_name`: shards stay where they are, and are only named.  Raises ConfigError, Corrupt, StoreFull, Retryable."""
    before = _former(source, target)
    done = Copied()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            backup = _Copying(source, target, before, done, told).whole(by_name)
            break
        except Changed as e:
            if attempt == ATTEMPTS:
                raise
            logger.warning("%s; beginning again", e)
    told(target.commit(backup))
    return backup, done


def _former(source: Running, target: BackupSet) -> Backup | None:
    """The newest backup there; one that is damaged is of no use to this one."""
    try:
        found = target.read()
    except NotFound:
        return None
    except Corrupt as e:
        logger.warning("%s", e)
        return None
    if found.log_id != source.log.log_id:
        raise ConfigError(
            f"{target.name}: holds the backups of another home ({found.home}, log {found.log_id}), this one's log is {source.log.log_id}; "
            "name another place"
        )
    return found


class _Copying:
    """One attempt."""

    def __init__(self, source: Running, target: BackupSet, before: Backup | None, done: Copied, told: Callable[[str], object]):
        self.source, self.target, self.done, self.told = source, target, done, told
        self.number = max(target.numbers(), default=0) + 1
        self.before = {(e.room, e.path): e for e in before.entries} if before else {}
        self.entries: list[Entry] = []

    def whole(self, by_name: bool) -> Backup:
        at = now()
        with tempfile.TemporaryDirectory(prefix="streamlearn-backup-") as folder:
            self.scratch = Path(folder) / "file"
            index, pointer = self._pin()
            elsewhere = self._registry(index)
            keys = self._small(pointer)
            listing = self._catalog()
            named = self._shards(listing, by_name)
            elsewhere |= self._log(listing)
            self._home()
            self._check(keys, listing)
        steps = [e["step"] for e in json.loads(pointer)["checkpoints"]] if pointer else [-1]
        positions = {f"{topic}/{partition}": end for (topic, partition), end in listing.positions.items()}
        return Backup(
            self.number,
            at,
            str(self.source.path),
            self.source.log.log_id,
            steps[0],
            listing.version,
            positions,
            tuple(self.entries),
            tuple(named),
            elsewhere,
        )

    # 1, 2

    def _pin(self) -> tuple[bytes | None, bytes | None]:
        """index.json of an embedded registry; the list of checkpoints, which are copied at once: they are replaced before anything else is."""
        registry = self.source.registry
        index = (registry.root / "index.json").read_bytes() if isinstance(registry, OciLayout) else None
        try:
            pointer = self.source.store.get(POINTER)
        except NotFound:
            return index, None
        for entry in json.loads(pointer)["checkpoints"]:
            digests = {part: part.rpartition("-")[2].partition(".")[0] for part in entry.get("parts", ())}  # of many ranks; its name has it
            for key, digest in (digests | {entry["key"]: entry.get("sha256", "")}).items():
                self._object(key, expected=digest, why="a newer checkpoint has taken its place")
        self._bytes("store", POINTER, pointer)
        return index, pointer

    def _registry(self, index: bytes | None) -> dict[str, object]:
        registry = self.source.registry
        if not isinstance(registry, OciLayout) or index is None:
            return {"registry": {tag: known.digest for tag, known in registry.tags().items()}}
        todo, seen = [row["digest"] for row in json.loads(index)["manifests"]], set[str]()
        while todo:
            digest = todo.pop()
            if digest in seen:
                continue
            seen.add(digest)
            try:
                data = registry.read_blob(digest)
                manifest = parse_manifest(data, digest)
                self._bytes("registry", f"blobs/sha256/{digest[7:]}", data)
                inner = set(parts(manifest))
                todo += [d["digest"] for d in manifest.get("manifests") or []]
                for part in sorted(inner - seen - set(todo)):
                    seen.add(part)
                    self._blob(registry, part)
            except NotFound as e:
                raise Changed(f"{e}: collected while it was copied") from e
        for name, data in (("index.json", index), ("oci-layout", (registry.root / "oci-layout").read_bytes())):
            self._bytes("registry", name, data)
        return {}

    def _blob(self, registry: OciLayout, digest: str) -> None:
        path = f"blobs/sha256/{digest[7:]}"
        if self._same("registry", path, digest[7:], registry.path(digest).stat().st_size if registry.has_blob(digest) else -1):
            return
        registry.copy_blob(digest, self.scratch)
        self._add("registry", path, expected=digest[7:])

    # 3

    def _small(self, pointer: bytes | None) -> list[str]:
        """Everything of the store but checkpoints, catalog and shards; the keys of the rounds that are copied."""
        inputs = unbroken(self.source.store.list(INPUTS), INPUTS)
        for key in inputs:  # before the orders that they name
            self._object(key, fixed=True)
        apart = (CHECKPOINTS, CATALOG, SHARDS, INPUTS, ROUNDS)
        rounds = unbroken(self.source.store.list(ROUNDS), ROUNDS)
        for key in rounds:
            self._object(key, fixed=True)
        for prefix in ("train/", "generations/"):
            for key in self.source.store.list(prefix):
                if not key.startswith(apart):
                    self._object(key)
        return rounds

    # 4, 5

    def _catalog(self) -> Listing:
        listing = self.source.catalog.listing()
        if listing.version < 0:
            return listing
        wanted = {f"{CATALOG}{name}" for name in listing.files}
        there = [key for key in self.source.store.list(CATALOG) if of_version(key.removeprefix(CATALOG), listing.version)]
        for key in there:
            self._object(key, fixed=key.endswith(".parquet"), optional=key not in wanted and "_delta_log" not in key)
        lacking = wanted - {e.path for e in self.entries}
        if lacking:
            raise Changed(f"the catalog's file {min(lacking)} was vacuumed while it was copied")
        return listing

    def _shards(self, listing: Listing, by_name: bool) -> list[Named]:
        named = []
        for row in listing.rows:
            if row.status != LIVE:
                continue
            side = sidecar_key(row.key)
            if by_name:
                named += [Named(row.key, row.sha256, row.bytes), Named(side, "", self._size(side))]
                continue
            if not self._same("store", row.key, row.sha256, row.bytes):
                self._object(row.key, expected=row.sha256, why="its shard has ended")
            self._object(side, why="its shard has ended")
        return named

    # 6, 7

    def _log(self, listing: Listing) -> dict[str, object]:
        log = self.source.log
        if isinstance(log, SqliteLog):
            log.copy_to(self.scratch)
            copy = SqliteLog(self.scratch)
            try:
                put_back(copy, listing)
            finally:
                copy.close()
            self._add("log", LOG_FILE)
            return {}
        tables, ends = {}, {}
        for topic in sorted({CANDIDATES, *COMPACTED}):
            try:
                ends[topic] = [log.bounds(topic, p) for p in range(log.partitions(topic))]
                if topic in COMPACTED:
                    tables[topic] = {key.hex(): value.hex() for key, value in log.table(topic).items()}
            except NotFound:
                continue  # a role that writes it makes it
        self._bytes("log", TABLES_FILE, json.dumps(tables, sort_keys=True).encode())
        return {"kafka": {"epoch": log.epoch, "bounds": ends}}

    def _home(self) -> None:
        for path in files_of(self.source.path):
            name = path.relative_to(self.source.path).as_posix()
            try:
                stat = path.stat()
                known = self.before.get(("home", name))
                if (
                    known
                    and (known.bytes, known.modified) == (stat.st_size, stat.st_mtime)
                    and self._same("home", name, known.sha256, known.bytes)
                ):
                    continue
                shutil.copyfile(path, self.scratch)
            except FileNotFoundError:
                continue  # a file of the moment
            except OSError as e:
                raise durable.translate(e, self.scratch) from e
            self._add("home", name, modified=stat.st_mtime)

    # 8

    def _check(self, rounds: list[str], listing: Listing) -> None:
        reach: dict[str, int] = {}
        for key in rounds[-CHECKED:]:
            for shard in Round.from_json(self.source.store.get(key), key).shards:
                reach[shard.place] = max(shard.end, reach.get(shard.place, 0))
        covered = {f"{topic}/{partition}": end for (topic, partition), end in listing.positions.items()}
        ahead = [
            f"{place}: learnt up to {end}, covered up to {covered.get(place, 0)}"
            for place, end in reach.items()
            if end > covered.get(place, 0)
        ]
        log = self.source.log
        for topic, number, name in places(log):
            end = covered.get(f"{name}/{number}", 0)
            if log.bounds(topic, number)[1] < end:
                ahead.append(f"{name}/{number}: covered up to {end}, but the log ends at {log.bounds(topic, number)[1]}")
        if ahead:
            raise Corrupt(f"{self.source.path}: {'; '.join(ahead)}: not backed up; `streamlearn dataset verify` tells more")

    # one file

    def _size(self, key: str) -> int:
        try:
            return self.source.store.size(key)
        except NotFound as e:
            raise Changed(f"{e}: deleted while it was named; `streamlearn dataset verify` tells more") from e

    def _object(self, key: str, *, expected: str = "", fixed: bool = False, optional: bool = False, why: str = "") -> None:
        """An object of the store.  `fixed`: its name never gets other bytes; `optional`: it may be gone."""
        store = self.source.store
        try:
            size, modified = store.size(key), store.modified(key)
            known = self.before.get(("store", key))
            if (
                known
                and known.bytes == size
                and (fixed or known.modified == modified)
                and self._same("store", key, known.sha256, size, modified)
            ):
                return
            store.get_file(key, self.scratch)
        except NotFound as e:
            if optional:
                return
            raise Changed(f"{e}: deleted while it was copied{f' ({why})' if why else ''}; `streamlearn dataset verify` tells more") from e
        self._add("store", key, expected=expected, modified=modified)

    def _bytes(self, room: str, path: str, data: bytes) -> None:
        if self._same(room, path, digest_of(data)[7:], len(data)):
            return
        try:
            self.scratch.write_bytes(data)
        except OSError as e:
            raise durable.translate(e, self.scratch) from e
        self._add(room, path)

    def _same(self, room: str, path: str, sha256: str, size: int, modified: float = 0.0) -> bool:
        """Its content is there: nothing to copy."""
        if not self.target.holds(sha256, size):
            return False
        known = self.before.get((room, path))
        self.entries.append(Entry(room, path, sha256, size, modified or (known.modified if known and known.sha256 == sha256 else 0.0)))
        self.done.same += 1
        return True

    def _add(self, room: str, path: str, *, expected: str = "", modified: float = 0.0) -> None:
        """What lies in the scratch file."""
        try:
            sha256, size, new = self.target.put(self.scratch, expected)
        except Corrupt as e:
            raise Corrupt(
                f"{room}/{path}: {e}: damaged at its source; `streamlearn dataset verify --deep` and `snapshots verify` tell more"
            ) from e
        finally:
            self.scratch.unlink(missing_ok=True)
        self.entries.append(Entry(room, path, sha256, size, modified))
        self.done.new, self.done.new_bytes, self.done.same = (
            self.done.new + new,
            self.done.new_bytes + size * new,
            self.done.same + (not new),
        )
        if new:
            self.told(f"{room}/{path}")
