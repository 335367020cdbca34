"""Lists of URLs: text (one a line, # comments), CSV with a header, or parquet: one file, a folder of parts, or a glob of them.

The cursor is a byte of a text or CSV file, in which a record is a line; of parquet, the parts that are done, the one being read, and its row.
Parts are read in the order of their names, and one that is added later is read too, wherever its name stands.  With `follow`, a growing text or
CSV file is read on; only whole lines count, so a line that is being written waits.  Columns of licence and caption are taken along where they
exist, by the names that img2dataset, LAION, COYO and DataComp give them.

What is broken: a line, a row or a group of rows is refused with its place, and reading goes on behind it.  A part whose end is not there, or that
the system cannot read, may be on its way: it is tried again, and holds up no other.
"""

import csv
import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from ingest.connectors.base import BATCH, Cursor, Found, LocalPath
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import Section
from streamlearn.contract.errors import ConfigError, Retryable
from streamlearn.contract.status import now

URL = ("url", "URL", "image_url", "img_url", "imageUrl", "IMAGE_URL", "photo_image_url")  # the first that is there
ALT = ("alt", "TEXT", "caption", "text", "CAPTION", "alt_text")
LICENSE = ("license", "LICENSE", "licence")
MAX_LINE = 2**17  # bytes; Python's csv reads no longer field
MAX_PARTS = 4096  # the cursor names those that are done, and is one record of the log


class UrlsOptions(Section):
    """A list of URLs."""

    path: LocalPath = Field(min_length=1, description="a .txt, .csv or .parquet file; a folder of parquet parts; a glob of them")
    url_column: str = Field(default="", description="of CSV and parquet; empty: url, URL, image_url or another usual name")
    follow: bool = Field(default=True, description="keep reading a list that grows; false: its last line may lack its end")


