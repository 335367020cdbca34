"""What `streamlearn doctor` looks at that needs neither torch nor an adapter.  It changes nothing that stays: what it writes to see whether it may,
it deletes.

Every check yields findings: what is so, how bad that is, and what to do about it.  An error is what keeps a role from working or loses something;
a warning is what will, or may.
"""

import errno
import fcntl
import importlib.metadata
import json
import platform
import re
import shutil
import socket
import sqlite3
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import urllib3

from streamlearn.contract.catalog import DeltaCatalog
from streamlearn.contract.config import Config
from streamlearn.contract.errors import NotFound, StreamlearnError
from streamlearn.contract.object_store import POINTER, FolderStore, ObjectStore
from streamlearn.contract.shard_rows import SCHEMA
from streamlearn.contract.status import read_status
from streamlearn.supervise import RESTORING

OK, WARNING, ERROR = "ok", "warning", "error"
SKEW_S, SKEW_ERROR_S = 5.0, 300.0  # S3 refuses requests that are 15 minutes off; tokens and certificates less
LEAST_FREE = 2**28  # bytes, of the home's disk: a shard, and the log's growth of some hours
REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?>=([0-9.]+)")
ADDRESS_OF = {
    "metrics_port": "metrics_host",
    "connect.rest_port": "connect.rest_host",
    "serve.port": "serve.address",
    "demo.port": "demo.address",
}
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
UPKEEP_S = 86400.0  # UpkeepOld (ops/prometheus/rules/ingest.yml) complains after two of them
PROBE = "doctor-{}.probe"  # name of what is written and deleted


@dataclass(frozen=True)
class Finding:
    level: str  # ok, warning or error
    check: str
    what: str
    remedy: str = ""


def tried(check: str, look: Callable[[], Iterable[Finding]], remedy: str) -> list[Finding]:
    """What a look finds; an error of ours is a finding.  `remedy`: where the error names none."""
    try:
        return list(look())
    except (StreamlearnError, OSError, sqlite3.DatabaseError) as e:
        return [of_error(check, str(e) or type(e).__name__, remedy)]


def of_error(check: str, text: str, remedy: str) -> Finding:
    what, _, told = text.rpartition("; ")
    return Finding(ERROR, check, what, told) if what else Finding(ERROR, check, told, remedy)


def versions() -> Iterator[Finding]:
    """Python and the libraries, against what the package asks for."""
    try:
        wanted = importlib.metadata.requires("streamlearn") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(WARNING, "versions", "streamlearn is not installed as a package: what it needs is not known", "pip install -e .")
        return
    there = [f"Python {platform.python_version()}", f"streamlearn {importlib.metadata.version('streamlearn')}"]
    for line in wanted:
        asked = REQUIREMENT.match(line)
        if asked is None or "extra ==" in line:
            continue
        name, least = asked.groups()
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(ERROR, "versions", f"{name} is not installed, {least} or newer is needed", f"pip install '{name}>={least}'")
            continue
        if _number(found) < _number(least):
            yield Finding(ERROR, "versions", f"{name} {found} is too old, {least} or newer is needed", f"pip install '{name}>={least}'")
        there.append(f"{name} {found}")
    yield Finding(OK, "versions", ", ".join(there))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def folder(home: Path) -> Iterator[Finding]:
    """Whether roles may write in the home, and whether its clock is ours."""
    there = home
    while not there.exists():
        there = there.parent
    with probe_file(there) as (path, moment):
        skew = path.stat().st_mtime - moment
    yield Finding(OK, "folder", f"{there}: may be written{'' if there == home else f'; {home} is made at the start'}")
    if abs(skew) > SKEW_S:
        yield clock_finding(str(there), skew)


class probe_file:
    """A file that is written, and is gone again; with when it was written."""

    def __init__(self, place: Path):
        self.path = place / f".{PROBE.format(uuid.uuid4().hex[:8])}"

    def __enter__(self) -> tuple[Path, float]:
        try:
            moment = time.time()
            self.path.write_bytes(b"x" * 2**16)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return self.path, moment

    def __exit__(self, *_: object) -> None:
        self.path.unlink()


