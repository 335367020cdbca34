"""One training step: ours against a plain eager step, same model, crops, batch and threads, in one run.

    python -m bench.step                     # CPU: 200MF and 400MF at both sizes of crops
    python -m bench.step --backbones regnety-200mf --crops small --batch 16
    python -m bench.step --device cuda       # one GPU: bench/step_cuda.py says what

The peer is how SwAV is commonly written (as in lightly): one forward for each crop, NCHW, exp-domain Sinkhorn, a product of all pairs in the
loss, LARS tensor by tensor with its host syncs.  Prints images/s and peak memory of each, measured in processes of their own that take turns;
of all timed steps the least counts, for other work on the machine can only add to it.  On a machine with much other work the ratio of CPU
time is the one to go by, with --threads 1.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

import torch

from bench.step_variants import CROPS, MEASURING, VARIANTS, crops_of


def measure(which: str, args: argparse.Namespace) -> dict[str, float]:
    """In this process: seconds of the quickest step and of its CPU time, peak resident memory in MiB."""
    torch.set_num_threads(args.threads)
    crops = crops_of(args.crops[0], args.batch, torch.device("cpu"))
    step, times = VARIANTS[which](args.backbones[0], args.crops[0], args.batch, torch.device("cpu"), args.home), []
    for i in range(args.warmup + args.steps):
        began, used = time.perf_counter(), time.process_time()
        loss = step(crops)
        if i >= args.warmup:
            times.append((time.perf_counter() - began, time.process_time() - used))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": min(t for t, _ in times), "cpu": min(c for _, c in times), "mib": peak, "loss": float(loss)}


def compare(args: argparse.Namespace, backbone: str, crops: str, home: str) -> None:
    """One table row for each variant; the ratios are to `plain`."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.variants}
    options = ["--backbones", backbone, "--crops", crops, "--home", home]
    options += [f"--{name}={getattr(args, name)}" for name in ("batch", "threads", "steps", "warmup")]
    for turn in range(args.rounds + 1):  # taking turns: a noisy neighbour disturbs all
        for name in args.variants:
            if turn == 0 and name not in MEASURING:
                continue  # the first round is for what is measured once and remembered
            command = [sys.executable, "-m", "bench.step", *options, "--only", name]
            out = subprocess.run(command, capture_output=True, text=True, check=True)
            if turn:
                results[name].append(json.loads(out.stdout))
    print(f"{backbone}, crops {crops}, batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}")
    least = {name: min(r["seconds"] for r in found) for name, found in results.items()}
    cpu = {name: min(r["cpu"] for r in found) for name, found in results.items()}
    peaks = {name: max(r["mib"] for r in found) for name, found in results.items()}
    for name in args.variants:
        line = f"  {name:14s} {args.batch / least[name]:8.2f} images/s   {1000 * least[name]:8.1f} ms/step   {peaks[name]:7.0f} MiB peak"
        if "plain" in least:
            line += f"   {least['plain'] / least[name]:5.2f} x   CPU time {cpu['plain'] / cpu[name]:5.2f} x   memory {peaks[name] / peaks['plain']:5.2f} x"
        print(line, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backbones", nargs="+", default=["regnety-200mf", "regnety-400mf"])
    parser.add_argument("--crops", nargs="+", choices=CROPS, default=["small", "full"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["ours", "plain"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--home", default="", help="for the kernels' file; else a temporary folder")
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
        with tempfile.TemporaryDirectory() as folder:
            for backbone in arguments.backbones:
                for crops in arguments.crops:
                    compare(arguments, backbone, crops, arguments.home or folder)
