"""What every connector does with a link: a candidate, or a refusal with its reason; and how it remembers what it has told.

What a source says is somebody else's text: too long, not text at all, or no URL.  None of it may raise, and none of it may make a record
that the log or a reader of it cannot hold.
"""

import base64
import hashlib
from collections.abc import Iterable

from ingest.connectors.base import Found
from ingest.fetch.guard import complaint
from streamlearn.contract.candidate import Candidate
from streamlearn.contract.status import now

ALT_CHARS, LICENSE_CHARS, REF_CHARS = 1000, 300, 800  # in UTF-8 at most 4 bytes each: a candidate is capped at 8 KiB
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif")
MARK_CHARS = 8  # of one mark


def text(value: object, limit: int) -> str:
    """What is left of `value` as text that every file can hold; empty for what is none.  At most `limit` characters."""
    return " ".join(value[: 4 * limit].encode("utf-8", "replace").decode().split())[:limit] if isinstance(value, str) else ""


def offer(
    found: Found, source: str, url: object, where: str, *, license: object = None, alt: object = None, etag: str | None = None
) -> None:
    """Adds a candidate to `found`, or a refusal.  Never raises: `url`, `license` and `alt` are whatever the source says."""
    where = text(where, REF_CHARS)
    if not isinstance(url, str) or url != url.encode("utf-8", "replace").decode():
        return refuse(found, where, repr(url)[:500], "the URL is not text")
    url = url.strip()
    if why := complaint(url):
        return refuse(found, where, url, why)
    candidate = Candidate(
        url=url,
        source=source,
        source_ref=where,
        discovered_at=now(),
        license=text(license, LICENSE_CHARS) or None,
        alt=text(alt, ALT_CHARS) or None,
        etag=etag,
    )
    try:
        candidate.to_json()
    except ValueError as e:
        return refuse(found, where, url, str(e))
    found.candidates.append(candidate)


def refuse(found: Found, where: str, what: str, why: str) -> None:
    found.refused.append((text(where, REF_CHARS), text(what, 500), text(why, 500)))


def mark(*parts: str) -> str:
    """Eight characters for what was told, 48 bits: among 10,000 marks one in 28 thousand million strangers is taken for known."""
    joined = "\0".join(parts).encode("utf-8", "replace")
    return base64.urlsafe_b64encode(hashlib.blake2b(joined, digest_size=6).digest()).decode()


class Marks:
    """The last `limit` marks, oldest first; in a cursor one string of 8 characters each."""

    def __init__(self, state: object, limit: int):
        whole = state if isinstance(state, str) else ""
        self.limit = limit
        self._marks = dict.fromkeys(whole[i : i + MARK_CHARS] for i in range(0, len(whole), MARK_CHARS))

    def __contains__(self, made: str) -> bool:
        return made in self._marks

    def add(self, made: Iterable[str]) -> None:
        """Adds, or makes young again; the oldest give way."""
        for one in made:
            self._marks.pop(one, None)
            self._marks[one] = None
        for old in list(self._marks)[: max(0, len(self._marks) - self.limit)]:
            del self._marks[old]

    def dump(self) -> str:
        return "".join(self._marks)
