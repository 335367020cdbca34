"""RegNetY: the published sizes, pycls's names and numbers."""

import pytest
import torch

from streamlearn.contract.errors import ConfigError
from streamlearn.learn.backbones import build, names
from streamlearn.learn.backbones.regnet import REGNETY, anynet

# stage depths, stage widths, groups, trunk parameters (None: too large to build in a test)
PUBLISHED = {
    "regnety-200mf": ((1, 1, 4, 7), (24, 56, 152, 368), (3, 7, 19, 46), 2_793_996),
    "regnety-400mf": ((1, 3, 6, 6), (48, 104, 208, 440), (6, 13, 26, 55), 3_903_144),
    "regnety-8gf": ((2, 4, 10, 1), (168, 448, 896, 2016), (3, 8, 16, 36), 37_163_068),
    "regnety-16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), (2, 4, 11, 27), 80_565_140),
    "regnety-32gf": ((2, 5, 12, 1), (232, 696, 1392, 3712), (1, 3, 6, 16), 141_333_770),
    "regnety-64gf": ((2, 5, 12, 1), (328, 984, 1968, 4920), (1, 3, 6, 15), None),
    "regnety-128gf": ((2, 7, 17, 1), (528, 1056, 2904, 7392), (2, 4, 11, 28), None),
    "regnety-256gf": ((2, 7, 17, 1), (746, 1492, 4103, 10444), (2, 4, 11, 28), None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_stages_and_parameters_are_the_published_ones(name):
    depths, widths, groups, count = PUBLISHED[name]
    stages = REGNETY[name]
    assert (stages.depths, stages.widths) == (depths, widths)
    assert tuple(w // g for w, g in zip(widths, stages.group_widths, strict=True)) == groups
    if count is not None:
        with torch.device("meta"):
            trunk = build(name)
        assert sum(p.numel() for p in trunk.parameters()) == count


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_the_trunk_is_pycls_without_its_head(stem):
    trunk = build("regnety-200mf", stem).eval()
    bare = anynet(REGNETY["regnety-200mf"], stem).eval()
    missing, unexpected = bare.load_state_dict(trunk.state_dict(), strict=False)
    assert missing == ["head.fc.weight", "head.fc.bias"] and unexpected == []
    bare.head.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(trunk(x), bare(x), atol=1e-5, rtol=1e-5)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"model.backbone = 'resnet50': unknown; one of .*regnety-16gf"):
        build("resnet50")
    assert "regnety-256gf" in names()
