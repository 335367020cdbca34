"""Checkpoints of others are read in every layout they come in, and nothing in them is ever run."""

import io
import os
import pickle

import pytest
import safetensors.torch
import torch

from streamlearn.contract.config import Config, ModelConfig
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.registry import OciLayout
from streamlearn.learn.backbones import build
from streamlearn.learn.warm import backbone_of, complaints
from streamlearn.snapshots.publish import publish
from streamlearn.snapshots.pull import pull
from streamlearn.snapshots.warm import _sorted, from_file, read
from tests.snapshots.others import PARAMETERS, Timm, Vissl, VisslHead, seeded, vissl_checkpoint
from tests.snapshots.test_package import large

NAME = "regnety-200mf"


def trunk(parts=0):
    return seeded(Vissl(NAME, parts))


def head():
    return seeded(VisslHead([368, 16, 8], prototypes=6, use_bn=True), seed=1)


def bare():
    return {name.removeprefix("_feature_blocks."): tensor for name, tensor in trunk().state_dict().items()}


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def extractor():
    """VISSL's model for feature extraction: the trunk is inside another."""
    checkpoint = vissl_checkpoint(trunk(), head())
    model = checkpoint["classy_state_dict"]["base_model"]["model"]
    model["trunk"] = under("base_model.", model["trunk"])
    return checkpoint


def timm_model():
    model = seeded(Timm(NAME))
    return dict(model.state_dict()) | {"head.fc.weight": torch.zeros(10, 368), "head.fc.bias": torch.zeros(10)}


