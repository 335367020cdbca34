"""All that one page is made of, read once."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from streamlearn.contract.config import Config
from streamlearn.contract.durable import read_lines
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.status import read_status
from streamlearn.report.past import Document, Learnt, Line, document, fetched, figure, learnt, measured, with_recorded


@dataclass(frozen=True)
class Told:
    home: Path
    config: Config
    store: ObjectStore
    channels: Mapping[str, str]  # candidate, stable, best -> the digest it points to

    @cached_property
    def now(self) -> datetime:
        return datetime.now(UTC)

    @cached_property
    def status(self) -> dict[str, dict[str, Any]]:
        return read_status(self.home)

    @cached_property
    def learnt(self) -> Learnt:
        return learnt(self.home)

    @cached_property
    def continual(self) -> Document:
        return document(self.home / "continual.json", "probes", "prequential", schema="streamlearn.continual/1")

    @cached_property
    def drift(self) -> Document:
        return document(self.home / "drift" / "state.json", "sources", schema="streamlearn.drift/1")

    @cached_property
    def entries(self) -> list[Line]:
        """Of each snapshot and bank, by step."""
        return with_recorded(measured(self.home), self.continual.value)

    @cached_property
    def banks(self) -> dict[str, list[Line]]:
        """Bank -> its entries, by step; in the order of the configuration, then as they were first measured."""
        seen = {entry["bank"] for entry in self.entries}
        found: dict[str, list[Line]] = {bank.name: [] for bank in self.config.probe.banks if bank.name in seen}
        for entry in self.entries:
            found.setdefault(entry["bank"], []).append(entry)
        return found

    @cached_property
    def newest(self) -> list[Line]:
        """Each bank's newest entry with label-free measures."""
        return [rows[-1] for lines in self.banks.values() if (rows := [e for e in lines if "alarms" in e])]

    def told(self, role: str, name: str) -> Any:
        """Of the role's last heartbeat."""
        return self.status.get(role, {}).get(name)

    def tags(self, digest: str) -> list[str]:
        return [name for name, held in self.channels.items() if held == digest]

    @cached_property
    def fetched(self) -> Any:
        return fetched(self.home)

    @cached_property
    def quarters(self) -> list[tuple[float, str]]:
        """The demo's quarters, at the step that was being taken when they began."""
        found: list[tuple[float, str]] = []
        for line in read_lines(self.home / "history" / "demo.jsonl"):
            quarter = figure(line, "quarter")
            if line.get("event") == "quarter" and quarter:
                step = next((t["step"] for t in self.learnt.lines if str(t.get("at")) >= str(line.get("at"))), None)
                if step is not None:
                    found.append((int(step), f"q{quarter:.0f}"))
        return found[-12:]
