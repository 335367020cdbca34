"""What a request may be told, and what is counted of it.

Every refusal is a Refused with an HTTP status; app.py words it as the client's protocol has it.  Damage on the disk is a Corrupt, counted
where it is worded.
"""

import re
from dataclasses import dataclass, field

from streamlearn.contract.errors import StreamlearnError

REASONS = {400: "malformed", 401: "unauthorized", 403: "forbidden", 404: "unknown", 405: "read_only", 416: "out_of_range"}
VERSION = re.compile(r"0\.[0-9]+\.0")
COMMIT = re.compile(r"[0-9a-f]{40}")  # what Hugging Face's clients call a revision: the first 40 letters of a manifest's digest
RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
CHANNELS = ("candidate", "stable", "best")


@dataclass(eq=False)  # an exception is itself, and hashable
class Refused(StreamlearnError):
    """`code`: the protocol's own word, where it has a better one than the status's."""

    status: int
    message: str
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def label(reference: str) -> str:
    """The closed set of metrics.PULLED_AS."""
    if reference in CHANNELS:
        return reference
    if VERSION.fullmatch(reference):
        return "version"
    return "digest" if reference.startswith("sha256:") or COMMIT.fullmatch(reference) else "other"


def asked_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(first, last) byte of a Range; None for the whole, which a server may send for what it does not understand (RFC 9110, 14.2).

    Raises Refused 416 where no byte of it is there.
    """
    match = RANGE.fullmatch((header or "").strip())
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":  # the last so many
        first, last = max(size - int(match[2]), 0), size - 1
    else:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
        if match[2] and int(match[2]) < int(match[1]):
            return None  # not a range at all
    if first > last:
        raise Refused(416, f"no byte of {header} is there: the size is {size}", headers={"Content-Range": f"bytes */{size}"})
    return first, last
