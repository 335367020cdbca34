"""A snapshot without BatchNorm: no framework is told that it has the network, and what can hold it computes the same."""

import json

import pytest
import safetensors.torch
import torch

from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.registry import OciLayout
from streamlearn.learn.backbones import build
from streamlearn.probes.measure import open_snapshot
from streamlearn.snapshots.export import export
from streamlearn.snapshots.package import files
from streamlearn.snapshots.publish import publish
from streamlearn.snapshots.trunk import filled, load_folder, load_trunk
from streamlearn.snapshots.warm import read
from tests.snapshots.others import seeded
from tests.snapshots.test_package import large
from tests.snapshots.test_publish import export as small

NAME = "regnety-200mf"


def made(step=4, **more):
    """Of a size that timm, pycls and VISSL have with BatchNorm."""
    weights = seeded(build(NAME, norm="gn_ws")).state_dict()
    return small(step, weights=weights, backbone=NAME, stem="imagenet", norm="gn_ws", size=64, **more)


@pytest.fixture
def registry(tmp_path):
    registry = OciLayout(tmp_path / "registry")
    publish(registry, made())
    return registry


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_its_files_say_what_it_is_and_claim_no_framework():
    contents = files(made(), "")
    told = json.loads(contents["config.json"])
    assert told["streamlearn"]["norm"] == "gn_ws" and told["streamlearn"]["keys"] == "streamlearn"
    assert told["architecture"] == f"{NAME}-gn_ws"
    assert set(safetensors.torch.load(contents["model.safetensors"])) == set(build(NAME, norm="gn_ws").state_dict())
    card = contents["README.md"].decode()
    assert "GroupNorm and standardised weights" in card and "re-estimated" not in card and "timm.create_model" not in card
    assert "library_name: streamlearn" in card and "VISSL" not in card
    assert "norm" not in json.loads(files(large(1), "")["config.json"])["streamlearn"]  # as it was for those with BatchNorm


@pytest.mark.parametrize("to", ["timm", "pycls", "vissl"])
def test_who_has_no_such_network_is_not_given_its_names(registry, tmp_path, to):
    with pytest.raises(
        ConfigError, match=rf"--to {to}: candidate has model\.norm = 'gn_ws' .*{to} has no such RegNet.*--to onnx or torch-export"
    ):
        export(registry, "candidate", tmp_path / to, to)
    assert not (tmp_path / to).exists()


def test_what_comes_back_from_registry_folder_and_torch_export_computes_the_same(registry, tmp_path):
    x, trunk = images(3, 3, 64, 64), seeded(build(NAME, norm="gn_ws")).eval()
    folder, _ = export(registry, "candidate", tmp_path / "pt2", "torch-export")
    plain = tmp_path / "pulled"
    plain.mkdir()
    for name, data in files(made(), "").items():
        (plain / name).write_bytes(data)
    with torch.inference_mode():
        want = trunk(x)
        for found in (load_trunk(registry, "candidate").eval(), load_folder(plain).eval()):
            assert torch.equal(found(x), want)
    program = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), want.clone(), rtol=1e-4, atol=1e-4)


def test_its_tensors_under_the_wrong_norm_are_refused():
    contents = files(made(), "")
    settings, weights = json.loads(contents["config.json"]), safetensors.torch.load(contents["model.safetensors"])
    del settings["streamlearn"]["norm"]
    with pytest.raises(Corrupt, match=r"norm bn: (.|\n)*running_mean"):
        filled(settings, weights, "here")


def test_a_run_may_begin_with_it(registry):
    warm = read("candidate", registry)
    assert set(warm.trunk) == set(build(NAME, norm="gn_ws").state_dict()) and warm.left == ()


def test_the_probes_open_it_and_one_that_has_timm_s_names(registry):
    _, digest = publish(registry, large(9))
    known = {
        found.norm: found.trunk
        for found in (open_snapshot(registry, 4, registry.manifest("0.4.0")[0].digest), open_snapshot(registry, 9, digest))
    }
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        for norm, trunk in known.items():
            assert torch.equal(trunk(x), seeded(build(NAME, norm=norm)).eval()(x)), norm
