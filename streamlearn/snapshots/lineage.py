"""What a snapshot's annotations say of where it comes from."""

from streamlearn.contract.registry import Registry
from streamlearn.snapshots.artifact import LINEAGE


def quarter(when: str) -> str:
    """2026Q4, as `streamlearn dataset cut` names it by default; empty for no time."""
    return f"{when[:4]}Q{(int(when[5:7]) + 2) // 3}" if len(when) >= 7 else ""


def generation_of(registry: Registry, digest: str) -> str:
    """As annotated, else the quarter of the last image that was learnt."""
    marks = registry.manifest(digest)[1].get("annotations", {})
    return str(marks.get(LINEAGE + "generation") or quarter(marks.get(LINEAGE + "window", "").rpartition("/")[2]))