LAYOUTS = {
    "a public SEER checkpoint": (lambda: vissl_checkpoint(trunk(), head()), "vissl"),
    "consolidated from FSDP": (lambda: vissl_checkpoint(trunk(parts=3), head()), "vissl"),
    "a trunk without heads": (lambda: vissl_checkpoint(trunk()), "vissl"),
    "a feature extractor": (extractor, "vissl"),
    "model_state_dict": (lambda: {"model_state_dict": dict(trunk().state_dict())}, "vissl"),
    "converted for torch.hub, bare": (bare, "vissl"),
    "converted for torch.hub, in model": (lambda: {"model": bare()}, "vissl"),
    "under DistributedDataParallel": (lambda: {"state_dict": under("module.trunk.", trunk().state_dict())}, "vissl"),
    "timm, with a classifier": (timm_model, "timm"),
    "pycls": (lambda: {"epoch": 3, "model_state": dict(seeded(build(NAME)).state_dict()), "optimizer_state": {}, "cfg": "{}"}, "pycls"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_whole_trunk_and_computes_what_its_own_network_computes(layout, tmp_path):
    make, whose = LAYOUTS[layout]
    torch.save(make(), tmp_path / "some.torch")
    warm = from_file(tmp_path / "some.torch")
    ours = build(NAME)
    ours.load_state_dict(warm.trunk, strict=True)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    theirs = {"vissl": trunk(), "timm": seeded(Timm(NAME)), "pycls": seeded(build(NAME))}[whose]
    with torch.inference_mode():
        assert torch.equal(ours.eval()(x), theirs(x))
    assert warm.layout == whose and warm.source == "some.torch" and warm.digest.startswith("sha256:")


def test_heads_and_prototypes_are_told_from_the_trunk_and_the_rest_is_named(tmp_path):
    torch.save(vissl_checkpoint(trunk(), head()), tmp_path / "a.torch")
    warm = from_file(tmp_path / "a.torch")
    assert set(warm.head) == {f"0.{k}" for k in ("weight", "bias")} | {f"3.{k}" for k in ("weight", "bias")} | {
        f"1.{k}" for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert warm.prototypes.shape == (6, 8) and warm.left == ()
    torch.save(timm_model(), tmp_path / "b.pth")
    assert from_file(tmp_path / "b.pth").left == ("head.fc.weight", "head.fc.bias")


@pytest.mark.parametrize("backbone", [b for b in PARAMETERS if b.endswith("gf") and float(b[8:-2]) >= 8])
def test_every_size_of_seer_fits_the_config_of_its_name_and_no_other(backbone):
    """On the meta device: 1.3 billion parameters are compared by shape and never made."""
    with torch.device("meta"):
        ours, theirs, other = build(backbone), Vissl(backbone, parts=4), build("regnety-400mf")
    warm = _sorted(vissl_checkpoint(theirs), "seer.torch", "")
    config = Config(model=ModelConfig(backbone=backbone))
    assert complaints(ours, warm.trunk, "trunk", config) == [] and backbone_of(warm.trunk) == backbone
    said = "\n".join(complaints(other, warm.trunk, "trunk", Config(model=ModelConfig(backbone="regnety-400mf"))))
    assert f"set model.backbone = '{backbone}', whose trunk it is (here: 'regnety-400mf')" in said
    assert "trunk.s1.b1.proj.weight: (" in said and "more of another shape" in said


class Burglar:
    def __reduce__(self):
        return os.mkdir, ("burgled",)


def test_a_pickle_that_would_run_something_is_refused_by_the_name_of_what_it_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for new in (True, False):
        torch.save(vissl_checkpoint(trunk()) | {"config": Burglar()}, tmp_path / "a.torch", _use_new_zipfile_serialization=new)
        with pytest.raises(
            ConfigError, match=r"a\.torch': refused: its pickle calls posix\.mkdir, which could do anything; convert it where you trust it"
        ):
            from_file(tmp_path / "a.torch")
        assert not (tmp_path / "burgled").exists()
    torch.load(tmp_path / "a.torch", weights_only=False)
    assert (tmp_path / "burgled").exists()  # the control: it was armed


def test_the_old_format_of_torch_is_read_too(tmp_path):
    torch.save(vissl_checkpoint(trunk(), head()), tmp_path / "old.torch", _use_new_zipfile_serialization=False)
    assert len(from_file(tmp_path / "old.torch").trunk) == len(build(NAME).state_dict())


def whole(content):
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


BROKEN = {
    "an empty file": (b"", r"not a checkpoint that torch can read"),
    "half a file": (whole(bare())[:100_000], r"not a checkpoint that torch can read"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(500), r"(refused|not a checkpoint that torch can read)"),
    "a list": (whole([torch.zeros(3)]), r"holds a list, not a state dict"),
    "a ResNet": (
        whole({"layer1.0.conv1.weight": torch.zeros(2)}),
        r"no RegNet under names of VISSL, timm or pycls; it holds layer1\.0\.conv1\.weight",
    ),
    "nothing": (whole({}), r"it holds no tensor at all"),
    "a list of shards": (
        whole({"type": "shard_list", "shards": ["a", "b"]}),
        r"a VISSL checkpoint of type 'shard_list': consolidate it first",
    ),
    "two models": (whole({"model": bare() | dict(trunk().state_dict())}), r"two tensors are stem\.conv\.weight"),
    "plain pickle": (pickle.dumps({"a": 1}), r"(refused|not a checkpoint)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_checkpoint_is_refused_by_name_and_reason(what, tmp_path):
    data, why = BROKEN[what]
    (tmp_path / "x.torch").write_bytes(data)
    with pytest.raises(ConfigError, match=r"train\.init = .*x\.torch'.*" + why):
        from_file(tmp_path / "x.torch")


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.init = '.*nowhere\.torch': no such file"):
        from_file(tmp_path / "nowhere.torch")
    with pytest.raises(ConfigError, match=r"model\.safetensors': no such file"):
        from_file(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678" * 9)
    with pytest.raises(Corrupt, match="not a safetensors file"):
        from_file(tmp_path)


def test_a_snapshot_is_a_beginning_too_by_tag_digest_folder_or_file(tmp_path):
    registry = OciLayout(tmp_path / "registry")
    _, digest = publish(registry, large(9))
    pull(registry, "candidate", tmp_path / "pulled")
    safetensors.torch.save_file({n: t.contiguous() for n, t in trunk().state_dict().items()}, tmp_path / "vissl.safetensors")
    found = [read(init, registry) for init in ("candidate", digest, str(tmp_path / "pulled"), str(tmp_path / "pulled/model.safetensors"))]
    for warm in found:
        assert warm.layout == "timm" and all(torch.equal(warm.trunk[n], t) for n, t in large().weights.items())
    assert found[0].source == "candidate of step 9" and found[0].digest == digest
    assert read(str(tmp_path / "vissl.safetensors"), registry).layout == "vissl"
    with pytest.raises(ConfigError, match=r"train\.init = 'seer': .*no tag 'seer'.*; a path has a slash: \./seer"):
        read("seer", registry)
