"""One training step on one GPU: ours against plain steps of the same model, in one command.

    python -m bench.step --device cuda [--quick] [--models regnety-16gf ...] [--variants ours plain ...] [--budget-s 570]

Crops 2 x 224 + 4 x 96 of noise that lie on the GPU, 16,000 prototypes, SEER's heads, LARS, bfloat16.  Each row is a process of its own, so
one that runs out of memory costs one row; rows are printed as they come and written to $OUT/step.json (or --out) after each.
Median of 50 steps after 20; where they would take longer than --row-s there are fewer of them, and the row says how many.  Rows that --budget-s
leaves no time for are named at the end, with the command that measures them.

TFLOP/s: three times the forward pass's multiply-adds, two operations each, counted on the meta device at the published widths: what is
computed again or padded is not counted.  MFU: of --peak-tflops, dense bfloat16 as 8192 x 8192 matrix products reach it on an H200.

`ours` is the recipe for a GPU (docs/speed.md); ours-... leave one part out or put one in.  `plain` runs one forward pass for each crop in eager
mode and NCHW, `plain-nhwc` in channels last, `plain-compile` through torch.compile, as most code that is published does it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.step_variants import CROPS, NHWC, Step, config_of, crops_of, ours, plain
from streamlearn.learn.model import Model

BATCHES = {"regnety-16gf": 192, "regnety-32gf": 128, "regnety-256gf": 32, "regnety-128gf": 48}  # a step of about 0.3 s each
RECIPE: dict[str, Any] = {"precision": "bfloat16", "kernels": "measured", "compile": True}
VARIANTS: dict[str, Any] = {
    "ours": partial(ours, **RECIPE),
    "plain": plain,
    "plain-nhwc": partial(plain, layout=NHWC),
    "plain-compile": partial(plain, layout=NHWC, compile=True),
    "ours-bare": partial(ours, precision="bfloat16", recompute="none"),
    "ours-eager": partial(ours, **RECIPE | {"compile": False, "recompute": "none"}),
    "ours-library": partial(ours, **RECIPE | {"kernels": "library"}),
    "ours-selective": partial(ours, **RECIPE | {"compile": False, "recompute": "selective"}),
    "ours-full": partial(ours, **RECIPE | {"recompute": "full"}),
    "ours-padded": partial(ours, **RECIPE | {"pad_groups": 8}),
}


def measure(model: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """In this process: the row."""
    began, device = time.monotonic(), torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # for all alike
    batch = args.batch or BATCHES.get(model, 32)
    step: Step = VARIANTS[variant](model, args.crops, batch, device, args.home)
    crops = crops_of(args.crops, batch, device)
    times: list[float] = []
    first = None
    while len(times) < args.warmup + args.steps and (time.monotonic() - began < args.row_s or len(times) < 3):
        at = time.perf_counter()
        loss = float(step(crops))  # waits for the GPU, as the learner does once a step
        times.append(time.perf_counter() - at)
        first = first or time.monotonic() - began
    warm = min(args.warmup, len(times) // 2)
    seconds = statistics.median(times[warm:])
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    tflop = train_tflop(model, args.crops, device)
    return {
        "batch": batch,
        "images_s": round(batch / seconds, 4),
        "ms": round(1000 * seconds, 2),
        "tflop_s": round(tflop * batch / seconds, 6),
        "mfu": round(tflop * batch / seconds / args.peak_tflops, 4),
        "gib": round(memory, 2),
        "steps": len(times) - warm,
        "start_s": round(first or 0.0, 1),
        "loss": round(loss, 4),
        "torch": torch.__version__,
    }


def train_tflop(model: str, crops: str, device: torch.device) -> float:
    """Of one image's step, forward and backward, at the published widths."""
    config = config_of(model, crops, 2, device, "")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Model(config.model)([torch.empty(count, 1, 3, size, size) for count, size in CROPS[crops]])
    views = sum(count for count, _ in CROPS[crops])
    scores = 2 * views * config.objective.prototypes * config.model.head[-1]
    return 3 * (counter.get_total_flops() + scores) / 1e12


