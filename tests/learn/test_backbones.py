"""RegNetY: the published sizes, pycls's names and numbers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from streamlearn.contract.config_file import load
from streamlearn.contract.errors import ConfigError
from streamlearn.learn.backbones import build, names
from streamlearn.learn.backbones.regnet import REGNETY, anynet
from streamlearn.learn.model import Model
from streamlearn.learn.objectives import build_objective

# stage depths, stage widths, groups, parameters of the trunk, and its multiply-adds (millions) at 224, 160 and 96 px.  Published: the depths,
# widths and group widths of pycls's and VISSL's yaml files; what they come to agrees with reference tables to all their digits
PUBLISHED = {
    "regnety-200mf": ((1, 1, 4, 7), (24, 56, 152, 368), (3, 7, 19, 46), 2_793_996, (199, 102, 37)),
    "regnety-400mf": ((1, 3, 6, 6), (48, 104, 208, 440), (6, 13, 26, 55), 3_903_144, (401, 205, 74)),
    "regnety-8gf": ((2, 4, 10, 1), (168, 448, 896, 2016), (3, 8, 16, 36), 37_163_068, (7_961, 4_064, 1_466)),
    "regnety-16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), (2, 4, 11, 27), 80_565_140, (15_908, 8_122, 2_930)),
    "regnety-32gf": ((2, 5, 12, 1), (232, 696, 1392, 3712), (1, 3, 6, 16), 141_333_770, (32_276, 16_475, 5_940)),
    "regnety-64gf": ((2, 5, 12, 1), (328, 984, 1968, 4920), (1, 3, 6, 15), 276_457_786, (64_065, 32_701, 11_791)),
    "regnety-128gf": ((2, 7, 17, 1), (528, 1056, 2904, 7392), (2, 4, 11, 28), 637_419_894, (127_510, 65_097, 23_488)),
    "regnety-256gf": ((2, 7, 17, 1), (746, 1492, 4103, 10444), (2, 4, 11, 28), 1_272_156_138, (254_374, 129_865, 46_858)),
    "regnety-10b": ((2, 7, 17, 1), (2020, 4040, 11110, 28280), (2, 4, 11, 28), 9_323_934_872, (1_863_285, 951_254, 343_234)),
}
# millions of parameters in SEER's heads, the 16 000 prototypes included
HEADS = {"8gf": 30.2, "16gf": 34.3, "32gf": 37.1, "64gf": 113.6, "128gf": 133.9, "256gf": 158.9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_stages_parameters_and_multiply_adds_are_the_published_ones(name):
    depths, widths, groups, count, mega_macs = PUBLISHED[name]
    stages = REGNETY[name]
    assert (stages.depths, stages.widths) == (depths, widths)
    assert tuple(w // g for w, g in zip(widths, stages.group_widths, strict=True)) == groups
    with torch.device("meta"):  # nothing is allocated
        trunk = build(name)
    assert trunk.width == widths[-1] and sum(p.numel() for p in trunk.parameters()) == count
    found = []
    for size in (224, 160, 96):
        with FlopCounterMode(display=False) as counter:
            assert trunk(torch.empty(1, 3, size, size, device="meta")).shape == (1, widths[-1])
        found.append(round(counter.get_total_flops() / 2e6))
    assert tuple(found) == mega_macs


def test_the_papers_256gf_is_the_128gf_model_and_the_released_one_is_twice_as_large():
    """arXiv:2103.01988, section 3.2, quotes these depths, widths and 695.5 M parameters for its "RegNetY-256GF"."""
    paper = ((2, 7, 17, 1), (528, 1056, 2904, 7392))
    assert (REGNETY["regnety-128gf"].depths, REGNETY["regnety-128gf"].widths) == paper
    assert REGNETY["regnety-256gf"].depths == paper[0] and REGNETY["regnety-256gf"].widths != paper[1]
    assert PUBLISHED["regnety-256gf"][3] / PUBLISHED["regnety-128gf"][3] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("size", HEADS)
def test_seers_heads_have_their_size(size):
    config = load(None, env={}, overrides={"preset": f"seer-regnety-{size}"})
    with torch.device("meta"):
        model = Model(config.model)
        objective = build_objective(config.objective, model.embedding)
    assert round(sum(p.numel() for p in (*model.head.parameters(), *objective.parameters())) / 1e6, 1) == HEADS[size]


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
