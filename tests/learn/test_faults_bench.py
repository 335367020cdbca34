"""bench.faults on a small scale: each fault is found and undone, and the run without one raises no alarm."""

import argparse
import json

import pytest

from bench.faults import file_of, main

pytestmark = pytest.mark.timeout(900)
SMALL = dict(
    steps=60, at=30, burst=20, factor=100.0, fresh=1.0, capacity=64, round=160, batch=16, bank=60, test=60, checkpoint=5, snapshot=30
)


def arguments(out, **more):
    return argparse.Namespace(**SMALL | {"out": str(out), "seeds": [0], "looks": 1, "threads": 1} | more)


@pytest.fixture(scope="module")
def found(tmp_path_factory, data_dir):
    args = arguments(tmp_path_factory.mktemp("faults"), arms=["none", "nan", "constant", "overflow"])
    main(args)
    return {arm: json.loads(file_of(arm, 0, args).read_bytes()) for arm in args.arms}


@pytest.mark.slow
def test_a_run_without_fault_raises_no_alarm_and_says_how_near_it_came(found):
    clean = found["none"]
    assert clean["rollbacks"] == [] and clean["withheld"] == [] and (clean["skipped"], clean["bad"]) == (0, 0)
    assert set(clean["looks"][-1]["looked"]) == {"loss", "codes", "rank", "spread", "prototypes", "well"} and set(clean["found"]) == {
        "30",
        "60",
    }


def skipped(rollbacks):
    """Steps passed over in what is left: one that goes back further undoes what the one before it had skipped."""
    spans = []
    for r in rollbacks:
        spans = [(start, min(end, r["to"])) for start, end in spans if start < r["to"]] + [(r["to"], r["step"])]
    return sum(end - start for start, end in spans)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["nan", "constant", "overflow"])
def test_each_fault_is_found_and_undone_and_the_learner_goes_on_to_publish(found, arm):
    one = found[arm]
    first = one["rollbacks"][0]
    assert first["to"] <= 30 < first["step"] <= 51 and one["given_up"] == "" and "60" in one["found"]
    assert one["skipped"] == skipped(one["rollbacks"])
