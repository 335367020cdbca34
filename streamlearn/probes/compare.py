"""Two snapshots on the same images: what a gate asks before it moves a tag."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from streamlearn.contract.registry import Registry
from streamlearn.probes.statistics import mcnemar, unpacked
from streamlearn.snapshots.publish import results


def compare(registry: Registry, one: str, other: str) -> list[dict[str, Any]]:
    """A row for each bank (by digest), protocol and probe that both were measured by; `other` minus `one`.

    Exact McNemar test where the answers were recorded (single-label banks); else only the two figures with their intervals.
    """
    return [row for a, b in _common(registry, one, other) for row in _rows(a, b)]


def _common(registry: Registry, one: str, other: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    found = {(r["bank_digest"], r["protocol"]): r for r in results(registry, registry.manifest(other)[0].digest)}
    for result in results(registry, registry.manifest(one)[0].digest):
        key = result["bank_digest"], result["protocol"]
        if key in found:
            yield result, found[key]


def _rows(a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for probe in (name.removesuffix("_low") for name in a if name.endswith("_low")):
        head = {
            "bank": a["bank"],
            "bank_digest": a["bank_digest"],
            "protocol": a["protocol"],
            "probe": probe,
            "one": a[probe],
            "other": b[probe],
        }
        if probe in a.get("right", {}) and probe in b.get("right", {}) and a["images"] == b["images"]:
            yield head | asdict(mcnemar(*(unpacked(r["right"][probe], r["images"]) for r in (a, b))))
        else:
            intervals = {f"{name}_interval": [r[f"{probe}_low"], r[f"{probe}_high"]] for name, r in (("one", a), ("other", b))}
            yield head | {"difference": b[probe] - a[probe]} | intervals
