"""What a backup takes of a home, a bucket, a table and a log."""

from collections.abc import Iterator
from pathlib import Path

from ingest.audit import fetched_topics
from ingest.pack import group_of
from streamlearn.contract.catalog import Listing
from streamlearn.contract.event_log import EventLog, SqliteLog, place_name

# of a home's own files: what its other parts are, and what a start makes anew
NOT_THE_HOMES = {"store", "registry", "log.sqlite", "log.sqlite-shm", "log.sqlite-wal"}
MADE_ANEW = {"cache", "features", "logs", "rewriting", "spool", "status", "transfers", "claims"}


def files_of(home: Path) -> Iterator[Path]:
    """A home's own files that a backup holds."""
    for top in sorted(home.iterdir()):
        if top.name in NOT_THE_HOMES | MADE_ANEW or top.name.startswith("."):
            continue
        inside = sorted(top.rglob("*")) if top.is_dir() else [top]
        yield from (p for p in inside if p.is_file() and not p.name.startswith(".") and p.suffix != ".tmp")


def unbroken(keys: list[str], prefix: str) -> list[str]:
    """Numbered objects up to the first gap: what was put while they were listed may be seen without what was put before it."""
    numbered = sorted((int(key.removeprefix(prefix).removesuffix(".json")), key) for key in keys if key.removeprefix(prefix)[:1].isdigit())
    return [key for i, (number, key) in enumerate(numbered) if number == numbered[0][0] + i]


def of_version(name: str, version: int) -> bool:
    """Whether a file of the table is of its version, or of an earlier one."""
    if "#" in name or name.endswith("_last_checkpoint"):  # staged; a shortcut that readers do without, and that may name a later version
        return False
    number = name.removeprefix("_delta_log/")[:20]
    return not name.startswith("_delta_log/") or (number.isdigit() and int(number) <= version)


def places(log: EventLog) -> Iterator[tuple[str, int, str]]:
    """(topic, partition, the catalog's name of the topic) of what fetchers read."""
    for topic in fetched_topics(log):
        for partition in range(log.partitions(topic)):
            yield topic, partition, place_name(log, topic)


def put_back(copy: SqliteLog, listing: Listing) -> None:
    """Units committed after the listing are not in the copy: their offsets are fetched again, and what is owed is told again."""
    for topic, partition, name in places(copy):
        position, done = listing.positions.get((name, partition), 0), copy.committed(group_of(copy), topic, partition)
        if done is not None and done > position:
            copy.commit(group_of(copy), {(topic, partition): position})
