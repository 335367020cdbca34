"""What an export writes computes what the trunk computes, to the last bit where the arithmetic is torch's; and it overwrites nothing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.contract.errors import ConfigError, NotFound
from streamlearn.contract.registry import OciLayout
from streamlearn.learn.backbones import build
from streamlearn.snapshots import keys
from streamlearn.snapshots.export import FILES, FORMATS, export
from streamlearn.snapshots.publish import publish, record_result
from streamlearn.snapshots.pull import pull
from streamlearn.snapshots.trunk import load_folder, load_trunk
from tests.conftest import REPO, missing
from tests.snapshots.others import Timm, Vissl, seeded
from tests.snapshots.test_package import large
from tests.snapshots.test_publish import export as small


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """`stable`: one that timm has.  `candidate`: the demo's, which it has not."""
    registry = OciLayout(tmp_path_factory.mktemp("home") / "registry")
    _, digest = publish(registry, large(3))
    registry.tag(digest, "stable")
    publish(registry, small(5, weights=seeded(build("regnety-tiny", "cifar")).state_dict()))
    result = {
        "bank": "birds",
        "bank_digest": "sha256:b",
        "protocol": "knn-k20/1",
        "knn": 0.51234,
        "raw_knn": 0.25,
        "random_knn": 0.3,
        "ridge": 0.6,
    }
    record_result(registry, digest, result)
    return registry


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(memory_format=torch.channels_last)


def loaded(model, weights):
    model.load_state_dict(weights, strict=True)
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def features(trunk, x):
    return trunk(x).flatten(1)


def test_timm_s_folder_opens_in_timm_s_structure_with_difference_zero(registry, tmp_path):
    folder, loading = export(registry, "stable", tmp_path / "timm", "timm")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "metrics.json", "model.safetensors"]
    x = images(2, 3, 96, 64)
    model = loaded(Timm("regnety-200mf"), safetensors.torch.load_file(folder / "model.safetensors"))
    assert torch.equal(features(model, x), features(load_trunk(registry, "stable").eval(), x))
    assert torch.equal(features(load_folder(folder).eval(), x), features(model, x))
    assert f'timm.create_model("local-dir:{folder}", pretrained=True)' in loading


def test_a_snapshot_of_before_with_pycls_s_names_is_exported_under_timm_s(tmp_path, monkeypatch):
    old = OciLayout(tmp_path / "old")
    monkeypatch.setattr(keys, "timm_architecture", lambda *_: "")
    publish(old, large(3))
    monkeypatch.undo()
    pull(old, "candidate", tmp_path / "pulled")
    before = json.loads((tmp_path / "pulled" / "config.json").read_text())
    assert before["streamlearn"]["keys"] == "pycls" and "s1.b1.f.a.weight" in safetensors.torch.load_file(
        tmp_path / "pulled" / "model.safetensors"
    )
    folder, _ = export(old, "candidate", tmp_path / "timm", "timm")
    after = json.loads((folder / "config.json").read_text())
    assert after["streamlearn"]["keys"] == "timm" and after["architecture"] == "regnety_002"
    assert set(safetensors.torch.load_file(folder / "model.safetensors")) == set(Timm("regnety-200mf").state_dict())
    assert "library_name: timm" in (folder / "README.md").read_text()


def test_vissl_s_file_opens_in_vissl_s_structure_with_difference_zero(registry, tmp_path):
    folder, _ = export(registry, "stable", tmp_path / "vissl", "vissl")
    state = torch.load(folder / "model.torch", weights_only=True)
    assert state["type"] == "consolidated" and state["classy_state_dict"]["base_model"]["model"]["heads"] == {}
    x = images(2, 3, 64, 64)
    model = loaded(Vissl("regnety-200mf"), state["classy_state_dict"]["base_model"]["model"]["trunk"])
    assert torch.equal(features(model, x), features(load_trunk(registry, "stable").eval(), x))
    trunk = json.loads((folder / "config.yaml").read_text())["config"]["MODEL"]["TRUNK"]["REGNET"]
    assert trunk["depths"] == [1, 1, 4, 7] and trunk["group_widths"] == [8, 8, 8, 8]


