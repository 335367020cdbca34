"""Histories: thinned on reading, and yet exact where it counts; of any length, the page stays small."""

import itertools
import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from streamlearn.contract.config import Config
from streamlearn.contract.object_store import FolderStore
from streamlearn.report import build_report
from streamlearn.report.past import EVENTS, POINTS, fetched, learnt, measured, moment, spread
from tests.report.homes import digest, tell


@pytest.mark.parametrize("count", [1, 2, 2 * POINTS, 2 * POINTS + 1, 10_007])
def test_a_history_of_any_length_is_thinned_evenly_and_its_newest_line_is_kept(tmp_path, count):
    tell(tmp_path, "train", *({"step": s, "lr": 0.1, "loss": 1.0} for s in range(1, count + 1)))
    steps = [line["step"] for line in learnt(tmp_path).lines]
    assert steps[0] == 1 and steps[-1] == count and len(steps) <= 2 * POINTS + 1
    gaps = {b - a for a, b in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1


def test_what_a_killed_learner_told_of_steps_it_takes_again_goes(tmp_path):
    first = ({"step": s, "lr": 0.1, "loss": 1.0} for s in range(10, 110, 10))
    again = ({"step": s, "lr": 0.1, "loss": 2.0} for s in range(60, 130, 10))
    tell(tmp_path, "train", *first, {"event": "resumed", "step": 50}, *again)
    found = learnt(tmp_path)
    assert [(x["step"], x["loss"]) for x in found.lines] == [(s, 1.0 if s < 60 else 2.0) for s in range(10, 130, 10)]
    assert found.counts["resumed"] == 1


def test_of_each_kind_of_event_the_newest_are_kept_and_all_are_counted(tmp_path):
    tell(tmp_path, "train", {"event": "halved", "step": 1}, *({"event": "bad_step", "step": s} for s in range(3 * EVENTS)))
    found = learnt(tmp_path)
    assert found.counts == {"halved": 1, "bad_step": 3 * EVENTS}
    assert (
        len(found.events["halved"]) == 1
        and found.events["bad_step"][-1]["step"] == 3 * EVENTS - 1
        and len(found.events["bad_step"]) == EVENTS
    )


def test_every_restart_of_the_fetcher_is_counted_however_much_is_thinned(tmp_path):
    runs, lines = 40, 100
    for run in range(runs):
        tell(
            tmp_path,
            "fetch",
            *({"stored": i, "outcomes": {"stored": i, "rejected:gone": i // 10}, "at": _at(run, i)} for i in range(1, lines + 1)),
        )
    with (tmp_path / "history" / "fetch.jsonl").open("a") as f:
        f.write('{"at": "2026-11-21T23:00:00Z", "stored": 1')  # torn: not a restart
    found = fetched(tmp_path)
    assert found.outcomes == {"stored": runs * lines, "rejected:gone": runs * lines // 10}
    assert found.points[-1]["total"] == runs * lines and len(found.points) <= 2 * POINTS + 1
    totals = [p["total"] for p in found.points]
    assert totals == sorted(totals)


def _at(run, i):
    return f"2026-11-21T{run // 4:02d}:{run % 4:02d}:{i // 2:02d}.{500 * (i % 2):03d}Z"


def test_all_protocols_of_a_snapshot_and_bank_are_one_entry(tmp_path):
    tell(
        tmp_path,
        "evaluate",
        {"bank": "b", "step": 2, "knn": 0.1},
        {"bank": "a", "step": 2, "knn": 0.2},
        {"bank": "b", "step": 2, "logistic": 0.3},
    )
    assert [(e["bank"], e.get("knn"), e.get("logistic")) for e in measured(tmp_path)] == [("a", 0.2, None), ("b", 0.1, 0.3)]


def test_what_is_spread_keeps_its_ends_and_what_is_named():
    lines = [{"step": s} for s in range(100)]
    assert [x["step"] for x in spread(lines, 4, lambda x: x["step"] == 33)] == [0, 25, 33, 50, 75, 99]
    assert spread([], 4) == [] and spread(lines[:3], 4) == lines[:3]


def test_a_time_is_utc_unless_it_says_otherwise():
    assert moment("2026-11-21T05:00:00.000Z") == moment("2026-11-21T06:00:00+01:00") == moment("2026-11-21T05:00:00")
    assert moment("soon") is None and moment(None) is None and moment("2026-11-21T05:00:00Z") == datetime(2026, 11, 21, 5, tzinfo=UTC)


def test_five_thousand_snapshots_and_a_long_history_make_a_small_page_in_little_memory(tmp_path):
    (tmp_path / "history").mkdir()
    alarms = {
        "effective_rank": 9.5,
        "rankme": 80.0,
        "lidar": 9.0,
        "uniformity": -1.5,
        "alpha_req": 1.2,
        "participation_ratio": 5.0,
        "alarms": [],
    }
    with (tmp_path / "history" / "evaluate.jsonl").open("w") as f:
        for i in range(5000):
            for bank in ("old", "new"):
                score = {"knn": 0.3 + i / 2e4, "knn_low": 0.29 + i / 2e4, "knn_high": 0.31 + i / 2e4, "ridge": 0.4, "logistic": 0.5}
                f.write(json.dumps({"bank": bank, "step": 150 * i, "tag": f"0.{150 * i}.0", "digest": digest(i)} | score | alarms) + "\n")
    with (tmp_path / "history" / "train.jsonl").open("w") as f:
        common = {"loss": 2.5, "lr": 0.3, "grad_norm": 0.5}
        f.writelines(json.dumps({"step": 10 * i, "images": i, "fresh": i // 2} | common) + "\n" for i in range(300_000))
    page = build_report(tmp_path, Config(), FolderStore(tmp_path / "store"), tmp_path / "report.html")
    assert page.stat().st_size < 2_000_000
    used = "import resource,sys; from pathlib import Path; from streamlearn.report.past import learnt; learnt(Path(sys.argv[1])); "
    used += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    sizes = []
    for home in (tmp_path / "none", tmp_path):
        done = subprocess.run([sys.executable, "-c", used, str(home)], capture_output=True, text=True, check=True)
        sizes.append(int(done.stdout))
    assert sizes[1] - sizes[0] < 20_000, "kB"
