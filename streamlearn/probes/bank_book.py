"""Banks registered by digest: `banks/<name>.json` in the home, one a bank, measured beside those of the configuration.

Adding: 1. read every image, digest them  2. create the file, if absent    <- THE COMMIT POINT.  Killed after 1: nothing is left.

The file holds a digest of every image, so that `verify` can say which have changed; the evaluator refuses a bank whose digest is another.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from streamlearn.contract import durable
from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.probes.bank_sources import Item
from streamlearn.probes.banks import choose, digest_of
from streamlearn.stream.decode import header

SCHEMA = "streamlearn.bank/1"
NAMED = 5  # changes that a complaint names


@dataclass(frozen=True)
class Registered:
    """One file of the book."""

    bank: BankConfig  # its digest is set
    classes: tuple[str, ...]
    multi: bool
    counts: dict[str, int]  # split -> images
    damaged: int  # images that cannot be decoded, and are left out of every measurement
    items: tuple[tuple[str, str, str], ...]  # split, where, sha256 of classes and bytes

    def to_json(self) -> bytes:
        plain = {"schema": SCHEMA, "bank": self.bank.model_dump(mode="json"), "classes": self.classes, "multi": self.multi}
        return json.dumps(plain | {"counts": self.counts, "damaged": self.damaged, "items": self.items}, indent=0).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Registered":
        try:
            raw: dict[str, Any] = json.loads(data)
            if raw["schema"] != SCHEMA:
                raise ValueError(f"schema {raw['schema']!r}, only {SCHEMA} is known here")
            items = tuple((str(a), str(b), str(c)) for a, b, c in raw["items"])
            return cls(BankConfig.model_validate(raw["bank"]), tuple(raw["classes"]), raw["multi"], raw["counts"], raw["damaged"], items)
        except (ValueError, TypeError, KeyError, ValidationError) as e:
            raise Corrupt(f"{where}: not a registered bank: {e}; delete it and add the bank again") from e


class BankBook:
    def __init__(self, home: Path):
        self.folder = home / "banks"
        self._known: dict[Path, tuple[int, Registered]] = {}  # when it was written (ns), and what it said

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def add(self, config: BankConfig) -> Registered:
        """Register a bank as it is now; adding it again unchanged is harmless.  Raises ConfigError where the name stands for another."""
        made = survey(config)
        path = self.path(config.name)
        if not durable.create(path, made.to_json()):
            held = self.get(config.name)
            if held.bank != made.bank:
                raise ConfigError(
                    f"probe bank {config.name}: {path} registers another ({held.bank.digest[:19]}… from {held.bank.train}); "
                    "choose another name: results of both would be mixed up"
                )
        return made

    def get(self, name: str) -> Registered:
        try:
            return Registered.from_json(self.path(name).read_bytes(), str(self.path(name)))
        except FileNotFoundError:
            known = ", ".join(p.stem for p in self._files()) or "none"
            raise ConfigError(
                f"probe bank {name}: not registered; registered are: {known}; `streamlearn banks add` registers one"
            ) from None

    def all(self) -> list[Registered]:
        """By name.  A file is parsed once: the evaluator asks every few seconds."""
        found = []
        for path in self._files():
            written = path.stat().st_mtime_ns
            if self._known.get(path, (0, None))[0] != written:
                self._known[path] = (written, Registered.from_json(path.read_bytes(), str(path)))
            found.append(self._known[path][1])
        return found

    def verify(self, name: str) -> Registered:
        """Read every image again.  Raises ConfigError that names what has changed."""
        held = self.get(name)
        now = survey(held.bank.model_copy(update={"digest": ""}))
        if now.bank.digest != held.bank.digest:
            # without a test set, an image that has changed may have changed sides
            sides = bool(held.bank.test)
            before, after = ({(split if sides else "", where): sha for split, where, sha in r.items} for r in (held, now))
            changed = [f"{where} has changed" for (side, where), sha in after.items() if before.get((side, where), sha) != sha]
            gone = [f"{where} has gone" for side, where in before if (side, where) not in after]
            new = [f"{where} is new" for side, where in after if (side, where) not in before]
            found = changed + gone + new or ["the order of the images"]
            raise ConfigError(
                f"probe bank {name}: {held.bank.train}: not what was registered: {'; '.join(found[:NAMED])}"
                f"{f'; and {len(found) - NAMED} more' if len(found) > NAMED else ''}; restore it, or register it under another name"
            )
        return now

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))


def survey(config: BankConfig) -> Registered:
    """Read every image of a bank.  Raises ConfigError."""
    chosen = choose(config)
    items: list[tuple[str, str, str]] = []
    damaged = 0

    def look(split: str, item: Item, data: bytes) -> None:
        nonlocal damaged
        marks = repr((sorted(item.classes), sorted(item.ignored))).encode()
        items.append((split, item.where, hashlib.sha256(marks + data).hexdigest()))
        try:
            header(data)
        except Corrupt:
            damaged += 1

    digest = digest_of(config, chosen, look)
    counts = {"train": len(chosen.train.chosen), "test": len(chosen.test.chosen)}
    return Registered(config.model_copy(update={"digest": digest}), chosen.classes, chosen.multi, counts, damaged, tuple(items))