PYCLS = """
import json, sys, torch
from pycls.core import builders, checkpoint
from pycls.core.config import cfg
cfg.merge_from_file(sys.argv[1] + "/config.yaml")
model = builders.build_model()
assert checkpoint.load_checkpoint(sys.argv[1] + "/model.pyth", model) == 0
assert model.head.fc.weight.shape[0] == int(sys.argv[4]) and not model.head.fc.weight.any()
model.head.fc = torch.nn.Identity()
model = model.eval().to(memory_format=torch.channels_last)
with torch.inference_mode():
    torch.save(model(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""
TORCH = """
import sys, torch
trunk = torch.export.load(sys.argv[1] + "/model.pt2").module()
with torch.inference_mode():
    torch.save(trunk(torch.load(sys.argv[2], weights_only=True)), sys.argv[3])
"""


def elsewhere(code, folder, x, tmp_path, *more):
    """The output of a fresh process that knows nothing of ours."""
    torch.save(x, tmp_path / "x.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    argv = [sys.executable, "-c", code, str(folder), str(tmp_path / "x.pt"), str(tmp_path / "y.pt"), *more]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "y.pt", weights_only=True)


@pytest.mark.parametrize(("tag", "size"), [("stable", 64), ("candidate", 32)])
def test_pycls_loads_its_file_by_its_own_means_with_difference_zero(registry, tmp_path, tag, size):
    folder, _ = export(registry, tag, tmp_path / "pycls", "pycls", classes=7)
    x = images(2, 3, size, size)
    assert torch.equal(elsewhere(PYCLS, folder, x, tmp_path, "7"), features(load_trunk(registry, tag).eval(), x))


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "shapes"), [("candidate", [(1, 3, 32, 32), (5, 3, 32, 32), (3, 3, 48, 40)]), ("stable", [(2, 3, 96, 64)])])
def test_the_exported_program_gives_difference_zero_in_a_fresh_process_for_any_batch_and_size(registry, tmp_path, tag, shapes):
    folder, _ = export(registry, tag, tmp_path / "pt2", "torch-export")
    trunk = load_trunk(registry, tag).eval()
    for shape in shapes:
        assert torch.equal(elsewhere(TORCH, folder, images(*shape), tmp_path), features(trunk, images(*shape)))


def test_onnx_computes_the_same_to_float_rounding_for_any_batch_and_size(registry, tmp_path):
    try:
        import onnx
        import onnxruntime
    except ImportError as e:
        missing(f"{e.name} is not installed: pip install -c constraints.txt onnx onnxscript onnxruntime")
    folder, _ = export(registry, "candidate", tmp_path / "onnx", "onnx")
    model = onnx.load(folder / "model.onnx")
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (model.graph.input[0], model.graph.output[0])]
    assert dims == [["batch", 3, "height", "width"], ["batch", 368]]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    trunk = load_trunk(registry, "candidate").eval()
    for shape in [(1, 3, 32, 32), (5, 3, 32, 32), (3, 3, 48, 40)]:
        x = images(*shape)
        (found,) = session.run(["features"], {"images": np.ascontiguousarray(x.numpy())})
        want = features(trunk, x).numpy()
        assert found.shape == want.shape and np.abs(found - want).max() <= 2e-5 * np.abs(want).max()


def test_where_onnx_is_not_installed_the_extra_is_named_and_nothing_is_left(registry, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"--to onnx: the package onnx is not installed: pip install 'streamlearn\[export\]'"):
        export(registry, "candidate", tmp_path / "onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_timm_is_not_told_a_network_that_it_cannot_build(registry, tmp_path):
    with pytest.raises(ConfigError, match=r"timm has no regnety-tiny, .*--to pycls, onnx or torch-export"):
        export(registry, "candidate", tmp_path / "x", "timm")
    publish(registry, small(6, weights=seeded(build("regnety-200mf", "cifar")).state_dict(), backbone="regnety-200mf"))
    with pytest.raises(ConfigError, match="timm has no cifar stem"):
        export(registry, "0.6.0", tmp_path / "x", "timm")
    with pytest.raises(NotFound):
        export(registry, "nothing", tmp_path / "x", "pycls")
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_copy_has_the_probes_and_its_own_way_to_load_it(registry, tmp_path):
    for to in ("timm", "pycls"):
        folder, _ = export(registry, "stable", tmp_path / to, to)
        card = (folder / "README.md").read_text()
        assert (
            "| birds | knn-k20/1 | 0.5123 | 0.2500 | 0.3000 | 0.6000 |" in card
            and "Not known" not in card
            and f"library_name: {to}" in card
        )
        assert ("builders.build_model()" in card) == (to == "pycls") and card.count("## Load it") == 1
    export(registry, "candidate", tmp_path / "plain", "pycls")
    assert "Not known when this card was written" in (tmp_path / "plain" / "README.md").read_text()


def test_nothing_is_overwritten_unless_asked_and_then_only_an_export(registry, tmp_path):
    folder = tmp_path / "here"
    export(registry, "stable", folder, "timm")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"here: exists already; name another folder, or replace it with --force"):
        export(registry, "candidate", folder, "pycls")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    export(registry, "candidate", folder, "pycls", force=True)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.yaml", "metrics.json", "model.pyth"]
    (folder / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which no export writes"):
        export(registry, "candidate", folder, "pycls", force=True)
    (folder / "thesis.tex").unlink()
    (folder / "config.json").mkdir()  # the name of a file, but a folder: whose?
    with pytest.raises(ConfigError, match=r"holds config\.json"):
        export(registry, "candidate", folder, "pycls", force=True)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match="not a folder of its own"):
        export(registry, "candidate", tmp_path / "link", "pycls", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link"] and (folder / "model.pyth").exists()


def test_an_export_that_fails_half_way_leaves_no_folder_and_keeps_the_old_one(registry, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    export(registry, "stable", folder, "timm")

    class Killed(BaseException): ...

    def dying(*_):
        raise Killed

    for step in (torch, "save"), (OciLayout, "copy_blob"), (OciLayout, "read_blob"):
        monkeypatch.setattr(*step, dying)
        with pytest.raises(Killed):
            export(registry, "stable", folder, "pycls", force=True)
        monkeypatch.undo()
        assert [p.name for p in tmp_path.iterdir()] == ["here"] and (folder / "model.safetensors").exists()


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_others_may_read_what_is_written_whatever_the_umask(registry, tmp_path, umask):
    before = os.umask(umask)
    try:
        folder, _ = export(registry, "stable", tmp_path / "x", "timm")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o644"}


def test_the_command_writes_says_what_and_says_what_to_type_next(registry, tmp_path):
    with CliRunner().isolated_filesystem(tmp_path):
        done = CliRunner().invoke(cli, ["snapshots", "export", "stable", "--to", "vissl", "--home", str(registry.root.parent)])
        assert done.exit_code == 0, done.output
        assert (
            "test-0.3.0-vissl/model.torch  (1" in done.output
            and 'torch.load("test-0.3.0-vissl/model.torch", weights_only=True)' in done.output
        )
        again = CliRunner().invoke(cli, ["snapshots", "export", "stable", "--to", "vissl", "--home", str(registry.root.parent)])
        assert isinstance(again.exception, ConfigError) and "--force" in str(again.exception)
    from streamlearn.cli.snapshots import FORMATS as offered

    assert set(offered) == set(FORMATS)


def test_the_library_s_folder_of_a_pull_opens_too_and_others_are_refused_by_name(registry, tmp_path):
    pull(registry, "stable", tmp_path / "pulled")
    x = images(1, 3, 64, 64)
    assert torch.equal(features(load_folder(tmp_path / "pulled").eval(), x), features(load_trunk(registry, "stable").eval(), x))
    assert {p.name for p in (tmp_path / "pulled").iterdir()} <= FILES
    with pytest.raises(ConfigError, match=r"not a snapshot's folder, it has no config\.json"):
        load_folder(REPO)
