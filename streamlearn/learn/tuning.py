"""Which form of each convolution is fastest here: measured once, forward and backward, and remembered in a file.

  1. shapes     what every convolution of the trunk is given, found on the meta device: nothing is computed
  2. look up    in <home>/kernels.json, by device, torch, threads, precision, layer and shape
  3. measure    what is not there, every form in turn
  4. write      the file, whole or not at all      <- THE COMMIT POINT

A start that is killed measures again.  Ranks of one machine that start together measure alike and the last to write wins; forms
differ by float rounding only, so ranks that chose differently still learn the same.  A resumed run finds its choices in the file, and goes
on bit for bit; without the file (another machine) it goes on up to rounding.
"""

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from streamlearn.contract import durable
from streamlearn.learn.backbones.forms import LIBRARY, Conv2d, convolve, forms_of, suited

ROUNDS = 3  # each form once a round, so that a noisy moment disturbs all of them; the least time counts
GAIN = 0.95  # of the library's time: what is not clearly faster is not worth another rounding
SPELL_S = 0.02  # a round of one form lasts about this long: launches that take microseconds are repeated
Shape = tuple[int, ...]
logger = logging.getLogger(__name__)


def tune(trunk: nn.Module, bare: nn.Module, sizes: Sequence[tuple[int, int]], cache: Path, dtype: torch.dtype) -> dict[str, str]:
    """Give every convolution of `trunk` its fastest form for images (N,3,S,S) of each (N,S) in `sizes`; what was chosen, by layer and shape.

    `bare`: the same trunk on the meta device.  Parameters and their names stay as they are.
    """
    weight = next(trunk.parameters())
    known = remembered(cache)
    where = f"{device_name(weight.device)} / torch {torch.__version__} / {torch.get_num_threads()} threads / {str(dtype).removeprefix('torch.')}"
    chosen: dict[str, dict[Shape, str]] = {}
    fresh = {}
    for name, shape in shapes(bare, sizes):
        conv = trunk.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        key = f"{where} / {told(conv)} on {'x'.join(map(str, shape))}"
        if key not in known:
            known[key] = fresh[key] = fastest(conv, shape, weight.device, dtype)
        chosen.setdefault(name, {})[shape] = known[key]
    if fresh:
        logger.info("%d convolutions measured; not the library's: %s", len(fresh), {k: v for k, v in fresh.items() if v != LIBRARY})
        durable.write(cache, json.dumps(remembered(cache) | fresh, indent=0, sort_keys=True).encode())
    for name, forms in chosen.items():
        parent, _, leaf = name.rpartition(".")
        conv = trunk.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        conv = Conv2d.of(conv)
        conv.forms = forms
        setattr(trunk.get_submodule(parent), leaf, conv)
    return {f"{name} {shape}": form for name, forms in chosen.items() for shape, form in forms.items()}


def shapes(bare: nn.Module, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Shape]]:
    """(name, input's shape) of every convolution that has forms and more than one pixel to see, at each (N,S)."""
    seen: list[tuple[str, Shape]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.append((name, tuple(inputs[0].shape)))

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in bare.named_modules() if suited(m)]
    for count, size in dict.fromkeys(sizes):
        bare(torch.empty(count, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return (entry for entry in seen if entry[1][-1] > 1)


def fastest(conv: nn.Conv2d, shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The form with the least time for forward and backward."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(device, dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(shape[1] > 3)  # images need no gradient
    with torch.no_grad():
        computed = Conv2d.of(conv).computed_weight().shape
    weight = torch.randn(computed, generator=g).to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    times: dict[str, list[float]] = {}
    forms = forms_of(weight, conv.groups)
    for _ in range(1 + ROUNDS):
        for form in list(forms):
            try:
                times.setdefault(form, []).append(spell(lambda form=form: _once(x, weight, conv, form), device))  # type: ignore[misc]
            except RuntimeError as e:  # out of memory, or no kernel for it: then it is not the one
                if form == LIBRARY:
                    raise
                logger.info("%s cannot be had for %s: %s", form, told(conv), str(e).splitlines()[0])
                forms.remove(form)
    least = {form: min(times[form][1:]) for form in forms}  # the first round warms up
    best = min(least, key=lambda form: least[form])
    return best if least[best] < GAIN * least[LIBRARY] else LIBRARY


def _once(x: Tensor, weight: Tensor, conv: nn.Conv2d, form: str) -> None:
    x.grad = weight.grad = None
    y = convolve(x, weight, int(conv.stride[0]), conv.groups, form)
    y.backward(torch.ones_like(y))


def spell(run: Callable[[], None], device: torch.device) -> float:
    """Seconds a run takes, over as many as fill a spell."""
    runs, began = 0, _now(device)
    while True:
        run()
        runs += 1
        took = _now(device) - began
        if took > SPELL_S:
            return took / runs


def _now(device: torch.device) -> float:
    """On a CPU this process's own time: what else runs on the machine is not to choose."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def told(conv: nn.Conv2d) -> str:
    return f"{conv.in_channels}-{conv.out_channels} k{conv.kernel_size[0]} s{conv.stride[0]} g{conv.groups}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def remembered(cache: Path) -> dict[str, str]:
    """Empty where there is no file, or one that nobody can read: then it is measured again."""
    try:
        found = json.loads(cache.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
