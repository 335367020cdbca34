"""Snapshots in registries: what a large one costs to move, what is left of it after kills, and what thousands of them cost.

    python -m bench.registry --mib 2048 --kills 12 --snapshots 5000

1. One snapshot of --mib of noise is pushed to Debian's docker-registry and pulled again, by `streamlearn snapshots copy` and `pull`, by skopeo, and by oras-py
   if it is installed: seconds, and the greatest memory of the client's process.
2. The same push and pull by ours, killed with SIGKILL at a random byte, again and again, and then let through: how many bytes went over the wire in all.
3. An embedded registry grows to --snapshots, each with one measurement: CPU time to publish one more, to find a tag, to list them all.

The machine's noise is in the seconds; compare them within one run.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.registry_wire import Wire
from streamlearn.contract.oci import MANIFEST
from streamlearn.contract.registry import OciLayout, canonical
from streamlearn.snapshots.artifact import KINDS, MODEL, MODEL_CONFIG, TITLE, version
from streamlearn.snapshots.publish import record_result
from streamlearn.snapshots.pull import list_snapshots
from tests.adapters.oci import DockerRegistry

MIB = 2**20
ORAS = """
import sys, oras.client
act, address, folder = sys.argv[1:]
client = oras.client.OrasClient(insecure=True, auth_backend="basic")
if act == "push":
    client.push(address, files=["model.safetensors:application/octet-stream"], do_chunked=True, chunk_size=16 * 2**20, quiet=True)
else:
    client.pull(address, outdir=folder)
"""


@dataclass(frozen=True)
class Ran:
    seconds: float
    mib: float  # greatest resident set of the process
    code: int
    errors: str


def run(argv: Sequence[str | Path], cwd: Path) -> Ran:
    """One process.  Its memory is the kernel's high-water mark, looked at while it lives: that of wait4 begins with what its parent had."""
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        child = subprocess.Popen([str(a) for a in argv], cwd=cwd, stdout=subprocess.DEVNULL, stderr=errors, env=environment())
        most = 0.0
        while child.poll() is None:
            most = max(most, high_water(child.pid))
            time.sleep(0.01)
        errors.seek(0)
        return Ran(time.perf_counter() - began, most, child.returncode, errors.read().decode(errors="replace")[-500:])


def high_water(pid: int) -> float:
    """MiB; 0 where it has just ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def environment() -> dict[str, str]:
    top = str(Path(__file__).parent.parent)
    return dict(os.environ) | {"PYTHONPATH": top, "STREAMLEARN__SNAPSHOTS__PLAIN_HTTP": "true", "STREAMLEARN__SNAPSHOTS__ATTEMPTS": "3"}


def snapshot(home: Path, mib: int, step: int = 1) -> str:
    """Publish one whose weights are noise: nothing on the way compresses it.  Its digest."""
    registry = OciLayout(home / "registry")
    weights = home / "model.safetensors"
    noise = random.Random(step)
    with weights.open("wb") as f:
        for _ in range(mib):
            f.write(noise.randbytes(MIB))
    blobs = {"model.safetensors": registry.put_file(weights, KINDS["model.safetensors"])}
    blobs |= {name: registry.put_blob(b"{}", kind) for name, kind in KINDS.items() if name not in blobs}
    layers = [blob.to_json() | {"annotations": {TITLE: name}} for name, blob in blobs.items()]
    config = registry.put_blob(b"{}", MODEL_CONFIG).to_json()
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": MODEL, "config": config, "layers": layers}
    return registry.put_manifest(manifest, tag=version(step)).digest


# --- 1: what it costs ---


def ours(act: str, address: str, home: Path, folder: Path) -> list[str | Path]:
    program = [sys.executable, "-m", "streamlearn", "snapshots"]
    if act == "push":
        return [*program, "copy", version(1), address, "--home", home]
    return [*program, "pull", version(1), folder, "--registry", address, "--home", home]


def clients(host: str, home: Path, scratch: Path) -> dict[str, tuple[list[str | Path], list[str | Path], Path]]:
    """Name -> push, pull, and the folder where the pull's bytes are."""
    layout, there = f"oci:{home / 'registry'}:{version(1)}", f"docker://{host}/bench/skopeo:1"
    skopeo: list[str | Path] = ["skopeo", "copy", "--preserve-digests"]
    oras: list[str | Path] = [sys.executable, "-c", ORAS]
    out = {name: scratch / name for name in ("ours", "skopeo", "oras-py")}
    address = f"oci://{host}/bench/ours"
    found = {"streamlearn": (ours("push", address, home, out["ours"]), ours("pull", address, scratch / "empty", out["ours"]), out["ours"])}
    if shutil.which("skopeo"):
        push, pull = [*skopeo, "--dest-tls-verify=false", layout, there], [*skopeo, "--src-tls-verify=false", there, f"dir:{out['skopeo']}"]
        found["skopeo"] = (push, pull, out["skopeo"])
    if subprocess.run([sys.executable, "-c", "import oras"], capture_output=True, check=False).returncode == 0:
        at = f"{host}/bench/oras:1"
        found["oras-py, chunked"] = ([*oras, "push", at, "."], [*oras, "pull", at, out["oras-py"]], out["oras-py"])
    return found


