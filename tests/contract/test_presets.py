"""Recipes by name: the published numbers, each with its source, beneath whatever the user says."""

import tomllib

import pytest
from click.testing import CliRunner

from streamlearn.cli.config import config as cli
from streamlearn.contract.config import Config, ShardConfig
from streamlearn.contract.config_file import load
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.presets import PRESETS, preset

SIZES = ["8gf", "16gf", "32gf", "64gf", "128gf", "256gf"]
NAMES = [*(f"seer-regnety-{size}" for size in SIZES), "seer-10b", "swav-small-batch", "demo"]


def resolved(name, **overrides):
    return load(None, env={}, overrides={"preset": name} | overrides)


def test_these_recipes_are_there():
    assert list(PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_it_prints_and_says_where_each_number_is_from(name):
    recipe = PRESETS[name]
    assert all(setting.source for setting in recipe.settings)
    assert tomllib.loads(recipe.toml()) == recipe.overlay()
    assert len({s.key for s in recipe.settings}) == len(recipe.settings)
    config = resolved(name)
    assert config.preset == name
    for setting in recipe.settings:
        at = config.model_dump(mode="json")
        for key in setting.key.split("."):
            at = at[key]
        assert at == setting.value, setting.key


# head, between its layers, epsilon, batch, SyncBN group, warm-up, rate before and after it, weight decay: training.md 1b (VISSL, run names)
SEER = {
    "seer-regnety-8gf": ((4096, 4096, 256), "bn", 0.05, 4096, 32, 6250, 0.3, 4.8, 1e-6),
    "seer-regnety-16gf": ((4096, 4096, 256), "bn", 0.05, 4096, 32, 6250, 0.3, 4.8, 1e-6),
    "seer-regnety-32gf": ((4096, 4096, 256), "bn", 0.05, 4096, 32, 6250, 0.3, 4.8, 1e-6),
    "seer-regnety-64gf": ((8192, 8192, 256), "none", 0.05, 4096, 64, 8000, 0.3, 4.8, 1e-6),
    "seer-regnety-128gf": ((8192, 8192, 256), "none", 0.05, 4096, 64, 8000, 0.3, 4.8, 1e-6),
    "seer-regnety-256gf": ((8192, 8192, 256), "none", 0.05, 8192, 64, 8000, 0.15, 9.6, 1e-5),
    "seer-10b": ((8192, 8192, 256), "none", 0.03, 7936, 8, 5434, 0.3, 9.3, 1e-5),
}


@pytest.mark.parametrize("name", SEER)
def test_seers_numbers_are_the_published_ones(name):
    config = resolved(name)
    head, norm, epsilon, batch, group, warmup, start, peak, decay = SEER[name]
    objective, optim = config.objective, config.train.optim.for_batch(config.train.batch)
    assert config.model.backbone == name.removeprefix("seer-").replace("10b", "regnety-10b")
    assert (config.model.head, config.model.head_norm, objective.epsilon, config.train.batch) == (head, norm, epsilon, batch)
    assert (optim.warmup_steps, optim.weight_decay) == (warmup, decay)
    assert config.train.sync_bn_group == group and batch % group == 0
    assert (optim.lr * optim.warmup_start, optim.lr) == (pytest.approx(start, rel=1e-5), pytest.approx(peak))
    assert (objective.prototypes, objective.sinkhorn_iterations, objective.temperature, objective.queue) == (16000, 10, 0.1, 0)
    assert objective.freeze_prototypes == 313
    assert (optim.kind, optim.trust, optim.momentum, optim.exclude) == ("lars", 0.001, 0.9, ())
    assert [(c.count, c.size, c.scale) for c in config.stream.crops] == [
        (2, 160 if name == "seer-10b" else 224, (0.14, 1.0)),
        (4, 96, (0.05, 0.14)),
    ]
    assert config.stream.std == (0.229, 0.224, 0.225)


def test_the_small_batch_has_swavs_queue():
    config = resolved("swav-small-batch")
    assert (config.train.batch, config.objective.queue, config.objective.freeze_prototypes) == (256, 3840, 5005)
    assert config.objective.queue_start == 15 * 5005 + 3840 // 256  # swav begins to fill it in epoch 15, and uses it when it is full
    assert config.train.optim.for_batch(256).lr == 0.6
    assert config.stream.crops[1].count == 6


def test_the_rate_follows_the_batch_as_the_linear_rule_has_it():
    config = resolved("seer-regnety-16gf", **{"train.batch": "512"})
    assert config.train.optim.for_batch(config.train.batch).lr == pytest.approx(0.6)
    assert Config().train.optim.for_batch(4096).lr == Config().train.optim.lr  # no hidden scaling where none is asked for


def test_explicit_keys_win_wherever_they_stand(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'preset = "seer-regnety-16gf"\n[objective]\nepsilon = 0.03\n[[stream.crops]]\ncount = 2\nsize = 96\nscale = [0.2, 1.0]\n'
    )
    env = {"STREAMLEARN__TRAIN__BATCH": "64", "STREAMLEARN__TRAIN__OPTIM__LR": "0.1"}
    config = load(path, env=env, overrides={"train.optim.lr": "0.2"})
    assert (config.objective.epsilon, config.train.batch, config.train.optim.lr) == (0.03, 64, 0.2)
    assert len(config.stream.crops) == 1  # a list stands whole
    assert (config.model.backbone, config.objective.prototypes) == ("regnety-16gf", 16000)  # and the rest is the preset's


def test_the_environment_and_the_command_line_may_name_it_too(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "demo"\n')
    assert load(path, env={"STREAMLEARN__PRESET": "seer-10b"}).model.backbone == "regnety-10b"
    assert load(path, env={"STREAMLEARN__PRESET": "seer-10b"}, overrides={"preset": "swav-small-batch"}).objective.queue == 3840


def test_a_preset_lies_above_what_a_command_begins_with():
    base = Config(shard=ShardConfig(max_samples=7))
    config = load(None, base=base, env={}, overrides={"preset": "demo"})
    assert (config.shard.max_samples, config.model.backbone) == (7, "regnety-tiny")


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "seer-regnety-265gf"\n')
    with pytest.raises(ConfigError) as e:
        load(path, env={})
    assert f"{path}: preset = 'seer-regnety-265gf': unknown; did you mean seer-regnety-256gf?" in str(e.value)
    assert all(name in str(e.value) for name in NAMES)
    with pytest.raises(ConfigError, match=r"--set preset: preset = 'x': unknown; one of seer-regnety-8gf"):
        load(None, env={}, overrides={"preset": "x"})


def test_a_resolved_configuration_is_read_again_as_it_is():
    from streamlearn.contract.config_file import from_json

    config = resolved("seer-regnety-8gf", **{"train.batch": "64"})
    assert from_json(config.model_dump_json(), where="x") == config


def test_the_two_meanings_of_256gf_are_told_apart():
    paper, released = preset("seer-regnety-128gf"), preset("seer-regnety-256gf")
    assert any("(528,1056,2904,7392)" in note and "this model's" in note for note in paper.notes)
    assert any("those are the 128GF model's" in note and "(746,1492,4103,10444)" in note for note in released.notes)


def test_the_command_lists_them_and_prints_one():
    listed = CliRunner().invoke(cli, ["presets"]).output
    assert [line.split()[0] for line in listed.splitlines()] == NAMES
    printed = CliRunner().invoke(cli, ["presets", "seer-10b"]).output
    assert tomllib.loads(printed)["objective"]["epsilon"] == 0.03 and "# VISSL seer/models/regnet10B.yaml" in printed
    shown = CliRunner().invoke(cli, ["show", "--preset", "seer-10b"]).output
    assert Config.model_validate_json(shown, strict=False).train.batch == 7936