def disk(home: Path, config: Config, checkpoint_bytes: int) -> Iterator[Finding]:
    """Room for what roles keep beside the store."""
    there = next(p for p in (home, *home.parents) if p.exists())
    usage = shutil.disk_usage(there)
    held = sum(p.stat().st_size for name in ("spool", "cache") for p in (home / name).glob("*") if p.is_file())
    may_grow = max(0, config.fetch.spool_bytes + config.stream.cache_bytes - held)
    least = max(LEAST_FREE, 2 * checkpoint_bytes)
    free = f"{there}: {usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB are free"
    if usage.free < least:
        yield Finding(
            ERROR, "disk", f"{free}, at least {least / 1e9:.1f} GB are needed", "free some space, or put the home on a larger disk"
        )
    elif usage.free < may_grow + least:
        grows = f"spool and cache may still grow by {may_grow / 1e9:.1f} GB"
        yield Finding(WARNING, "disk", f"{free}, but {grows}", "lower fetch.spool_bytes and stream.cache_bytes, or free some space")
    else:
        yield Finding(OK, "disk", free)


def state(home: Path, config: Config) -> Iterator[Finding]:
    """What the home holds, and whether this version reads it."""
    if (home / RESTORING).exists():
        yield Finding(ERROR, "home", f"{home}: half restored", "give the same `streamlearn restore` again")
    if config.log.kind == "sqlite" and (home / "log.sqlite").exists():
        with closing(sqlite3.connect(f"file:{urllib.parse.quote(str(home / 'log.sqlite'))}?mode=ro", uri=True)) as db:
            topics = dict(db.execute("SELECT topic, partitions FROM topics").fetchall())
        yield from partitions(topics, config)
        yield Finding(OK, "home", f"{home / 'log.sqlite'}: {len(topics)} topics")
    yield Finding(OK, "home", f"{home}: {'a loop runs here' if runs(home) else 'no loop runs here'}")


def partitions(topics: dict[str, int], config: Config) -> Iterator[Finding]:
    for topic, number in sorted(topics.items()):
        if number != config.log.partitions:
            what = f"topic {topic} has {number} partitions, log.partitions = {config.log.partitions}"
            yield Finding(ERROR, "event log", what, f"set log.partitions = {number}")


