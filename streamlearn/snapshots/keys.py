"""What the same RegNetY tensors are called elsewhere: pycls (ours), timm, VISSL (the public SEER checkpoints), ClassyVision.

Names are mapped one by one, by their parts; nothing is guessed from order or shape.  Sources: pycls/models/anynet.py, timm/models/regnet.py,
vissl/models/trunks/{regnet,regnet_fsdp}.py with classy_vision/models/{anynet,regnet}.py.
"""

import re

# pycls's name -> timm's.  Only these, and only with the ImageNet stem: timm's stem and stages have strides of 2 and cannot be told otherwise.
TIMM = {f"regnety-{mf}mf": f"regnety_{mf // 100:03d}" for mf in (200, 400, 600, 800)}
TIMM |= {f"regnety-{gf:g}gf": f"regnety_{round(gf * 10):03d}" for gf in (1.6, 3.2, 4, 6.4, 8, 12, 16, 32, 64, 128, 256)}

# of one block: pycls, timm, VISSL
BLOCK = (
    ("f.a", "conv1.conv", "f.a.0"),
    ("f.a_bn", "conv1.bn", "f.a.1"),
    ("f.b", "conv2.conv", "f.b.0"),
    ("f.b_bn", "conv2.bn", "f.b.1"),
    ("f.se.f_ex.0", "se.fc1", "f.se.excitation.0"),
    ("f.se.f_ex.2", "se.fc2", "f.se.excitation.2"),
    ("f.c", "conv3.conv", "f.c"),
    ("f.c_bn", "conv3.bn", "f.final_bn"),
    ("proj", "downsample.conv", "proj"),
    ("bn", "downsample.bn", "bn"),
)
TO_TIMM = {ours: timm for ours, timm, _ in BLOCK}
TO_VISSL = {ours: vissl for ours, _, vissl in BLOCK}
FROM_TIMM = {timm: ours for ours, timm, _ in BLOCK}
FROM_VISSL = {vissl: ours for ours, _, vissl in BLOCK}
STEM = {"conv": "0", "bn": "1"}  # pycls and timm, VISSL's place in its Sequential

LEAF = r"(?P<leaf>weight|bias|running_mean|running_var|num_batches_tracked)"
OURS = re.compile(rf"s(?P<stage>\d+)\.b(?P<block>\d+)\.(?P<part>.+)\.{LEAF}")  # pycls's and timm's blocks
OUR_STEM = re.compile(rf"stem\.(?P<part>conv|bn)\.{LEAF}")
# VISSL: res2 is stage 1 and counts its blocks from 0; FSDP trunks put their blocks into parts.  ClassyVision: the same, under trunk_output
VISSL = re.compile(rf"(?:res\d+|trunk_output\.block\d+)\.(?:block\d+-part\d+\.)?block(?P<stage>\d+)-(?P<block>\d+)\.(?P<part>.+)\.{LEAF}")
VISSL_STEM = re.compile(rf"(?:conv1|stem)\.stem\.(?P<part>[01])\.{LEAF}")
# put before or between the names by wrappers: DDP, VISSL's feature extractor and trunk, FSDP, activation checkpointing
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|trunk|base_model|_feature_blocks|_fsdp_wrapped_module|_fpw_module)\.")


def timm_architecture(backbone: str, stem: str, norm: str = "bn") -> str:
    """timm's name of the architecture; empty where timm has no such model."""
    return TIMM.get(backbone, "") if stem == "imagenet" and norm == "bn" else ""


def layout(backbone: str, stem: str, norm: str = "bn") -> str:
    """Whose names the tensors of a snapshot have: those of a program that computes the same from them.

    With standardised weights (learn/backbones/norms.py) there is none but ours, though the names are made as pycls's are.
    """
    return "streamlearn" if norm != "bn" else "timm" if timm_architecture(backbone, stem) else "pycls"


def to_timm(name: str) -> str:
    """Raises KeyError for a name that is not of our trunk."""
    return _translated(name, TO_TIMM)


def to_vissl(name: str) -> str:
    """As `classy_state_dict/base_model/model/trunk` has it.  Raises KeyError for a name that is not of our trunk."""
    if stem := OUR_STEM.fullmatch(name):
        return f"_feature_blocks.conv1.stem.{STEM[stem['part']]}.{stem['leaf']}"
    at = OURS.fullmatch(name)
    if at is None:
        raise KeyError(name)
    stage, block = int(at["stage"]), int(at["block"])
    return f"_feature_blocks.res{stage + 1}.block{stage}-{block - 1}.{TO_VISSL[at['part']]}.{at['leaf']}"


def recognised(name: str) -> tuple[str, str] | None:
    """(pycls's name, whose name it was) of a trunk's tensor in any of the layouts; None for anything else (heads, classifiers)."""
    name = WRAPPERS.sub("", name)
    if stem := OUR_STEM.fullmatch(name):
        return name, ""  # pycls and timm agree
    if stem := VISSL_STEM.fullmatch(name):
        return f"stem.{'conv' if stem['part'] == '0' else 'bn'}.{stem['leaf']}", "vissl"
    if (at := VISSL.fullmatch(name)) and at["part"] in FROM_VISSL:
        return f"s{at['stage']}.b{int(at['block']) + 1}.{FROM_VISSL[at['part']]}.{at['leaf']}", "vissl"
    if at := OURS.fullmatch(name):
        if at["part"] in FROM_TIMM:
            return _translated(name, FROM_TIMM), "timm"
        if at["part"] in TO_TIMM:
            return name, "pycls"
    return None


def _translated(name: str, parts: dict[str, str]) -> str:
    if OUR_STEM.fullmatch(name):
        return name
    at = OURS.fullmatch(name)
    if at is None:
        raise KeyError(name)
    return f"s{at['stage']}.b{at['block']}.{parts[at['part']]}.{at['leaf']}"
