"""A candidate: a reference to one image, as a connector found it.  JSON, at most 8 KiB, one record of the event log."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from yarl import URL

from streamlearn.contract.errors import Corrupt

SCHEMA = 1
MAX_BYTES = 8192  # as a connector tells it
REFRESH = "refresh"  # the purpose of asking again for what is stored
VIA_CHARS = 2048  # of the longest address that is handed over; ASCII
ROOM = 1024 + VIA_CHARS  # bytes that a retry may add to it


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
    sha256: str = ""  # of the bytes that are stored, for a refresh
    attempt: int = 0  # times asked for in vain so far
    waits: int = 0  # times put off without being asked for: it was not the host's turn
    not_before: float | None = None  # unix seconds; a retry waits until then
    origin: str = ""  # topic/partition/offset of its first appearance, set when it is deferred
    via: str = ""  # where redirects have led, to a host that another owner asks: that one goes on from here
    hops: int = 0  # redirects on the way there

    def to_json(self, limit: int = MAX_BYTES) -> bytes:
        """Raises ValueError when the record would exceed its limit, or holds what is no text."""
        told = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        fields = {field.name: value for field, value in told if value not in (None, "") or value != field.default}
        data = json.dumps({"schema": SCHEMA} | fields, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) > limit:
            raise ValueError(f"candidate {self.url[:100]!r}: {len(data)} bytes, over the cap of {limit}")
        return data

    @classmethod
    def from_json(cls, data: bytes) -> "Candidate":
        """Raises Corrupt for anything that is not a candidate of a schema known here.  Anybody may write to a topic."""
        if len(data) > MAX_BYTES + ROOM:
            raise Corrupt(f"not a candidate: {len(data)} bytes, over the cap of {MAX_BYTES + ROOM}")
        try:
            raw: Any = json.loads(data)
            if not isinstance(raw, dict) or raw.pop("schema", None) != SCHEMA:
                raise Corrupt(f"not a candidate of schema {SCHEMA}: {data[:100]!r}")
            fields: dict[str, Any] = {"source_ref": ""} | raw
            for name, value in fields.items():
                if not _fits(name, value):
                    raise Corrupt(f"not a candidate: {name} = {str(value)[:100]!a}")
            return cls(**fields)
        except (ValueError, TypeError, RecursionError) as e:
            raise Corrupt(f"not a candidate: {e}: {data[:100]!r}") from e


_COUNTS, _OPTIONAL = {"attempt", "waits", "hops"}, {"license", "alt", "etag", "last_modified", "not_before"}


def _fits(name: str, value: object) -> bool:
    """Whether a field may hold this; text must be text that every file can hold (no lone surrogates)."""
    if value is None:
        return name in _OPTIONAL
    if name == "not_before":
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name in _COUNTS:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value))


def politeness_key(url: str) -> bytes:
    """Who is asked: one host's candidates share a partition number, so its budget has one owner."""
    try:
        return host_of(URL(url)).encode()
    except ValueError:
        return b""  # not a URL: any partition will do, the fetcher refuses it


def host_of(url: URL) -> str:
    """One key for every spelling of a host (case, IDNA, final dot), whatever the port."""
    return (url.raw_host or "").lower().rstrip(".")
