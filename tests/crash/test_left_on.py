"""A group that is left on: the short form of `python -m bench.left_on`, and that its audit would see what is wrong."""

import json

import pytest

from bench.left_on import different, read, run
from streamlearn.contract.durable import append_line


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_rank_torchrun_and_a_writer_are_killed_on_a_disk_that_is_full_and_the_sequence_is_the_same(tmp_path):
    result = run(tmp_path / "home", kills=3, ranks=2, seed=1, limit_s=1100)
    table = dict(result.table)
    assert result.wrong == [], result.table
    assert table["kills"] == 3 and all(table[f"  of {kind}"] == 1 for kind in ("a rank", "torchrun", "the writer of a checkpoint"))
    assert table["times the disk was full"].startswith("1 (") and table["samples fresh exactly once"] == table["of"]


def journal(home, *lines):
    """`(start, newest checkpoint)` of a start, `(step, number)` of a step with one sample."""
    for line in lines:
        a, b = line[1:]
        what = {"start": a, "newest": b, "ranks": 1} if line[0] == "start" else {"step": a, "numbers": [b], "fresh": [1]}
        append_line(home / "journal" / "0.jsonl", json.dumps(what))
    return read(home, 0)


def test_steps_that_are_learnt_again_are_counted_and_their_samples_held_to_the_first_time(tmp_path):
    told = journal(
        tmp_path, ("start", 0, 0), ("step", 0, 7), ("step", 1, 8), ("step", 2, 9), ("start", 1, 1), ("step", 1, 8), ("step", 2, 9)
    )
    assert (told.lost, told.again, told.differing, told.astray) == ([0, 2], 2, [], [])
    assert told.steps == {0: ([7], [1]), 1: ([8], [1]), 2: ([9], [1])}


@pytest.mark.parametrize(
    ("then", "differing", "astray"),
    [
        ([("start", 1, 1), ("step", 1, 5)], [1], []),  # another sample
        ([("start", 1, 1), ("step", 2, 9)], [2], []),  # a step left out
        ([("start", 1, 2), ("step", 1, 8)], [], [1]),  # not from the newest checkpoint
    ],
)
def test_a_sequence_that_does_not_go_on_is_seen(tmp_path, then, differing, astray):
    told = journal(tmp_path, ("start", 0, 0), ("step", 0, 7), ("step", 1, 8), *then)
    assert (told.differing, told.astray) == (differing, astray)


def test_a_difference_in_what_is_remembered_is_named():
    import torch

    a = {"weights": {"a": torch.ones(2)}, "places": [1, (2, "x")]}
    assert different(a, {"weights": {"a": torch.ones(2)}, "places": [1, (2, "x")]}) == []
    assert different(a, {"weights": {"a": torch.tensor([1.0, 1.0 + 1e-7])}, "places": [1, (3, "x")]}) == [".weights.a", ".places.1.0"]
    assert different(a, a | {"more": 1}) == [""]
