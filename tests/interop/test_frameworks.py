"""The frameworks themselves, in an environment of their own: what they load of ours computes what ours computes, difference 0.0.

    python -m venv ENV; ENV/bin/pip install torch==<as here> torchvision timm transformers
    STREAMLEARN_FRAMEWORKS=ENV/bin/python pytest tests/interop/test_frameworks.py

Without it the same is shown against structures written anew (tests/snapshots/others.py).
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from streamlearn.contract.registry import OciLayout
from streamlearn.learn.backbones import build
from streamlearn.snapshots.export import export
from streamlearn.snapshots.keys import TIMM, to_timm
from streamlearn.snapshots.publish import publish
from streamlearn.snapshots.pull import pull
from streamlearn.snapshots.trunk import load_trunk
from tests.snapshots.test_package import large

PYTHON = os.environ.get("STREAMLEARN_FRAMEWORKS", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="STREAMLEARN_FRAMEWORKS is not set to the python of an environment with timm and transformers"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    registry = OciLayout(folder / "registry")
    publish(registry, large(7))
    pull(registry, "candidate", folder / "timm")  # as published, not even exported
    export(registry, "candidate", folder / "vissl", "vissl")
    x = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.save(load_trunk(registry, "candidate").eval()(x), folder / "features.pt")
    torch.save(x, folder / "images.pt")
    (folder / "trunks.json").write_text(json.dumps(sorted(TIMM.values())))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    argv = [PYTHON, str(Path(__file__).with_name("in_frameworks.py")), str(folder)]
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_timm_and_transformers_compute_what_we_compute_with_difference_zero(found):
    assert found["difference"] == {"timm": 0.0, "transformers": 0.0, "vissl, as timm reads it": 0.0}, found["versions"]


def test_transformers_takes_every_tensor_and_misses_none(found):
    assert found["kind"] == "TimmWrapperModel" and set(map(tuple, found["loading"].values())) == {()}


def test_timm_prepares_images_as_the_probes_do(found):
    assert found["data"] == {
        "input_size": [3, 224, 224],
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "crop_pct": 0.875,
        "interpolation": "bilinear",
    }


@pytest.mark.parametrize("backbone", TIMM)
def test_every_size_has_timm_s_names_and_shapes(found, backbone):
    with torch.device("meta"):
        ours = {to_timm(name): list(tensor.shape) for name, tensor in build(backbone).state_dict().items()}
    assert ours == found["shapes"][TIMM[backbone]]