def row(model: str, variant: str, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Of a process of its own; what went wrong instead, where something did."""
    kept = [
        f"--{name.replace('_', '-')}={getattr(args, name)}"
        for name in ("steps", "warmup", "row_s", "peak_tflops", "batch", "crops", "home")
    ]
    command = [sys.executable, "-m", "bench.step_cuda", "--device", args.device, "--only", model, variant, *kept]
    name = {"model": model, "variant": variant}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return name | {"failed": f"not done after {limit_s:.0f} s"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [f"exit {done.returncode}"]
        return name | {"failed": said[-1][:160], "stderr": done.stderr[-2000:]}
    return name | json.loads(done.stdout.splitlines()[-1])


def shown(found: dict[str, Any]) -> str:
    head = f"{found['model']:14s} {found['variant']:15s}"
    if "failed" in found:
        return f"{head} failed: {found['failed']}"
    return (
        f"{head} B {found['batch']:4d} {found['images_s']:9.1f} images/s {found['ms']:8.1f} ms {found['tflop_s']:7.1f} TFLOP/s"
        f"  MFU {100 * found['mfu']:5.1f} %  {found['gib']:6.1f} GiB  {found['steps']} steps, the first after {found['start_s']:.0f} s"
    )


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Ours against the best plain row, of each model that has both."""
    rate = {(r["model"], r["variant"]): r["images_s"] for r in rows if "images_s" in r}
    lines = []
    for model in dict.fromkeys(m for m, _ in rate):
        others = {v: s for (m, v), s in rate.items() if m == model and v.startswith("plain")}
        mine = {v: s for (m, v), s in rate.items() if m == model and v.startswith("ours")}
        if others and mine:
            best, peer = max(mine, key=lambda v: mine[v]), max(others, key=lambda v: others[v])
            lines.append(f"{model:14s} {best} / {peer}: {mine[best] / others[peer]:.2f} x")
    return lines


def run(args: argparse.Namespace) -> None:
    began, rows, late = time.monotonic(), [], []
    out = Path(args.out or os.environ.get("OUT", ".")) / "step.json"
    # what the goals are about first: ours everywhere, then the peers of each model
    wanted = sorted(((m, v) for m in args.models for v in args.variants), key=lambda pair: not pair[1].startswith("ours"))
    for model, variant in wanted:
        left = args.budget_s - (time.monotonic() - began)
        if left < args.row_s / 2:
            late.append((model, variant))
            continue
        found = row(model, variant, args, min(left, 4 * args.row_s))
        rows.append(found)
        print(shown(found), flush=True)
        out.write_text(json.dumps({"rows": rows, "peak_tflops": args.peak_tflops, "crops": args.crops}, indent=1))
    print("\n".join(ratios(rows)))
    for model, variant in late:
        print(f"no time left for: python -m bench.step --device cuda --models {model} --variants {variant}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=list(BATCHES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ours", "plain", "plain-nhwc", "plain-compile"])
    parser.add_argument("--crops", choices=CROPS, default="full")
    parser.add_argument("--batch", type=int, default=0, help="0: what suits the model")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--row-s", type=float, default=45.0, help="seconds after which a row takes no more steps")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for all rows")
    parser.add_argument("--peak-tflops", type=float, default=790.0)
    parser.add_argument("--quick", action="store_true", help="one model, few steps: does everything run?")
    parser.add_argument("--out", default="", help="folder for step.json; else $OUT, else here")
    parser.add_argument("--home", default="", help="for the kernels' file; else a temporary folder")
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "VARIANT"), help="measure one row in this process")
    args = parser.parse_args()
    if args.quick:
        args.models, args.steps, args.warmup, args.row_s = args.models[:1], 6, 3, 20.0
        args.variants = list(VARIANTS)
    if args.only:
        print(json.dumps(measure(args.only[0], args.only[1], args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.home = args.home or folder
        run(args)


if __name__ == "__main__":
    main()
