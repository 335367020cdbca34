"""The benchmark of a GPU's step runs, on a CPU: what fails in it costs a row, and says so."""

import json
import subprocess
import sys

import pytest
import torch

from bench.step_cuda import ratios, train_tflop
from tests.conftest import REPO


@pytest.mark.slow
def test_rows_come_one_by_one_and_a_row_that_fails_costs_no_other(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.step_cuda",
        "--device=cpu",
        "--models",
        "regnety-tiny",
        "no-such-model",
        "--variants",
        "ours-bare",
        "plain",
    ]
    options = ["--batch=2", "--crops=small", "--steps=2", "--warmup=1", f"--out={tmp_path}"]
    done = subprocess.run([*command, *options], cwd=REPO, capture_output=True, text=True, check=True, timeout=280)
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [(r["model"], r["variant"], "failed" in r) for r in rows] == [
        ("regnety-tiny", "ours-bare", False),
        ("no-such-model", "ours-bare", True),
        ("regnety-tiny", "plain", False),
        ("no-such-model", "plain", True),
    ]
    assert all(r["images_s"] > 0 and r["tflop_s"] > 0 and r["steps"] == 2 for r in rows if "failed" not in r)
    assert "unknown; one of" in done.stdout and "regnety-tiny   ours-bare / plain:" in done.stdout


def test_ours_is_set_against_the_best_of_the_plain_rows():
    rows = [("m", "ours", 30.0), ("m", "plain", 10.0), ("m", "plain-nhwc", 20.0), ("other", "plain", 5.0)]
    told = ratios([{"model": m, "variant": v, "images_s": s} for m, v, s in rows])
    assert told == [f"{'m':14s} ours / plain-nhwc: 1.50 x"]


@pytest.mark.parametrize(("model", "tflop"), [("regnety-16gf", 0.262), ("regnety-256gf", 4.183)])
def test_the_arithmetic_of_an_images_step_is_the_reference_tables(model, tflop):
    assert train_tflop(model, "full", torch.device("cuda")) == pytest.approx(tflop, rel=0.01)
