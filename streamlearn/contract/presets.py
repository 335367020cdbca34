"""Recipes by name: what `preset = "…"` in a configuration stands for.  Every number says where it is from.

A preset gives defaults: keys of the file, of the environment and of the command line win over it (contract/config_file.py).  It
holds the recipe (views, model, objective, optimizer), never sources, places or how long to keep what.

Sources: VISSL is facebookresearch/vissl, its pre-training configurations lie under configs/config/pretrain; swav is
facebookresearch/swav; "run name" is that of a released SEER model in VISSL's model zoo; "paper" is arXiv:2103.01988; "inferred" says
that nobody published the number.  SEER stepped its rate down by a cosine except for RegNetY-128GF, which was trained at a constant one;
here nobody knows the number of steps, and the rate is constant and halved on proved plateaus (train.plateau) for all.
"""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streamlearn.contract.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    key: str  # as in the file, dotted
    value: Any  # as TOML has it: lists and dicts, no tuples
    source: str


@dataclass(frozen=True)
class Preset:
    name: str
    what: str
    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()  # numbers of the recipe that are no keys here, and what to know

    def overlay(self) -> dict[str, Any]:
        """The settings as nested tables."""
        tables: dict[str, Any] = {}
        for setting in self.settings:
            at = tables
            *path, last = setting.key.split(".")
            for part in path:
                at = at.setdefault(part, {})
            at[last] = setting.value
        return tables

    def toml(self) -> str:
        """As a configuration file would say it, with the sources as comments."""
        lines = [f"# {self.name}: {self.what}", *(f"# {note}" for note in self.notes)]
        return "\n".join([*lines, *(f"{s.key} = {_toml(s.value)}  # {s.source}" for s in self.settings)]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    return "[" + ", ".join(_toml(v) for v in value) + "]" if isinstance(value, list) else json.dumps(value)


def _settings(rows: Iterable[tuple[str, Any, str]]) -> tuple[Setting, ...]:
    return tuple(Setting(*row) for row in rows)


BASE = "VISSL swav/swav_8node_resnet.yaml"
RUN_16 = "run name regnet16Gf_cosine_bs32_node16_sinkhorn10_proto16k_syncBN32_warmup2x"
RUN_128 = "run name regnet128Gf_cnstant_bs32_node16_sinkhorn10_proto16k_syncBN64_warmup8k"
RUN_256 = "run name cosine_rg256gf_noBNhead_wd1e5_fairstore_bs16_node64_sinkhorn10_proto16k_apex_syncBN64_warmup8k"
YAML_10B = "VISSL seer/models/regnet10B.yaml"
NN = "VISSL benchmark/nearest_neighbor/models/seer/"


def _crops(*rows: tuple[int, int, float, float]) -> list[dict[str, Any]]:
    return [{"count": count, "size": size, "scale": [low, high]} for count, size, low, high in rows]


_FAMILY = "inferred from the family, not published"
_WARM_16 = f"inferred from warmup2x: {BASE} warms up for 0.0128 of 244 000 steps"
_RATES = f"{BASE}: from 0.3 to 4.8"
_TWO = "The paper's section 3.2 quotes depths (2,7,17,1), widths (528,1056,2904,7392), 695.5 M parameters for its 'RegNetY-256GF'"
_BN_HEAD, _PLAIN_HEAD = [4096, 4096, 256], [8192, 8192, 256]
_HEAD_128, _HEAD_256 = "VISSL swav/heads/d7392_d8192_d8192_d256_proto16k.yaml", "VISSL swav/heads/d10444_d8192_d8192_d256_proto16k.yaml"
_CROPS = ("stream.crops", _crops((2, 224, 0.14, 1.0), (4, 96, 0.05, 0.14)), "VISSL swav/transforms/multicrop_2x224_4x96.yaml")
_SEER: tuple[tuple[str, Any, str], ...] = (  # what all of SEER's models share
    ("stream.jitter", 1.0, f"{BASE}: ImgPilColorDistortion strength"),
    ("stream.blur", 0.5, f"{BASE}: ImgPilGaussianBlur p, radius 0.1-2.0"),
    ("stream.mean", [0.485, 0.456, 0.406], BASE),
    ("stream.std", [0.229, 0.224, 0.225], f"{BASE}; swav's own code has 0.228"),
    ("model.stem", "imagenet", "VISSL's RegNet: 3x3 stride 2, 32 wide"),
    ("objective.kind", "swav", "paper, section 3.1"),
    ("objective.prototypes", 16000, "proto16k of the run names; 16000 in VISSL swav/heads/*_proto16k.yaml"),
    ("objective.temperature", 0.1, BASE),
    ("objective.sinkhorn_iterations", 10, f"sinkhorn10 of the run names; {YAML_10B}"),
    ("objective.hard_steps", 0, f"{YAML_10B}: temp_hard_assignment_iters"),
    ("objective.queue", 0, f"{BASE}: the batch is large enough"),
    ("objective.freeze_prototypes", 313, f"{BASE}: TEMP_FROZEN_PARAMS_ITER_MAP"),
    ("train.optim.kind", "lars", f"{BASE}: SGD with LARC, clip off"),
    ("train.optim.lr", 0.3, f"{BASE}: base_value"),
    ("train.optim.lr_batch", 256, f"{BASE}: base_lr_batch_size"),
    ("train.optim.momentum", 0.9, f"{BASE}; nesterov off"),
    ("train.optim.trust", 0.001, f"{BASE}: trust_coefficient"),
    ("train.optim.exclude", [], f"{BASE}: regularize_bn and regularize_bias, so nothing is left out"),
)


def _seer(size: str, rows: Iterable[tuple[str, Any, str]], *notes: str) -> Preset:
    backbone = ("model.backbone", f"regnety-{size}", "depth, w_0, w_a, w_m and group width: learn/backbones/regnet.py")
    name = "seer-10b" if size == "10b" else f"seer-regnety-{size}"
    return Preset(name, f"SEER on RegNetY-{size.upper()}", _settings((backbone, *rows, *_SEER)), notes)


SEER = (
    _seer(
        "8gf",
        (
            _CROPS,
            ("model.head", _BN_HEAD, NN + "regnet8gf.yaml"),
            ("model.head_norm", "bn", NN + "regnet8gf.yaml"),
            ("objective.epsilon", 0.05, BASE),
            ("train.batch", 4096, _FAMILY),
            ("train.sync_bn_group", 32, _FAMILY),
            ("train.optim.warmup_steps", 6250, _FAMILY),
            ("train.optim.warmup_start", 0.0625, _RATES),
            ("train.optim.weight_decay", 1e-6, BASE),
        ),
        f"SEER: cosine, about 244 000 steps, SyncBN over 32 GPUs: {_FAMILY}.",
    ),
    _seer(
        "16gf",
        (
            _CROPS,
            ("model.head", _BN_HEAD, NN + "regnet16gf.yaml"),
            ("model.head_norm", "bn", NN + "regnet16gf.yaml"),
            ("objective.epsilon", 0.05, BASE),
            ("train.batch", 4096, f"32 x 128 GPUs: {RUN_16}"),
            ("train.sync_bn_group", 32, f"syncBN32: {RUN_16}"),
            ("train.optim.warmup_steps", 6250, _WARM_16),
            ("train.optim.warmup_start", 0.0625, _RATES),
            ("train.optim.weight_decay", 1e-6, BASE),
        ),
        "SEER: cosine, 244 000 steps, SyncBN over 32 GPUs (run name).",
    ),
    _seer(
        "32gf",
        (
            _CROPS,
            ("model.head", _BN_HEAD, NN + "regnet32gf.yaml"),
            ("model.head_norm", "bn", NN + "regnet32gf.yaml"),
            ("objective.epsilon", 0.05, BASE),
            ("train.batch", 4096, _FAMILY),
            ("train.sync_bn_group", 32, _FAMILY),
            ("train.optim.warmup_steps", 6250, _FAMILY),
            ("train.optim.warmup_start", 0.0625, _RATES),
            ("train.optim.weight_decay", 1e-6, BASE),
        ),
        f"SEER: 244 000 steps (name of the weights); cosine, SyncBN over 32 GPUs: {_FAMILY}.",
    ),
    _seer(
        "64gf",
        (
            _CROPS,
            ("model.head", _PLAIN_HEAD, NN + "regnet64gf_3.yaml"),
            ("model.head_norm", "none", NN + "regnet64gf_3.yaml"),
            ("objective.epsilon", 0.05, BASE),
            ("train.batch", 4096, _FAMILY),
            ("train.sync_bn_group", 64, "inferred from the next size, not published"),
            ("train.optim.warmup_steps", 8000, _FAMILY),
            ("train.optim.warmup_start", 0.0625, _RATES),
            ("train.optim.weight_decay", 1e-6, BASE),
        ),
        "SEER: batch, rate, number of steps and SyncBN group of this model are not public.",
    ),
    _seer(
        "128gf",
        (
            _CROPS,
            ("model.head", _PLAIN_HEAD, _HEAD_128),
            ("model.head_norm", "none", _HEAD_128),
            ("objective.epsilon", 0.05, BASE),
            ("train.batch", 4096, f"32 x 128 GPUs: {RUN_128}"),
            ("train.sync_bn_group", 64, f"syncBN64: {RUN_128}"),
            ("train.optim.warmup_steps", 8000, RUN_128),
            ("train.optim.warmup_start", 0.0625, _RATES),
            ("train.optim.weight_decay", 1e-6, BASE),
        ),
        "SEER: a constant rate after the warm-up, about 244 000 steps, SyncBN over 64 GPUs (run name).",
        f"{_TWO}: those widths are this model's; trunk 637.4 M.",
    ),
    _seer(
        "256gf",
        (
            _CROPS,
            ("model.head", _PLAIN_HEAD, _HEAD_256),
            ("model.head_norm", "none", f"noBNhead: {RUN_256}"),
            ("objective.epsilon", 0.05, "paper"),
            ("train.batch", 8192, f"16 x 512 GPUs: {RUN_256}"),
            ("train.sync_bn_group", 64, f"syncBN64: {RUN_256}"),
            ("train.optim.warmup_steps", 8000, RUN_256),
            ("train.optim.warmup_start", 0.015625, "paper: from 0.15 to 9.6"),
            ("train.optim.weight_decay", 1e-5, RUN_256),
        ),
        "SEER: cosine to 0.0096, 122 000 steps, SyncBN over 64 GPUs, float16, activation checkpoints, 512 V100 of 32 GB.",
        f"{_TWO}: those are the 128GF model's; the released 256GF, this one, has (746,1492,4103,10444), trunk 1272.2 M.",
    ),
    _seer(
        "10b",
        (
            ("stream.crops", _crops((2, 160, 0.14, 1.0), (4, 96, 0.05, 0.14)), YAML_10B),
            ("model.head", _PLAIN_HEAD, YAML_10B),
            ("model.head_norm", "none", YAML_10B),
            ("objective.epsilon", 0.03, YAML_10B),
            ("train.batch", 7936, f"16 x 496 GPUs: {YAML_10B}"),
            ("train.sync_bn_group", 8, f"{BASE}: GROUP_SIZE; {YAML_10B} has no other"),
            ("train.optim.warmup_steps", 5434, f"{YAML_10B}: 0.043648 of 124 500 steps"),
            ("train.optim.warmup_start", 0.0322581, f"{BASE}: from 0.3; to 9.3, {YAML_10B}"),
            ("train.optim.weight_decay", 1e-5, YAML_10B),
        ),
        "SEER: cosine, 124 500 steps, SyncBN over 8 GPUs, sharded (FSDP), float16 but for the prototypes, 496 A100 of 40 GB.",
    ),
)

SWAV = "swav scripts/swav_200ep_bs256_pretrain.sh"
SMALL_BATCH = Preset(
    "swav-small-batch",
    "SwAV at a batch of 256, with a queue: 72.7 % linear on ImageNet after 200 epochs (swav, README)",
    _settings(
        (
            ("stream.crops", _crops((2, 224, 0.14, 1.0), (6, 96, 0.05, 0.14)), SWAV),
            ("stream.jitter", 1.0, "swav src/multicropdataset.py"),
            ("stream.blur", 0.5, "swav src/multicropdataset.py"),
            ("stream.mean", [0.485, 0.456, 0.406], "swav src/multicropdataset.py"),
            ("stream.std", [0.228, 0.224, 0.225], "swav src/multicropdataset.py; VISSL has 0.229"),
            ("model.backbone", "regnety-4gf", "ours: ResNet-50, which SwAV had, costs as much (4.1 GMAC)"),
            ("model.stem", "imagenet", "as ResNet-50's: stride 2"),
            ("model.head", [2048, 128], "swav main_swav.py: hidden_mlp 2048, feat_dim 128"),
            ("model.head_norm", "bn", "swav src/resnet50.py"),
            ("objective.kind", "swav", SWAV),
            ("objective.prototypes", 3000, SWAV),
            ("objective.temperature", 0.1, SWAV),
            ("objective.epsilon", 0.05, SWAV + "; 0.03 where the loss stays at ln K (README, common issues)"),
            ("objective.sinkhorn_iterations", 3, SWAV),
            ("objective.hard_steps", 0, "swav has no hard codes"),
            ("objective.queue", 3840, SWAV),
            ("objective.queue_start", 75090, SWAV + ": 15 epochs of 5 005 steps, and the 15 that fill it"),
            ("objective.freeze_prototypes", 5005, SWAV + ": one epoch"),
            ("train.batch", 256, SWAV + ": 64 x 4 GPUs"),
            ("train.optim.kind", "lars", "swav main_swav.py: SGD with LARC, clip off"),
            ("train.optim.lr", 0.6, SWAV + "; twice the linear rule of the large batches"),
            ("train.optim.lr_batch", 256, SWAV),
            ("train.optim.warmup_steps", 0, SWAV),
            ("train.optim.momentum", 0.9, "swav main_swav.py"),
            ("train.optim.trust", 0.001, "swav main_swav.py"),
            ("train.optim.weight_decay", 1e-6, SWAV),
            ("train.optim.exclude", [], "swav main_swav.py: one group of all parameters"),
        )
    ),
    ("SwAV: cosine to 0.0006 over 200 epochs of ImageNet, SyncBN over all 4 GPUs, float16.",),
)

OURS = "ours: LOG.md, the demo world"
DEMO = Preset(
    "demo",
    "small images (32-64 px) on a CPU: learning shows within minutes",
    _settings(
        (
            ("stream.crops", _crops((2, 32, 0.4, 1.0)), OURS + "; small local crops of 12-16 px stall"),
            ("stream.jitter", 0.2, OURS),
            ("stream.blur", 0.0, OURS),
            ("stream.fresh_fraction", 0.35, OURS),
            ("stream.max_replay_per_fresh", 8.0, OURS),
            ("stream.round_samples", 2000, OURS),
            ("stream.workers", 1, "two cores: one decodes"),
            ("model.backbone", "regnety-tiny", OURS),
            ("model.head", [512, 128], OURS),
            ("objective.prototypes", 64, OURS),
            ("objective.epsilon", 0.015, OURS + "; from 0.03 on the codes of so small a batch are uniform"),
            ("objective.freeze_prototypes", 60, OURS),
            ("train.batch", 128, OURS),
            ("train.optim.kind", "sgd", OURS + ": no LARS at a batch of 128"),
            ("train.optim.lr", 0.3, OURS),
            ("train.optim.warmup_steps", 20, OURS),
            ("train.optim.weight_decay", 5e-4, OURS),
            ("train.plateau.block_steps", 25, OURS),
            ("train.ema_decay", 0.99, OURS),
            ("train.checkpoint_steps", 100, OURS),
            ("train.snapshot_steps", 150, OURS),
        )
    ),
)
PRESETS = {preset.name: preset for preset in (*SEER, SMALL_BATCH, DEMO)}


def preset(name: str, *, where: str = "preset") -> Preset:
    """Raises ConfigError, which names the known ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{where}: preset = {name!r}: unknown{hint}; one of {', '.join(PRESETS)}")
    return PRESETS[name]
