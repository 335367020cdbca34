"""What must not be fetched or learnt from: the selectors of the topic `takedowns`, and what they match.

A record's key names the selector by its hash: `url:<sha256>`, `host:<sha256>`, or `sha256:<digest of the image>`; so the log tells nobody what
was taken down, and still everyone who meets it can recognise it.  A host stands for all its subdomains.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

KINDS = ("url", "host", "sha256")


@dataclass(frozen=True)
class Selector:
    """Which images are meant."""

    kind: str  # url: exactly this one; host: with its subdomains; sha256: of the image's bytes, in hex
    digest: str

    @classmethod
    def of(cls, kind: str, value: str) -> "Selector":
        """Raises ValueError for what can match nothing."""
        value = value.strip()
        if kind == "sha256":
            if len(value) != 64 or any(c not in "0123456789abcdefABCDEF" for c in value):
                raise ValueError(f"sha256 {value[:80]!r}: must be 64 hexadecimal digits")
            return cls(kind, value.lower())
        if kind == "host":
            value = value.lower().strip(".")
        if kind not in KINDS or not value or (kind == "host" and any(c in "/:@ " for c in value)):
            raise ValueError(f"{kind} {value[:80]!r}: must be a whole url, a host without scheme and path, or a sha256")
        return cls(kind, _hash(value))

    @property
    def key(self) -> bytes:
        return f"{self.kind}:{self.digest}".encode()


class Denied:
    """A set of selectors, ready to be asked."""

    def __init__(self, keys: Iterable[bytes] = ()):
        self.keys = frozenset(keys)

    def __len__(self) -> int:
        return len(self.keys)

    def url(self, url: str) -> bool:
        """Whether this address may not be asked for."""
        return bool(self.keys) and (
            f"url:{_hash(url)}".encode() in self.keys or any(f"host:{h}".encode() in self.keys for h in _hosts(url))
        )

    def image(self, sha256: str) -> bool:
        """Whether an image with this digest may not be kept."""
        return f"sha256:{sha256}".encode() in self.keys

    def outcome(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a sidecar tells of such an image or address."""
        return any(self.url(row[name]) for name in ("url", "final_url") if row[name]) or self.image(row["sha256"])


def _hosts(url: str) -> list[str]:
    """Hashes of the host and of every domain above it."""
    try:
        host = (urlsplit(url).hostname or "").strip(".")
    except ValueError:
        return []
    parts = host.split(".") if host else []
    return [_hash(".".join(parts[i:])) for i in range(len(parts))]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
