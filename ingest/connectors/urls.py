"""A list of URLs: text (one a line, # comments), CSV with a header, or parquet.

The cursor is a byte of a text or CSV file, a row of a parquet.  With `follow`, a growing text or CSV file is read on; only whole
lines count, so a line that is being written waits.  Columns `license` and `alt` (or `caption`, `text`) are taken along where they exist.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.connectors.base import BATCH, Cursor, Found
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.config import ConnectorConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.status import now

ALT = ("alt", "caption", "text", "TEXT")


class UrlsConnector:
    def __init__(self, config: ConnectorConfig):
        self.config, self.path = config, Path(config.path)

    def check(self) -> None:
        suffix = self.path.suffix.lower()
        if suffix not in (".txt", ".csv", ".parquet"):
            raise ConfigError(f"connector {self.config.name}: path = {self.config.path!r}: a list of URLs is .txt, .csv or .parquet")
        if not self.path.exists():
            if self.config.follow and suffix != ".parquet":
                return  # it may come yet
            raise ConfigError(f"connector {self.config.name}: path = {self.config.path!r}: no such file")
        columns = self._columns(suffix)
        if columns is not None and self.config.url_column not in columns:
            raise ConfigError(
                f"connector {self.config.name}: {self.path}: no column {self.config.url_column!r}; there are {', '.join(columns)}; set url_column"
            )

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        if not self.path.exists():
            return
        if self.path.suffix.lower() == ".parquet":
            yield from self._parquet(int(cursor["row"]) if cursor else 0)
        else:
            yield from self._lines(int(cursor["byte"]) if cursor else 0)

    def _columns(self, suffix: str) -> list[str] | None:
        if suffix == ".txt":
            return None
        try:
            if suffix == ".parquet":
                return list(pq.read_schema(self.path).names)
            with self.path.open(newline="", encoding="utf-8-sig") as f:
                return next(csv.reader(f), [])
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"connector {self.config.name}: {self.path}: cannot be read: {e}") from e

    def _lines(self, start: int) -> Iterator[Found]:
        columns = self._columns(self.path.suffix.lower())
        found = Found()
        with self.path.open("rb") as f:
            if columns is not None and start == 0:
                f.readline()
            else:
                f.seek(start)
            while (raw := f.readline()).endswith(b"\n") or (raw and not self.config.follow):
                at = f.tell()
                self._line(raw, f"byte {at - len(raw)}", columns, found)
                found.cursor = {"byte": at}
                if len(found) >= BATCH:
                    yield found
                    found = Found()
        if found.cursor:
            yield found

    def _line(self, raw: bytes, where: str, columns: list[str] | None, found: Found) -> None:
        text = raw.decode("utf-8", "replace").lstrip("\ufeff").strip()
        if not text or (columns is None and text.startswith("#")):
            return
        fields = {"url": text} if columns is None else dict(zip(columns, next(csv.reader([text]), []), strict=False))
        self._add(fields, "url" if columns is None else self.config.url_column, where, found)

    def _parquet(self, start: int) -> Iterator[Found]:
        file = pq.ParquetFile(self.path)
        wanted = [c for c in (self.config.url_column, "license", *ALT) if c in file.schema_arrow.names]
        row = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row + count > start:
                rows = file.read_row_group(group, columns=wanted).slice(max(0, start - row)).to_pylist()
                at = max(row, start)
                for begin in range(0, len(rows), BATCH):
                    found = Found()
                    for i, fields in enumerate(rows[begin : begin + BATCH]):
                        self._add(fields, self.config.url_column, f"row {at + begin + i}", found)
                    found.cursor = {"row": at + min(begin + BATCH, len(rows))}
                    yield found
            row += count

    def _add(self, fields: Mapping[str, Any], column: str, where: str, found: Found) -> None:
        url = str(fields.get(column) or "").strip()
        alt = next((str(fields[c]) for c in ALT if fields.get(c)), None)
        license_ = str(fields["license"]) if fields.get("license") else None
        try:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise ValueError("not an http or https URL")
            candidate = Candidate(url=url, source=self.config.name, source_ref=where, discovered_at=now(), license=license_, alt=alt)
            candidate.to_json()
        except ValueError as e:
            found.refused.append((where, url[:500], str(e)))
        else:
            found.candidates.append(candidate)
