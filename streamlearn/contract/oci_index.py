"""index.json of an OCI image layout, in memory: what is looked up often is a dictionary, and one change costs one change.

Every entry keeps its own JSON, so that writing the index of thousands of snapshots joins texts and encodes only what is new.  A value of
this class never changes: `put` and `without` give another, which shares the entries.

An entry of ours says in an annotation whether its manifest refers to another one (SUBJECT: a digest, or empty), so that referrers are
found in this one file.  Entries that other tools wrote do not; `referring` asks for those, once.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

REF_NAME = "org.opencontainers.image.ref.name"
SUBJECT = "org.streamlearn.subject"
Key = tuple[str, str]  # (tag, "") or ("", digest)


@dataclass(frozen=True)
class Row:
    entry: Mapping[str, Any]

    @cached_property
    def text(self) -> bytes:
        """Made when the index is first written: who only reads has no need of it."""
        return encode(self.entry)

    @property
    def digest(self) -> str:
        return str(self.entry["digest"])

    @property
    def annotations(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.entry.get("annotations") or {}
        return found


def encode(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Index:
    """The manifests of a layout, in the order they came: one row a tag, and one for each manifest without."""

    def __init__(self, head: Mapping[str, Any], rows: dict[Key, Row], referring: dict[str, tuple[Key, ...]] | None = None):
        self.head, self.rows, self._referring = head, rows, referring

    @classmethod
    def parse(cls, data: bytes) -> "Index":
        """Raises ValueError, KeyError or TypeError where it is none."""
        raw = json.loads(data)
        entries = raw["manifests"]
        if not isinstance(entries, list):
            raise TypeError("manifests is not a list")
        rows = (Row(entry) for entry in entries)
        return cls({k: v for k, v in raw.items() if k != "manifests"}, {key_of(row): row for row in rows})

    def encoded(self) -> bytes:
        fields = {k: encode(v) for k, v in self.head.items()} | {"manifests": b"[%s]" % b",".join(row.text for row in self.rows.values())}
        return b"{%s}" % b",".join(b"%s:%s" % (encode(k), fields[k]) for k in sorted(fields))

    def names(self) -> list[str]:
        return sorted(name for name, _ in self.rows if name)

    def tagged(self, name: str) -> Row | None:
        return self.rows.get((name, ""))

    def lists(self, digest: str) -> bool:
        return ("", digest) in self.rows or any(row.digest == digest for row in self.rows.values())

    def put(self, entry: Mapping[str, Any]) -> "Index":
        """With this entry, last; the one of the same tag (or of the same digest, if it has none) is gone."""
        row = Row(entry)
        shrunk = self.without([key_of(row)])
        shrunk.rows[key_of(row)] = row
        subject = row.annotations.get(SUBJECT)
        if subject is None:
            shrunk._referring = None
        elif subject and shrunk._referring is not None:
            shrunk._referring[subject] = (*shrunk._referring.get(subject, ()), key_of(row))
        return shrunk

    def without(self, keys: Iterable[Key]) -> "Index":
        rows, referring = dict(self.rows), None if self._referring is None else dict(self._referring)
        for key in keys:
            gone = rows.pop(key, None)
            subject = gone.annotations.get(SUBJECT) if gone else ""
            if subject is None:
                referring = None  # under whom it stood is not known here
            elif referring is not None and subject in referring:
                referring[subject] = tuple(k for k in referring[subject] if k != key)
        return Index(self.head, rows, referring)

    def referring(self, subject_of: Callable[[Row], str]) -> Mapping[str, tuple[Key, ...]]:
        """Digest -> rows whose manifest refers to it.  `subject_of` is asked about rows that do not say."""
        if self._referring is None:
            found: dict[str, list[Key]] = {}
            for key, row in self.rows.items():
                told = row.annotations.get(SUBJECT)
                subject = subject_of(row) if told is None else told
                if subject:
                    found.setdefault(subject, []).append(key)
            self._referring = {subject: tuple(keys) for subject, keys in found.items()}
        return self._referring


def key_of(row: Row) -> Key:
    name = row.annotations.get(REF_NAME, "")
    return (name, "") if name else ("", row.digest)
