"""A candidate: a reference to one image, as a connector found it.  JSON, at most 8 KiB, one record of the event log."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from streamlearn.contract.errors import Corrupt

SCHEMA = 1
MAX_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class Candidate:
    url: str  # http, https, or file for the folder connector
    source: str  # the connector's name
    source_ref: str  # where in the source: a line, a row, a path
    discovered_at: str  # RFC 3339 UTC
    license: str | None = None
    alt: str | None = None
    purpose: str = "new"  # new | refresh
    etag: str | None = None
    last_modified: str | None = None
    attempt: int = 0  # times deferred so far
    not_before: float | None = None  # unix seconds; a retry waits until then
    origin: str = ""  # topic/partition/offset of its first appearance, set when it is deferred

    def to_json(self) -> bytes:
        """Raises ValueError when the record would exceed 8 KiB."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v not in (None, "")}
        data = json.dumps({"schema": SCHEMA} | fields, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) > MAX_BYTES:
            raise ValueError(f"candidate {self.url[:100]!r}: {len(data)} bytes, over the cap of {MAX_BYTES}")
        return data

    @classmethod
    def from_json(cls, data: bytes) -> "Candidate":
        """Raises Corrupt for anything that is not a candidate of a schema known here."""
        try:
            raw: Any = json.loads(data)
            if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
                raise Corrupt(f"not a candidate of schema {SCHEMA}: {data[:100]!r}")
            fields: dict[str, Any] = {"source_ref": ""} | raw
            return cls(**fields)
        except (ValueError, TypeError) as e:
            raise Corrupt(f"not a candidate: {e}: {data[:100]!r}") from e


def politeness_key(url: str) -> bytes:
    """The host, lower case: one host's candidates share a partition, so its budget has one owner."""
    try:
        return (urlsplit(url).hostname or "").encode("idna", "replace") if url.isascii() else (urlsplit(url).hostname or "").encode()
    except (ValueError, UnicodeError):
        return b""  # not a URL: any partition will do, the fetcher refuses it
