"""bench.streaming compares what it says it compares."""

import argparse
import json

import pytest

from bench.streaming import file_of, joined, main, table

SMALL = dict(images=128, epochs=4, capacity=48, round=64, batch=32, bank=60, test=60, norm="bn")


def arguments(out, **more):
    return argparse.Namespace(**SMALL | {"out": str(out), "seeds": [0], "arms": ["epochs", "stream", "once"]} | more)


def test_epochs_and_stream_take_as_many_updates_of_as_many_images_and_a_seed_that_is_done_is_not_run_again(tmp_path, data_dir, capsys):
    args = arguments(tmp_path)
    main(arguments(tmp_path, arms=["epochs"]))
    assert joined(args) == [] and "no seed has both" in capsys.readouterr().out
    made = file_of("epochs", 0, args).read_bytes()
    main(args)
    one = {arm: json.loads(file_of(arm, 0, args).read_bytes()) for arm in ("epochs", "stream", "once")}
    assert file_of("epochs", 0, args).read_bytes() == made
    assert {arm: (o["steps"], o["learnt"], o["fresh"]) for arm, o in one.items()} == {
        "epochs": (16, 512, 512), "stream": (16, 512, 128), "once": (4, 128, 128),
    }  # fmt: skip
    assert one["epochs"]["before"] == one["stream"]["before"] != one["stream"]["after"]
    assert "of epochs' (of the means)" in capsys.readouterr().out
    assert joined(arguments(tmp_path, epochs=8)) == []  # other settings, other files


def test_the_score_is_that_of_the_means_and_unequal_runs_are_not_compared(tmp_path):
    def arms(stream, epochs, steps=5):
        each = {"learnt": 1, "ridge gain": 1.0}
        return {"stream": each | {"steps": steps, "knn gain": stream}, "epochs": each | {"steps": 5, "knn gain": epochs}}

    told = table([arms(8.0, 10.0), arms(20.0, 20.0)], arguments(tmp_path))
    assert "stream's knn gain is 93.3 % of epochs' (of the means); stream less epochs, in points: -1.0 (-2.0 - 0.0)" in told
    with pytest.raises(AssertionError, match="unequal updates"):
        table([arms(8.0, 10.0, steps=6)], arguments(tmp_path))