def cost(host: str, home: Path, scratch: Path, mib: int) -> bool:
    print(f"\n| {mib} MiB, docker-registry | push s | MiB memory | pull s | MiB memory | bytes the same |\n|---|---|---|---|---|---|")
    sound = True
    for name, (push, pull, folder) in clients(host, home, scratch).items():
        up, down = run(push, home), run(pull, home)
        wrong = up.errors if up.code else down.errors if down.code else ""
        same = not wrong and any(equal(file, home / "model.safetensors") for file in folder.iterdir() if file.stat().st_size >= mib * MIB)
        sound &= same or name != "streamlearn"
        print(
            f"| {name} | {up.seconds:.1f} | {up.mib:.0f} | {down.seconds:.1f} | {down.mib:.0f} | {'yes' if same else 'NO ' + wrong} |",
            flush=True,
        )
        shutil.rmtree(folder, ignore_errors=True)
    return sound


def equal(one: Path, other: Path) -> bool:
    with one.open("rb") as a, other.open("rb") as b:
        while data := a.read(MIB):
            if data != b.read(MIB):
                return False
        return not b.read(1)


# --- 2: killed ---


def killed(host: str, home: Path, scratch: Path, mib: int, kills: int) -> bool:
    print(
        f"\n| {mib} MiB, SIGKILL at a random byte, {kills} times | bytes on the wire, of the snapshot's | the last run, of them | outcome |\n|---|---|---|---|"
    )
    sound, noise = True, random.Random(0)
    for act in ("push", "pull"):
        with Wire(host) as wire:
            address = f"oci://{wire.host}/bench/killed"
            folder = scratch / "killed"
            argv = ours(act, address, home if act == "push" else scratch / "empty", folder)
            if act == "pull":  # of what the push above left; parts of transfers lie in the home
                (scratch / "empty").mkdir(exist_ok=True)
            for _ in range(kills):
                # a pull goes on where it was, so all of them together must leave something for the last run
                wire.stop_after(noise.randrange(1, mib * MIB // (kills if act == "pull" else 2)))
                child = subprocess.Popen([str(a) for a in argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
                while child.poll() is None and not wire.choked.wait(0.05):
                    pass
                child.send_signal(signal.SIGKILL)
                child.wait()
                sound &= not folder.exists()  # nothing that looks whole
            wire.stop_after(-1)
            before = wire.passed
            last = run(argv, home)
            same = last.code == 0 and (act == "push" or equal(folder / "model.safetensors", home / "model.safetensors"))
            sound &= same
            whole = mib * MIB
            outcome = "whole, verified" if same else last.errors
            print(f"| {act} | {wire.passed / whole:.2f} | {(wire.passed - before) / whole:.2f} | {outcome} |", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    return sound


# --- 3: thousands ---


def thousands(folder: Path, most: int) -> None:
    print("\n| snapshots | publish one more, ms CPU | find a tag | list all, s CPU | index, MB |\n|---|---|---|---|---|")
    registry = OciLayout(folder)
    sizes = sorted({n for n in (100, 500, 1000, 2500) if n < most} | {most})
    step = 0
    for size in sizes:
        while step < size - 10:
            step = publish(registry, step)
        began = time.process_time()
        for _ in range(10):
            step = publish(registry, step)
        one = (time.process_time() - began) / 10
        began = time.process_time()
        for i in range(100):
            registry.find(version(1 + i * size // 100))
        found = (time.process_time() - began) / 100
        began = time.process_time()
        listed = list_snapshots(OciLayout(folder))
        spent = time.process_time() - began
        assert len(listed) == size and all(len(row.results) == 1 for row in listed)
        index = (folder / "index.json").stat().st_size / 1e6
        print(f"| {size:,} | {1e3 * one:.1f} | {1e3 * found:.3f} | {spent:.2f} | {index:.1f} |", flush=True)


def publish(registry: OciLayout, step: int) -> int:
    """A snapshot with a measurement, as small as they come."""
    step += 1
    layer = registry.put_blob(b"weights %d" % step, KINDS["model.safetensors"]).to_json() | {"annotations": {TITLE: "model.safetensors"}}
    config = registry.put_blob(b"{}", MODEL_CONFIG).to_json()
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": MODEL, "config": config, "layers": [layer]}
    known = registry.put_manifest(canonical(manifest), tag=version(step), expect="")
    found = {"step": step, "bank": "cifar", "bank_digest": "sha256:" + "0" * 64, "protocol": "each/2", "knn": step / 7, "ridge": step / 9}
    record_result(registry, known.digest, found)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--snapshots", type=int, default=5000)
    parser.add_argument("--scratch", type=Path, help="where there is room for four times --mib  [default: the system's]")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.scratch) as name:
        scratch = Path(name)
        home = scratch / "home"
        home.mkdir()
        sound = True
        if asked.mib:
            snapshot(home, asked.mib)
            with DockerRegistry(scratch / "served") as server:
                sound = cost(server.host, home, scratch, asked.mib)
                sound &= killed(server.host, home, scratch, asked.mib, asked.kills)
        if asked.snapshots:
            thousands(scratch / "many", asked.snapshots)
    sys.exit(not sound)


if __name__ == "__main__":
    main()
