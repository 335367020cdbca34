"""Break one rule of the sealing protocol at a time, and see whether a test notices.

    python -m bench.mutants [name ...]

Each mutant is one replacement in one file, applied to a copy of the tree.  Its command must fail there, and must pass on the copy without it
(a test that fails anyway would prove nothing).  Exit code 1 if any survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", ".mypy_cache", ".ruff_cache", "runs")
LIMIT_S = 400
PACK, LANE, RUN = "ingest/pack.py", "ingest/fetch/lane.py", "ingest/fetch/run.py"
CATALOG, UPKEEP, S3 = "streamlearn/contract/catalog.py", "streamlearn/contract/upkeep.py", "streamlearn/adapters/s3_store.py"
SEALING, RETRIES = "tests/crash/test_sealing_crash.py", "tests/crash/test_retries.py"
BENCH = "-m bench.crash --offsets 400 --crashes 40 --log sqlite --store folder --limit-s 100"


@dataclass(frozen=True)
class Mutant:
    rule: str  # that is broken
    file: str
    replace: str  # stands in the file exactly once
    by: str
    command: str  # after `python`; a bare path is pytest's


_AFTER = """        if unit.after:
            self.log.append(unit.after)
            unit.after = []
"""
_GROUP = "        self.log.commit(group_of(self.log), {(unit.topic, unit.partition): unit.end})\n"
_PUT = """            self.store.put_file(row.key, unit.spool)
            self.store.put_file(sidecar_key(row.key), unit.sidecar)
