"""Where a bank's images lie: an image folder, a parquet file, webdataset shards.  First what there is, then the bytes of what is wanted.

Reading is in two passes, because a bank is drawn evenly from its classes and may be far smaller than what it is drawn from: `items` tells
labels without touching an image, `read` streams the bytes of the chosen ones, in order.
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.errors import ConfigError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
ROWS = 1024  # of a parquet in memory at a time


@dataclass(frozen=True)
class Item:
    """One labelled image, not yet read."""

    where: str  # file, row or member, for complaints
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()  # of a multi-label bank: classes that are not judged here


class Source(Protocol):
    multi: bool  # images have any number of classes
    items: list[Item]

    def read(self, wanted: Sequence[int]) -> Iterator[bytes]:
        """The encoded images of these items; `wanted` rises.  Raises ConfigError naming the file."""


def open_source(config: BankConfig, name: str) -> Source:
    """Raises ConfigError that names bank, file and remedy."""
    path, who = Path(name), f"probe bank {config.name}"
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        return TarSource(config, who, shards) if shards else FolderSource(who, path)
    if path.suffix == ".parquet":
        return ParquetSource(config, who, path)
    if path.suffix == ".tar":
        return TarSource(config, who, [path])
    raise ConfigError(
        f"{who}: {name}: neither a folder with one sub-folder a class, nor a .parquet file, nor webdataset shards (.tar, or a folder of them)"
    )


class FolderSource:
    """One sub-folder a class."""

    multi = False

    def __init__(self, who: str, root: Path):
        self.who = who
        self.paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS)
        self.items = [Item(str(p.relative_to(root)), (p.relative_to(root).parts[0],)) for p in self.paths]
        loose = [p.name for p in self.paths if p.parent == root]
        if loose:
            raise ConfigError(
                f"{who}: {root / loose[0]}: lies in no class ({len(loose)} such); move it to the sub-folder of its class, or away"
            )

    def read(self, wanted: Sequence[int]) -> Iterator[bytes]:
        for i in wanted:
            try:
                yield self.paths[i].read_bytes()
            except OSError as e:
                raise ConfigError(f"{self.who}: {self.paths[i]}: {e.strerror}; it was there a moment ago") from e


class ParquetSource:
    """A column of bytes, a column of labels (plain: one class an image; lists: any number)."""

    def __init__(self, config: BankConfig, who: str, path: Path):
        self.who, self.path, self.column = who, path, config.image_column
        columns = [config.label_column, *([config.ignore_column] if config.ignore_column else [])]
        try:
            schema = pq.read_schema(path)
            for column in (self.column, *columns):
                if column not in schema.names:
                    raise ConfigError(f"{who}: {path}: no column {column!r}; there are {', '.join(schema.names)}")
            table = pq.read_table(path, columns=columns)
        except (pa.ArrowException, OSError) as e:
            raise ConfigError(f"{who}: {path}: not a readable parquet: {e}") from e
        self.multi = pa.types.is_list(schema.field(columns[0]).type) or pa.types.is_large_list(schema.field(columns[0]).type)
        labels = table.column(columns[0]).to_pylist()
        ignored = table.column(columns[1]).to_pylist() if config.ignore_column else [()] * len(labels)
        self.items = [
            _item(f"row {i}", label, out, self.multi, f"{who}: {path}") for i, (label, out) in enumerate(zip(labels, ignored, strict=True))
        ]

    def read(self, wanted: Sequence[int]) -> Iterator[bytes]:
        chosen, first = set(wanted), 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(ROWS, columns=[self.column]):
                    here = [i for i in range(first, first + len(batch)) if i in chosen]
                    for i, value in zip(
                        here, batch.column(0).take(pa.array([i - first for i in here], pa.int64())).to_pylist(), strict=True
                    ):
                        # datasets of Hugging Face have {"bytes": ..., "path": ...}
                        data = value.get("bytes") if isinstance(value, dict) else value
                        if not isinstance(data, bytes):
                            raise ConfigError(
                                f"{self.who}: {self.path}: row {i}: {self.column} holds no bytes; name the column of encoded images"
                            )
                        yield data
                    first += len(batch)
        except (pa.ArrowException, OSError) as e:
            raise ConfigError(f"{self.who}: {self.path}: not a readable parquet: {e}") from e


class TarSource:
    """Webdataset: members of one base name are a sample; `.cls` (text) or `.json` (label_column) says its class."""

    def __init__(self, config: BankConfig, who: str, shards: Sequence[Path]):
        self.who = who
        self.items: list[Item] = []
        self.places: list[tuple[Path, int, int]] = []  # shard, first byte, bytes
        kinds = set()
        for shard in shards:
            for key, parts in self._samples(shard):
                image = next((parts[ext] for ext in parts if f".{ext.rpartition('.')[2]}" in EXTENSIONS), None)
                if image is None:
                    raise ConfigError(f"{who}: {shard}: sample {key}: no image in it; it has .{', .'.join(parts)}")
                label, ignored = self._label(config, shard, key, parts)
                kinds.add(isinstance(label, list))
                self.items.append(_item(f"{shard.name}:{key}", label, ignored, isinstance(label, list), f"{who}: {shard}"))
                self.places.append((shard, image.offset_data, image.size))
        if len(kinds) > 1:
            raise ConfigError(f"{who}: {shards[0]}: some labels are lists and some are not; make all of them lists")
        self.multi = True in kinds

    def _samples(self, shard: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
        found: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    base, _, ext = name.partition(".")
                    if member.isfile() and base and ext:
                        found.setdefault(f"{folder}/{base}" if folder else base, {})[ext.lower()] = member
        except (tarfile.TarError, OSError, EOFError) as e:
            raise ConfigError(f"{self.who}: {shard}: not a readable webdataset shard: {e}; make it anew, or name another") from e
        yield from found.items()

    def _label(self, config: BankConfig, shard: Path, key: str, parts: dict[str, tarfile.TarInfo]) -> tuple[Any, Any]:
        where = f"{self.who}: {shard}: sample {key}"
        if "json" in parts:
            try:
                raw = json.loads(_bytes(shard, parts["json"].offset_data, parts["json"].size))
            except ValueError as e:
                raise ConfigError(f"{where}: its .json is not JSON: {e}") from e
            if isinstance(raw, dict) and config.label_column in raw:
                return raw[config.label_column], raw.get(config.ignore_column) or ()
        if "cls" in parts:
            return _bytes(shard, parts["cls"].offset_data, parts["cls"].size).decode(errors="replace").strip(), ()
        raise ConfigError(f"{where}: no label: neither {config.label_column!r} in its .json nor a .cls; set label_column, or add it")

    def read(self, wanted: Sequence[int]) -> Iterator[bytes]:
        for i in wanted:
            shard, start, size = self.places[i]
            try:
                yield _bytes(shard, start, size)
            except OSError as e:
                raise ConfigError(f"{self.who}: {shard}: {e.strerror}; it was there a moment ago") from e


def _bytes(path: Path, start: int, size: int) -> bytes:
    with path.open("rb") as f:
        f.seek(start)
        return f.read(size)


def _item(where: str, label: Any, ignored: Any, multi: bool, who: str) -> Item:
    if label is None or (multi and not isinstance(label, list)):
        raise ConfigError(f"{who}: {where}: label {label!r}; every image needs one{' (a list, perhaps an empty one)' if multi else ''}")
    classes = tuple(dict.fromkeys(str(x) for x in label)) if multi else (str(label),)
    return Item(where, classes, tuple(dict.fromkeys(str(x) for x in ignored or () if str(x) not in classes)))