def runs(home: Path) -> bool:
    """Whether a supervisor holds the home's lock."""
    if not (home / ".lock").exists():
        return False
    with (home / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def store(there: ObjectStore, where: str) -> Iterator[Finding]:
    """Write, write if absent, read, read a part, list, delete: with the store's promises."""
    if isinstance(there, FolderStore) and not there.root.exists():
        yield Finding(OK, "store", f"{where}: not there yet; it is made at the start")
        return
    key, data = PROBE.format(uuid.uuid4().hex), b"may be deleted at any time"
    try:
        if not there.put_if_absent(key, data) or there.put_if_absent(key, data + b"!"):
            what = f"{where}: writes an object that must be absent although it is there (If-None-Match is not heeded)"
            yield Finding(ERROR, "store", what, "take a store with conditional writes: without them two fetchers can store an image twice")
        there.put(key, data)
        if there.get(key) != data or there.get_range(key, 4, 2) != b"be" or key not in there.list(key):
            yield Finding(ERROR, "store", f"{where}: does not give back what was written", "see the store's documentation")
    finally:
        there.delete(key)
    with suppress(NotFound):
        there.get(key)
        yield Finding(ERROR, "store", f"{where}: {key} is there after its deletion", "allow s3:DeleteObject; delete it by hand")
        return
    yield Finding(OK, "store", f"{where}: written, read, listed and deleted")


def checkpoints(there: ObjectStore) -> tuple[list[Finding], int]:
    """What the list of checkpoints says; bytes of the newest."""
    try:
        listed = json.loads(there.get(POINTER))["checkpoints"]
    except NotFound:
        return [Finding(OK, "checkpoints", "none yet")], 0
    except (ValueError, KeyError) as e:
        return [Finding(ERROR, "checkpoints", f"{POINTER}: not a list of checkpoints: {e}", "restore it from a backup")], 0
    found, sizes = [], []
    for entry in listed:
        held = {key: _size(there, key) for key in (entry["key"], *entry.get("parts", ()))}  # parts: many ranks wrote it together
        sizes.append(sum(held.values()))
        wrong = [f"{key}: is not there" for key, size in held.items() if size < 0]
        if not wrong and held[entry["key"]] != entry["bytes"]:
            wrong = [f"{entry['key']}: {held[entry['key']]} bytes, the list says {entry['bytes']} bytes"]
        remedy = "the learner takes the one before; restore it from a backup if it is the only one"
        found += [Finding(ERROR, "checkpoints", what, remedy) for what in wrong]
    return [*found, Finding(OK, "checkpoints", f"{len(listed)}, the newest of step {listed[0]['step']}")], sizes[0]


def _size(there: ObjectStore, key: str) -> int:
    try:
        return there.size(key)
    except NotFound:
        return -1


def catalog(table: DeltaCatalog) -> Iterator[Finding]:
    version, columns = table.version(), table.column_names()
    if unknown := sorted(columns - set(SCHEMA.names)):
        what = f"{table.uri}: columns that this version does not know: {', '.join(unknown)}"
        yield Finding(ERROR, "catalog", what, "a newer streamlearn wrote it: install that one")
    yield Finding(OK, "catalog", f"{table.uri}: version {version}" if version >= 0 else f"{table.uri}: not there yet; the fetcher makes it")


def clock(url: str, ca_bundle: str = "", timeout_s: float = 5.0) -> Iterator[Finding]:
    """Ours against the Date of whatever a server answers."""
    with closing_pool(ca_bundle, timeout_s) as pool:
        try:
            before = time.time()
            answer = pool.request("GET", url, preload_content=False, redirect=False)
            after, said = time.time(), answer.headers.get("Date", "")
            answer.close()
        except urllib3.exceptions.HTTPError as e:
            yield Finding(WARNING, "clock", f"{url}: not asked for its time: {e}", "see what is found of the server itself")
            return
    try:
        theirs = parsedate_to_datetime(said).timestamp() + 0.5  # it tells whole seconds, rounded down
    except ValueError:
        yield Finding(WARNING, "clock", f"{url}: says no time (Date: {said!r})", "compare the clocks by hand")
        return
    yield clock_finding(url, theirs - min(max(theirs, before), after))


@dataclass(frozen=True)
class closing_pool:
    ca_bundle: str
    timeout_s: float

    def __enter__(self) -> urllib3.PoolManager:
        return urllib3.PoolManager(retries=False, timeout=self.timeout_s, ca_certs=self.ca_bundle or None)

    def __exit__(self, *_: object) -> None:
        """A pool of one request is closed with its answer."""


def clock_finding(where: str, skew: float) -> Finding:
    if abs(skew) <= SKEW_S:
        return Finding(OK, "clock", f"{where}: agrees with ours")
    what = f"this machine's clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} that of {where}"
    return Finding(ERROR if abs(skew) >= SKEW_ERROR_S else WARNING, "clock", what, "let an NTP client (chrony, systemd-timesyncd) set it")


def ports(config: Config, roles: Sequence[str], home: Path) -> Iterator[Finding]:
    """Whether what is to be listened on is free.  Only where no loop runs; a role that runs by itself in this home (a container) holds its own."""
    wanted = [(role, config.metrics_host, config.metrics_port + i, "metrics_port") for i, role in enumerate(roles) if config.metrics_port]
    wanted += [("connect", config.connect.rest_host, config.connect.rest_port, "connect.rest_port")] if config.connect.rest_port else []
    wanted += [("serve", config.serve.address, config.serve.port, "serve.port")] if config.serve.enabled and config.serve.port else []
    wanted += [("demo", config.demo.address, config.demo.port, "demo.port")] if config.demo.enabled and config.demo.port else []
    running = {role for role, said in read_status(home).items() if Path(f"/proc/{said.get('pid')}").exists()}
    wanted = [each for each in wanted if each[0] not in running]
    for _, host, port, key in wanted:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((host, port))
            except OSError as e:
                address = ADDRESS_OF[key]  # where the address is not one of this machine's
                remedy = (
                    f"set {key} to another, or free it" if e.errno == errno.EADDRINUSE else f"set {address} to an address of this machine"
                )
                yield Finding(ERROR, "ports", f"{key}: {host}:{port}: {e.strerror}", remedy)
    if wanted:
        yield Finding(OK, "ports", f"{len(wanted)} looked at")


def watched(config: Config) -> Iterator[Finding]:
    """Whether what is to be seen and done while nobody looks can be."""
    if config.metrics_host not in LOOPBACK and not config.metrics_port:
        what = f"metrics_host = {config.metrics_host!r} with metrics_port = 0: another port at each start, which no scraper finds"
        yield Finding(WARNING, "metrics", what, "set metrics_port, such as 9100")
    if config.demo.enabled and config.demo.address not in LOOPBACK and not config.demo.url:
        what = f"demo.address = {config.demo.address!r}, but its list names images by that address"
        yield Finding(WARNING, "demo", what, "set demo.url to the name by which fetchers reach it")
    if config.dataset.upkeep_s > UPKEEP_S:
        what = (
            f"dataset.upkeep_s = {config.dataset.upkeep_s:g}: takedowns and expiry may wait so long, and UpkeepOld complains after two days"
        )
        yield Finding(WARNING, "upkeep", what, f"set dataset.upkeep_s to {UPKEEP_S:g} or less")
