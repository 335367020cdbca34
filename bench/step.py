"""One training step: ours against lightly's and a plain eager step, same model, crops, batch and threads, in one run.

    pip install --no-deps --target PEER lightly==1.6.0 torchvision==0.28.0     # of torch 2.13
    python -m bench.step --lightly PEER      # CPU: 200MF and 400MF at both sizes of crops
    python -m bench.step --backbones regnety-200mf --crops small --batch 16
    python -m bench.step --device cuda       # one GPU: bench/step_cuda.py says what

`lightly` is that package's SwAV: its head, prototypes, loss and LARS around pycls's RegNetY in NCHW, one forward for each crop as in its example.
`plain` is the same step written out here (exp-domain Sinkhorn, a product of all pairs in the loss, LARS tensor by tensor with its host
syncs), for where the package is not at hand.  Ours has the moving average to update besides.  Prints images/s and peak memory of each,
measured in processes of their own that take turns; of all timed steps the least counts, for other work on the machine can only add to
it.  On a machine with much other work the ratio of CPU time is the one to go by, with --threads 1.  Peak memory is resident; of it `start` MiB
were there before the model was made.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time

import torch

from bench.step_variants import CROPS, MEASURING, VARIANTS, crops_of


def measure(which: str, args: argparse.Namespace) -> dict[str, float]:
    """In this process: least seconds of a step, least CPU seconds of a step, peak resident memory in MiB at the end and before the model."""
    torch.set_num_threads(args.threads)
    if args.lightly:
        sys.path.append(args.lightly)
    start = peak_mib()
    crops = crops_of(args.crops[0], args.batch, torch.device("cpu"))
    step, times = VARIANTS[which](args.backbones[0], args.crops[0], args.batch, torch.device("cpu"), args.home), []
    for i in range(args.warmup + args.steps):
        began, used = time.perf_counter(), time.process_time()
        loss = step(crops)
        if i >= args.warmup:
            times.append((time.perf_counter() - began, time.process_time() - used))
    return {"seconds": min(t for t, _ in times), "cpu": min(c for _, c in times), "mib": peak_mib(), "start": start, "loss": float(loss)}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(args: argparse.Namespace, backbone: str, crops: str, home: str) -> None:
    """One table row for each variant; the ratios are ours to it, and memory as a share of it."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.variants}
    options = ["--backbones", backbone, "--crops", crops, "--home", home, "--lightly", args.lightly]
    options += [f"--{name}={getattr(args, name)}" for name in ("batch", "threads", "steps", "warmup")]
    for turn in range(args.rounds + 1):  # taking turns: a noisy neighbour disturbs all
        for name in args.variants:
            if turn == 0 and name not in MEASURING:
                continue  # the first round is for what is measured once and remembered
            command = [sys.executable, "-m", "bench.step", *options, "--only", name]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            if turn:
                results[name].append(json.loads(out.stdout))
    print(f"{backbone}, crops {crops}, batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}")
    for line in table(results, args.batch):
        print(line, flush=True)


def table(results: dict[str, list[dict[str, float]]], batch: int) -> list[str]:
    """Of each variant the least times and the largest memory of its rounds, and how the first variant stands to it."""
    rows = {
        name: {key: (max if key in ("mib", "start") else min)(r[key] for r in found) for key in ("seconds", "cpu", "mib", "start")}
        for name, found in results.items()
    }
    mine_name, mine = next(iter(rows.items()))
    lines = []
    for name, row in rows.items():
        line = f"  {name:10s} {batch / row['seconds']:7.2f} images/s  {batch / row['cpu']:7.2f} images/CPU s"
        line += f"  {row['mib']:6.0f} MiB peak (start {row['start']:.0f})"
        if name != mine_name:
            line += f"   {mine_name} / {name}: wall {row['seconds'] / mine['seconds']:.2f} x, CPU time {row['cpu'] / mine['cpu']:.2f} x, "
            line += (
                f"memory {mine['mib'] / row['mib']:.2f} x, beyond start {(mine['mib'] - mine['start']) / (row['mib'] - row['start']):.2f} x"
            )
        lines.append(line)
    return lines


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backbones", nargs="+", default=["regnety-200mf", "regnety-400mf"])
    parser.add_argument("--crops", nargs="+", choices=CROPS, default=["small", "full"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ours", "selective", "plain", "lightly"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--home", default="", help="for the kernels' file; else a temporary folder")
    parser.add_argument(
        "--lightly", default="", help="folder that has lightly and torchvision; else they are the environment's, or lightly is left out"
    )
    parser.add_argument("--only", choices=VARIANTS, help="measure one in this process")
    return parser.parse_args()


if __name__ == "__main__":
    if "cuda" in sys.argv:
        from bench.step_cuda import main

        main()
        sys.exit()
    arguments = parsed()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
    else:
        if not arguments.lightly and importlib.util.find_spec("lightly") is None:
            print("lightly is not installed, and left out: --lightly names a folder that has it")
            arguments.variants = [v for v in arguments.variants if v != "lightly"]
        with tempfile.TemporaryDirectory() as folder:
            for backbone in arguments.backbones:
                for crops in arguments.crops:
                    compare(arguments, backbone, crops, arguments.home or folder)
