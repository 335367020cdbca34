"""Fine-tuning by rule: the rules' own numbers, learning that is real, and figures that can be made again."""

from dataclasses import replace

import pytest
import torch

from streamlearn.contract.config_probe import BankConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.registry import OciLayout
from streamlearn.probes.banks import load_bank
from streamlearn.probes.finetune import SHAPES, bit_hyperrule, finetune, rule_for, seer_rule
from streamlearn.probes.measure import open_snapshot
from streamlearn.probes.statistics import unpacked
from streamlearn.snapshots.publish import publish
from tests.probes.world import bank_file, shade
from tests.snapshots.test_publish import export

# bit_hyperrule.py of google-research/big_transfer: (images) -> supports, MixUp
BIT = [
    (19_999, (100, 200, 300, 400, 500), 0.0),
    (20_000, (500, 3000, 6000, 9000, 10_000), 0.1),
    (499_999, (500, 3000, 6000, 9000, 10_000), 0.1),
]
BIT += [(500_000, (500, 6000, 12_000, 18_000, 20_000), 0.1)]


@pytest.mark.parametrize(("images", "supports", "mixup"), BIT)
def test_the_hyperrule_is_bits_own_at_every_step(images, supports, mixup):
    rule = bit_hyperrule(images, 500, 375)
    assert rule.mixup == mixup and rule.steps == supports[-1]

    def theirs(step):
        if step < supports[0]:
            return 0.003 * step / supports[0]
        rate = 0.003
        for s in supports[1:]:
            if s < step:
                rate /= 10
        return rate

    for step in {0, 1, rule.steps - 1, *(s + d for s in supports[:-1] for d in (-1, 0, 1))}:
        assert rule.rate(step) == pytest.approx(theirs(step), rel=1e-12), step


def test_small_images_are_magnified_as_bit_has_it_and_the_rate_follows_the_batch():
    assert (bit_hyperrule(100, 95, 96).load, bit_hyperrule(100, 95, 96).crop) == (160, 128)
    assert (bit_hyperrule(100, 96, 96).load, bit_hyperrule(100, 96, 96).crop) == (512, 480)
    assert bit_hyperrule(100, 32, 32, batch=128).lr == pytest.approx(0.00075)


def test_seers_rule_is_35_epochs_with_a_tenth_of_the_rate_from_the_thirtieth_on():
    rule = seer_rule(2560)
    assert (rule.steps, rule.lr, rule.rate(0), rule.crop) == (350, 0.0125, 0.0125, 224)
    assert rule.rate(300) == 0.0125 and rule.rate(301) == pytest.approx(0.00125)


def test_a_shortened_rule_keeps_its_shape_and_says_so():
    rule = rule_for("bit", 100, 32, 32, steps=50, batch=16, px=24)
    assert (rule.warmup, rule.drops, rule.steps, rule.crop, rule.load) == (10, (20, 30, 40), 50, 24, 30)
    assert rule.protocol == "finetune-bit/1:50steps,b16,30-24px"
    with pytest.raises(ConfigError, match="--steps 0: at least 1"):
        rule_for("bit", 100, 32, 32, steps=0)


@pytest.fixture
def tuned(tmp_path):
    path = bank_file(tmp_path, count=120, image=lambda i, c: shade(c, i))
    registry = OciLayout(tmp_path / "registry")
    _, digest = publish(registry, export(1))

    def run(rule_name, steps, **more):
        # the rules' own rates are for hundreds of steps of hundreds of images
        rule = replace(rule_for(rule_name, 90, 20, 20, batch=16, px=24, steps=steps), lr={"bit": 0.05, "seer": 0.003}[rule_name])
        bank = load_bank(BankConfig(name="b", train=path), rule.load, SHAPES[rule_name])
        return finetune(open_snapshot(registry, 1, digest), bank, rule, **more)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["bit", "seer"])
def test_every_weight_is_trained_and_the_classes_are_learnt(tuned, rule):
    losses = []
    found = tuned(rule, 40, say=lambda step, loss: losses.append(loss))
    name = f"finetune_{rule}"
    assert losses[0] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-5)  # a head of zeros
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]) and found[name] > 0.5
    assert unpacked(found["right"][name], found["images"]).mean() == pytest.approx(found[name])
    assert found["protocol"].startswith(f"finetune-{rule}/1:40steps") and found["protocol"].endswith("seed0")


def test_the_same_seed_gives_the_same_figure(tuned):
    def losses(seed):
        told = []
        tuned("seer", 3, seed=seed, say=lambda step, loss: told.append(loss))
        return told

    assert losses(1) == losses(1) != losses(2)


def test_a_loss_that_is_not_finite_ends_it_with_the_remedy(tmp_path, tuned):
    registry = OciLayout(tmp_path / "registry")
    weights = {k: v * float("inf") if k == "stem.conv.weight" else v for k, v in export(2).weights.items()}
    _, digest = publish(registry, export(2, weights=weights))
    rule = rule_for("bit", 90, 20, 20, batch=8, px=24, steps=2)
    bank = load_bank(BankConfig(name="b", train=str(tmp_path / "bank.parquet")), rule.load, SHAPES["bit"])
    with pytest.raises(ConfigError, match=r"loss nan at step 0; lower --batch"):
        finetune(open_snapshot(registry, 2, digest), bank, rule)
