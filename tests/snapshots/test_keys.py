"""Whose names the tensors have: every size, every tensor, both ways, against structures written anew."""

import pytest
import torch

from streamlearn.learn.backbones import build
from streamlearn.snapshots import keys
from tests.snapshots.others import PARAMETERS, Timm, Vissl, seeded


def built(make, *args):
    with torch.device("meta"):  # 1.3 billion parameters are not made
        return {name: tensor.shape for name, tensor in make(*args).state_dict().items()}


@pytest.mark.parametrize("backbone", PARAMETERS)
def test_every_tensor_of_every_size_has_its_name_and_shape_in_timm_and_vissl(backbone):
    ours = built(build, backbone)
    assert {keys.to_timm(name): shape for name, shape in ours.items()} == built(Timm, backbone)
    assert {keys.to_vissl(name): shape for name, shape in ours.items()} == built(Vissl, backbone)


@pytest.mark.parametrize("backbone", ["regnety-200mf", "regnety-8gf", "regnety-16gf", "regnety-256gf"])
def test_every_name_of_others_is_recognised_whatever_wraps_it(backbone):
    ours = set(built(build, backbone))
    others = [ours, built(Timm, backbone), built(Vissl, backbone), built(Vissl, backbone, 2)]
    without = {name.removeprefix("_feature_blocks.") for name in others[2]}  # VISSL's own converter takes it off
    classy = {name.replace("conv1.", "stem.", 1).replace("res2.", "trunk_output.block1.", 1) for name in without}
    for whose, names in [
        ("pycls", others[0]),
        ("timm", others[1]),
        ("vissl", others[2]),
        ("vissl", others[3]),
        ("vissl", without),
        ("vissl", classy),
    ]:
        for wrap in ("", "module.", "trunk.", "module.trunk.base_model.", "_fpw_module."):
            found = [keys.recognised(wrap + name) for name in names]
            assert {name for name, _ in found} == ours and {who for _, who in found} - {""} == {whose}


def test_what_is_not_of_a_trunk_is_not_recognised():
    for name in [
        "head.fc.weight",
        "fc.weight",
        "s1.b1.f.d.weight",
        "layer1.0.conv1.weight",
        "heads.0.prototypes0.weight",
        "s1.b1.conv1.weight",
        "",
    ]:
        assert keys.recognised(name) is None
    for to in (keys.to_timm, keys.to_vissl):
        with pytest.raises(KeyError):
            to("head.fc.weight")


def test_the_same_tensors_under_their_names_compute_the_same_to_the_last_bit():
    """Not only names: strides, groups, the order of layers and the width of the squeeze."""
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    trunk = seeded(build("regnety-200mf"))
    with torch.inference_mode():
        want = trunk(x)
        for other, name in ((Timm("regnety-200mf"), keys.to_timm), (Vissl("regnety-200mf"), keys.to_vissl)):
            other.load_state_dict({name(n): t for n, t in trunk.state_dict().items()}, strict=True)
            assert torch.equal(other.eval().to(memory_format=torch.channels_last)(x), want)
    assert want.std() > 0