class UrlsConnector:
    Options = UrlsOptions

    def __init__(self, name: str, options: UrlsOptions):
        self.name, self.options, self.path = name, options, Path(options.path)
        self.lines = self.path.suffix.lower() in (".txt", ".csv") and not glob.has_magic(options.path)

    def check(self) -> None:
        parts = [] if self.lines else list(self._parts().values())
        if not self.lines and self.path.suffix.lower() != ".parquet" and not self.path.is_dir():
            raise self._wrong("a list of URLs is .txt, .csv or .parquet, or a folder or glob of parquet files")
        if len(parts) > MAX_PARTS:
            raise self._wrong(f"{len(parts)} parts, over {MAX_PARTS}: give them to several connectors")
        if not (self.path.exists() if self.lines else parts):
            if self.options.follow and (self.lines or self.path.is_dir()):
                return  # it may come yet
            raise self._wrong("no such file")
        first = self.path if self.lines else parts[0]
        columns = self._columns(first)
        if columns is not None and self._url_column(columns) is None:
            wanted = repr(self.options.url_column) if self.options.url_column else f"of URLs ({', '.join(URL)})"
            raise ConfigError(f"connector {self.name}: {first}: no column {wanted}; there are {', '.join(columns)}; set url_column")

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        if not self.lines:
            yield from self._all_parts(cursor or {})
        elif self.path.exists():
            yield from self._lines(int(cursor["byte"]) if cursor else 0)

    def close(self) -> None:
        """Nothing is held open."""

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"connector {self.name}: path = {self.options.path!r}: {why}")

    def _url_column(self, columns: list[str]) -> str | None:
        return next((c for c in ([self.options.url_column] if self.options.url_column else URL) if c in columns), None)

    def _columns(self, path: Path) -> list[str] | None:
        """Raises ConfigError.  None: plain text has none."""
        suffix = path.suffix.lower()
        if suffix == ".txt":
            return None
        try:
            if suffix == ".parquet":
                return list(pq.read_schema(path).names)
            with path.open("rb") as f:
                first = f.readline(2 * MAX_LINE).decode("utf-8-sig", "replace").rstrip("\r\n")
            return next(csv.reader([first]), [])
        except (pa.ArrowException, OSError, csv.Error) as e:
            raise ConfigError(f"connector {self.name}: {path}: cannot be read: {e}") from e

    def _lines(self, start: int) -> Iterator[Found]:
        columns = self._columns(self.path)
        column = "url" if columns is None else self._url_column(columns)
        found = Found()
        with self.path.open("rb") as f:
            if columns is not None and start == 0:
                f.readline()
            else:
                f.seek(start)
            place = f.tell()
            while (raw := self._whole_line(f)) is not None:
                self._line(raw, f"byte {place}", columns, column, found)
                place = f.tell()
                found.cursor = {"byte": place}
                if len(found) >= BATCH:
                    yield found
                    found = Found()
        if found.cursor:
            yield found

    def _whole_line(self, f: BinaryIO) -> bytes | None:
        """The next one; of an overlong one the beginning, with `f` at its end.  None at the file's end, or where one is being written."""
        line = piece = f.readline(MAX_LINE + 1)
        while len(piece) > MAX_LINE and not piece.endswith(b"\n"):
            piece = f.readline(MAX_LINE + 1)
        return line if piece.endswith(b"\n") or (line and not self.options.follow) else None

    def _line(self, raw: bytes, where: str, columns: list[str] | None, column: str | None, found: Found) -> None:
        text = raw.decode("utf-8", "replace").lstrip("\ufeff").strip()
        if not text or (columns is None and text.startswith("#")):
            return
        if len(raw) > MAX_LINE:
            found.refused.append((where, text[:500], f"a line over {MAX_LINE} bytes"))
            return
        try:
            fields = {"url": text} if columns is None else dict(zip(columns, next(csv.reader([text]), []), strict=False))
        except csv.Error as e:
            found.refused.append((where, text[:500], f"no line of CSV: {e}"))
            return
        self._add(fields, column, where, found)

    def _parts(self) -> dict[str, Path]:
        """Name -> file, in the order of the names."""
        if self.path.is_dir():
            found = {p.relative_to(self.path): p for p in sorted(self.path.rglob("*.parquet")) if p.is_file()}
            return {n.as_posix(): p for n, p in found.items() if not any(part[0] in "._" for part in n.parts)}  # Spark's unfinished ones
        if self.path.is_file() or not glob.has_magic(self.options.path):
            return {"": self.path} if self.path.is_file() else {}
        named = sorted(p for p in glob.glob(self.options.path, recursive=True) if p.lower().endswith(".parquet"))  # noqa: PTH207
        return {p: Path(p) for p in named}

    def _all_parts(self, cursor: Cursor) -> Iterator[Found]:
        """The part that was being read, then the others by name.  One that cannot be read is left for last, and for the next time."""
        parts, done, unread = self._parts(), list(cursor.get("done", [])), list[str]()
        begun = str(cursor.get("file", ""))
        over = set(done)
        for name in sorted((n for n in parts if n not in over), key=lambda n: (n != begun, n)):
            start = int(cursor.get("row", 0)) if name == begun else 0
            try:
                with pq.ParquetFile(parts[name]) as file:
                    rows = file.metadata.num_rows
                    for found, row in self._rows(file, start, f"{name} row" if name else "row"):
                        whole = name and row == rows
                        found.cursor = (
                            {"done": [*done, name]} if whole else {"done": done, "file": name, "row": row} if name else {"row": row}
                        )
                        yield found
            except (pa.ArrowException, OSError, ConfigError) as e:
                unread.append(f"{parts[name]}: {e}")
                continue
            if name:
                done = [*done, name]
                if start >= rows:  # nothing was left of it, or it is empty
                    yield Found(cursor={"done": done})
        if unread:
            raise Retryable(f"connector {self.name}: cannot be read: {'; '.join(unread)}", after_s=10.0)

    def _rows(self, file: pq.ParquetFile, start: int, place: str) -> Iterator[tuple[Found, int]]:
        """Batches from a row on, each with the row after it."""
        columns = list(file.schema_arrow.names)
        column = self._url_column(columns)
        if column is None:
            raise ConfigError(f"no column of URLs; there are {', '.join(columns)}")
        wanted = [c for c in dict.fromkeys((column, *LICENSE, *ALT)) if c in columns]
        end = 0
        for group in range(file.num_row_groups):
            begin, end = max(start, end), end + file.metadata.row_group(group).num_rows
            if end <= start:
                continue
            try:
                rows = _plain(file.read_row_group(group, columns=wanted))
            except (pa.ArrowException, OSError) as e:
                if isinstance(e, OSError) and e.errno is not None:  # the system's; Arrow's own, of a broken page, has none
                    raise
                yield (
                    Found(refused=[(f"{place} {begin}", f"{end - begin} rows, to {end - 1}", f"group {group} cannot be read: {e}"[:500])]),
                    end,
                )
                continue
            for at in range(begin, end, BATCH):
                found = Found()
                for i, fields in enumerate(rows.slice(at - end + rows.num_rows, min(BATCH, end - at)).to_pylist(), at):
                    self._add(fields, column, f"{place} {i}", found)
                yield found, min(at + BATCH, end)

    def _add(self, fields: Mapping[str, Any], column: str | None, where: str, found: Found) -> None:
        said = {name: _text(value) for name, value in fields.items()}
        url = said.get(column or "", "").strip()
        alt = next((said[c] for c in ALT if said.get(c)), None)
        license_ = next((said[c] for c in LICENSE if said.get(c, "?") not in ("", "?")), None)  # LAION writes ? for unknown
        try:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError("not an http or https URL")
            candidate = Candidate(url=url, source=self.name, source_ref=where, discovered_at=now(), license=license_, alt=alt)
            candidate.to_json()
        except ValueError as e:
            found.refused.append((where, url[:500], str(e)))
        else:
            found.candidates.append(candidate)


def _plain(table: pa.Table) -> pa.Table:
    """Texts as bytes: what is no UTF-8 is one row's trouble, not its group's."""
    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            table = table.set_column(
                i, field.name, table.column(i).cast(pa.large_binary() if pa.types.is_large_string(field.type) else pa.binary())
            )
    return table


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)