"""
_COMMIT = "            self.catalog.commit([row], [Advance(row.topic, unit.partition, unit.start, unit.end)])\n            unit.committed = True\n"
MUTANTS = (
    Mutant(
        "retries follow the commit",
        PACK,
        "        if not unit.committed:\n" + _PUT + _COMMIT + _AFTER,
        _AFTER + "        if not unit.committed:\n" + _PUT + _COMMIT,
        f"{RETRIES} -k only_the_owner",
    ),
    Mutant(
        "the same, by the bench",
        PACK,
        _PUT + _COMMIT + _AFTER,
        _PUT + "    " + _AFTER.replace("\n        ", "\n            ").rstrip(" ") + _COMMIT,
        BENCH,
    ),
    Mutant(
        "the group offset follows the commit and the retries",
        PACK,
        "        if not unit.committed:\n" + _PUT + _COMMIT + _AFTER + _GROUP,
        _GROUP + "        if not unit.committed:\n" + _PUT + _COMMIT + _AFTER,
        f"{RETRIES} -k retried_from_the_sidecar",
    ),
    Mutant("the commit follows the puts", PACK, _PUT + _COMMIT, _COMMIT + _PUT, f"{SEALING} -k 'killed_at_any_step and before and tar'"),
    Mutant("the same, by the bench", PACK, _PUT + _COMMIT, _COMMIT + _PUT, BENCH),
    Mutant(
        "Fenced: read the position anew",
        LANE,
        "                self.waits.gone(self.name)\n                self.lost = True\n",
        "                self.waits.gone(self.name)\n                self._drop()\n",
        f"{SEALING} -k was_fenced",
    ),
    Mutant(
        "a dropped unit leaves nothing",
        PACK,
        "        self.sidecar.unlink(missing_ok=True)  # it lies there once sealing has been tried\n",
        "",
        f"{RETRIES} -k only_the_owner",
    ),
    Mutant(
        "a start empties the spool",
        RUN,
        "                left.unlink()\n",
        "                left.stat()\n",
        BENCH,
    ),
    Mutant(
        "recover tells what is owed",
        PACK,
        "        if done >= position:\n            return position\n",
        "        return position\n",
        f"{RETRIES} -k retried_from_the_sidecar",
    ),
    Mutant(
        "the same, by the bench", PACK, "        if done >= position:\n            return position\n", "        return position\n", BENCH
    ),
    Mutant(
        "recover looks at what the log holds",
        PACK,
        '(outcome["origin"] or place) not in held[outcome["reason"]]',
        "True",
        f"{RETRIES} -k retried_from_the_sidecar",
    ),
    Mutant(
        "a retry met twice is a duplicate",
        LANE,
        "            if candidate.origin in self.seen:\n",
        "            if False:\n",
        f"{RETRIES} -k twice",
    ),
    Mutant(
        "retries below the position are remembered",
        LANE,
        "                self.seen = await self.fetcher.read(origins, self.fetcher.log, self.topic, self.partition, position)\n",
        "                self.seen = set()\n",
        f"{RETRIES} -k twice",
    ),
    Mutant(
        "an advance starts where its partition stands",
        CATALOG,
        "            if settled(table, lost):\n",
        "            if False:\n",
        "tests/contract/test_catalog.py -k zombie",
    ),
    Mutant(
        "merging rests on the newest rows",
        UPKEEP,
        "predicate=newest, commit_properties=CommitProperties(max_commit_retries=0)",
        "predicate=newest",
        "tests/contract/test_upkeep.py -k merge_while",
    ),
    Mutant(
        "a commit's file is synced before it is acknowledged",
        UPKEEP,
        "            durable.sync(Path(uri) / path)\n",
        "            Path(uri) / path\n",
        "tests/contract/test_upkeep.py -k on_the_disk",
    ),
    Mutant(
        "delta-rs commits with a conditional put",
        S3,
        '"AWS_CONDITIONAL_PUT": "etag"',
        '"AWS_S3_ALLOW_UNSAFE_RENAME": "true", "AWS_CONDITIONAL_PUT": "disabled"',
        "tests/contract/test_catalog.py -k disturb",
    ),
    Mutant(
        "put_if_absent is conditional", S3, 'put(IfNoneMatch="*", Metadata', "put(Metadata", "tests/contract/test_object_store.py -k absent"
    ),
)


def run(copy: Path, command: str) -> tuple[bool, str]:
    """Whether it passes, and the last line that it says."""
    words = command if command.startswith("-m") else f"-m pytest -q -x --no-header -p no:cacheprovider {command}"
    settings = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            f'"{sys.executable}" {words}', shell=True, cwd=copy, env=settings, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {LIMIT_S} s"
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command}: exit code {done.returncode}: {done.stdout[-500:]} {done.stderr[-500:]}")
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return done.returncode == 0, lines[-1] if lines else ""


def judge(copy: Path, mutant: Mutant) -> bool:
    """Whether it survives."""
    path, began = copy / mutant.file, time.monotonic()
    text = path.read_text()
    if text.count(mutant.replace) != 1:
        raise SystemExit(
            f"{mutant.rule}: what is to be replaced stands {text.count(mutant.replace)} times in {mutant.file}; mend the table"
        )
    path.write_text(text.replace(mutant.replace, mutant.by))
    try:
        survives, said = run(copy, mutant.command)
    finally:
        path.write_text(text)
    verdict = "SURVIVED" if survives else "caught  "
    print(f"{verdict} {mutant.rule:45} {mutant.command[:60]:60} {time.monotonic() - began:4.0f} s  {said[:80]}", flush=True)
    return survives


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants whose rule contains one of these")
    parser.add_argument("--only-mutants", action="store_true", help="do not run each command without a mutant first")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.words or any(word in m.rule for word in args.words)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as made:
        copy = Path(made) / "tree"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for command in () if args.only_mutants else dict.fromkeys(m.command for m in chosen):
            passes, said = run(copy, command)
            if not passes:
                raise SystemExit(f"{command} fails without any mutant: {said}")
        survivors = [judge(copy, mutant) for mutant in chosen]
    print(f"{len(survivors) - sum(survivors)} of {len(survivors)} caught")
    return int(any(survivors))


if __name__ == "__main__":
    sys.exit(main())
