"""Beginning as something that was learnt elsewhere, instead of at random.  Happens once, at step 0 of a home that has no checkpoint.

The trunk must fit whole: every tensor there, every shape right.  Projection head and prototypes come too where `train.init_parts` is "all".
Optimizer, queue, learning rate and counters begin as ever.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamlearn.contract.config import Config
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.export import WarmStart
from streamlearn.learn.backbones.regnet import REGNETY
from streamlearn.learn.state import TrainState

COUNTERS = ".num_batches_tracked"  # of BatchNorm: not every format has them, and nothing is computed from them


def warm_start(state: TrainState, config: Config, warm: WarmStart) -> dict[str, object]:
    """Put `warm` into `state`, in place: what was taken and what was not, for the record.

    Raises ConfigError naming every tensor that is missing, left over or of another shape, with a remedy; then `state` is as it was.
    """
    parts: list[tuple[nn.Module, Mapping[str, Tensor], str]] = [(state.model.trunk, warm.trunk, "trunk")]
    if config.train.init_parts == "all":
        parts.append((state.model.head, headed(state.model.head, warm), "head"))
        prototypes = {} if warm.prototypes is None else {"weight": F.normalize(warm.prototypes.float(), dim=1)}
        parts.append((state.objective.prototypes, prototypes, "prototypes"))
    finite(warm, [found for _, found, _ in parts])
    unfit = [line for module, found, part in parts for line in complaints(module, found, part, config)]
    if unfit:
        where = f"train.init = {warm.source!r} ({warm.layout}'s names) does not fit"
        raise ConfigError("\n".join([where, *(f"  {line}" for line in unfit)]))
    for module, found, _ in parts:
        module.load_state_dict(found, strict=False)  # complete but for counters, as was just seen
    state.ema.model.load_state_dict(state.model.state_dict())
    taken = [part for _, _, part in parts]
    beside = [part for part, there in (("head", warm.head), ("prototypes", warm.prototypes is not None)) if there and part not in taken]
    state.origin = {"source": warm.source, "digest": warm.digest, "layout": warm.layout, "parts": taken}
    return state.origin | {"tensors": sum(len(found) for _, found, _ in parts), "not_taken": [*beside, *warm.left]}


def told(origin: Mapping[str, Any]) -> str:
    """One line of it, for the annotations and cards of all snapshots of the run."""
    return f"{origin['source']} ({origin['digest']}, {origin['layout']}: {'+'.join(origin['parts'])})"


def headed(head: nn.Module, warm: WarmStart) -> dict[str, Tensor]:
    """The projection head, for ours: a bias in front of a BatchNorm, which ours has not, goes into its running mean, where it makes the same."""
    found = dict(warm.head)
    ours = head.state_dict()
    for name in [n for n in found if n.endswith(".bias") and n not in ours]:
        mean = f"{int(name.split('.')[0]) + 1}.running_mean"
        if mean in found and found[mean].shape == found[name].shape:
            found[mean] = found[mean] - found.pop(name)
    return found


def complaints(module: nn.Module, found: Mapping[str, Tensor], part: str, config: Config) -> list[str]:
    """What keeps `found` from being the whole of `module`."""
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(COUNTERS)}
    other = {n: t for n, t in found.items() if n in wanted and t.shape != wanted[n].shape}
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted and not n.endswith(COUNTERS)]
    lines = [f"{part}.{n}: {tuple(t.shape)} in the file, {tuple(wanted[n].shape)} here" for n, t in other.items()]
    shown = [*lines[:5], *([f"… and {len(lines) - 5} more of another shape"] if len(lines) > 5 else [])]
    shown += [f"{part}: missing in the file: {_some(missing)}"] if missing else []
    shown += [f"{part}: only in the file: {_some(extra)}"] if extra else []
    return [*shown, remedy(part, found, config)] if shown else []


def remedy(part: str, found: Mapping[str, Tensor], config: Config) -> str:
    if part == "trunk":
        norm = "bn" if any(n.endswith("running_mean") for n in found) else "gn_ws"
        if norm != config.model.norm:
            return f"set model.norm = {norm!r}, as the file has it (here: {config.model.norm!r})"
        name = backbone_of(found)
        if name and name != config.model.backbone:
            return f"set model.backbone = {name!r}, whose trunk it is (here: {config.model.backbone!r})"
        return "name a file with the whole trunk of model.backbone, or leave train.init out"
    fits = {"head": "model.head and model.head_norm", "prototypes": "objective.prototypes and the last width of model.head"}
    return f"set {fits[part]} to the file's shapes, or set train.init_parts = 'trunk' and begin with a new one"


def backbone_of(found: Mapping[str, Tensor]) -> str:
    """The name of the RegNetY whose trunk this is; empty for none that we know.  By its stages' depths and widths, and its group widths."""
    depths: dict[int, int] = {}
    widths, groups = {}, {}
    for name, tensor in found.items():
        stage, _, rest = name.partition(".")
        if stage[:1] != "s" or not stage[1:].isdigit():
            continue
        depths[int(stage[1:])] = max(depths.get(int(stage[1:]), 0), int(rest.split(".")[0][1:]))
        if rest.endswith("f.b.weight") and tensor.dim() == 4:
            widths[int(stage[1:])], groups[int(stage[1:])] = tensor.shape[0], tensor.shape[1]
    seen = tuple(tuple(of[stage] for stage in sorted(of)) for of in (depths, widths, groups))
    matching = (name for name, s in REGNETY.items() if (s.depths, s.widths, s.group_widths) == seen)
    return next(matching, "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" … ({len(names)} in all)" if len(names) > 4 else "")


def finite(warm: WarmStart, parts: list[Mapping[str, Tensor]]) -> None:
    """Raises ConfigError naming the first tensor that is not finite: what begins so never learns."""
    for name, tensor in ((name, tensor) for part in parts for name, tensor in part.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"train.init = {warm.source!r}: {name} holds values that are not finite; the file is damaged, fetch it again")
