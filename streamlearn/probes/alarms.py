"""When a label-free measure says `collapsed`.  Without torch: the report reads the limits too."""

from collections.abc import Mapping

# name -> (below, or above, which value it is raised).  reference/learning.md, 1.3 and 4: rank 1.5 to 3 whenever SwAV had stalled
ALARMS: dict[str, tuple[str, float]] = {
    "effective_rank": ("below", 3.0),
    "rankme": ("below", 3.0),
    "participation_ratio": ("below", 1.5),
    "uniformity": ("above", -0.05),
    "alpha_req": ("above", 5.0),
    "lidar": ("below", 2.0),
    "prototype_perplexity": ("below", 0.02),
    "code_entropy": ("above", 0.98),
}


def alarms(measured: Mapping[str, float]) -> list[str]:
    """Names of the measures that say `collapsed`; what was not measured, or is no number, says nothing."""
    raised = []
    for name, (side, limit) in ALARMS.items():
        value = measured.get(name)
        if value is not None and (value < limit if side == "below" else value > limit):
            raised.append(name)
    return raised
