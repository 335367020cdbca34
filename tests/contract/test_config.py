"""A wrong configuration is refused with file, key, value and remedy."""

import re

import pytest
from click.testing import CliRunner

from streamlearn.__main__ import COMMANDS
from streamlearn.contract import config_file
from streamlearn.contract.config import Config
from streamlearn.contract.config_file import load
from streamlearn.contract.errors import ConfigError

WRONG = [
    ("[train]\nbach = 3", "train.bach: no such key; did you mean train.batch?"),
    ("[train]\nbatch = 'many'", "train.batch = 'many': input should be a valid integer"),
    ("[train]\nbatch = true", "train.batch = True: input should be a valid integer"),
    ("[train]\nbatch = 1", "train.batch = 1: input should be greater than or equal to 2"),
    ("[train.optim]\nlr = 0", "train.optim.lr = 0.0: input should be greater than 0"),
    ("[train.optim]\nkind = 'adam'", "train.optim.kind = 'adam': input should be 'lars', 'sgd' or 'adamw'"),
    ("[train]\nbatch = 64\nmicro_batch = 24", "micro_batch = 24 does not divide batch = 64: set it to a divisor, or to 0"),
    ("[[stream.crops]]\ncount = 2\nsize = 32\nscale = [0.9, 0.3]", "must be 0 < low <= high <= 1"),
    ("[fetch]\nallow_networks = ['10.0.0.0/40']", "fetch.allow_networks"),
    ("[[connectors]]\nname = 'a'\npath = 'x'", "connectors.0.class: required, and has no default"),
    ("[[connectors]]\nname='a'\nclass='urls'\npath='x'\n[[connectors]]\nname='a'\nclass='urls'\npath='y'", "names must differ"),
    ("[objective]\nepsilon = 0.001", "objective.epsilon = 0.001: input should be greater than or equal to 0.005"),
    ("[store]\nkind = 's3'", "kind 's3' needs store.bucket; set it, or set store.kind to 'folder'"),
    ("[store]\nprefix = 'a/'", "prefix = 'a/': must be a relative path"),
    ("[store]\npart_bytes = 1000", "store.part_bytes = 1000: input should be greater than or equal to 5242880"),
    (
        "[stream]\nreplay = 'minred'\nreservoir = 4096",
        "replay = 'minred' with reservoir = 4096, round_samples = 4096: what a round brings in",
    ),
    ("nonsense", "not TOML"),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG, ids=[c for _, c in WRONG])
def test_a_wrong_config_is_refused_with_file_key_value_and_remedy(text, complaint, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        load(path, env={})
    assert complaint in str(e.value) and str(path) in str(e.value)


def test_all_complaints_are_made_at_once(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[train]\nbatch = 1\n[fetch]\nconcurrency = 0\n")
    with pytest.raises(ConfigError) as e:
        load(path, env={})
    assert len(str(e.value).splitlines()) == 2


def test_the_command_line_wins_over_the_environment_which_wins_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[train]\nbatch = 4\nseed = 1\n[train.optim]\nlr = 1\n")
    env = {"STREAMLEARN__TRAIN__BATCH": "8", "STREAMLEARN__TRAIN__SEED": "2"}
    found = load(path, env=env, overrides={"train.seed": "3"}).train
    assert (found.batch, found.seed, found.optim.lr) == (8, 3, 1.0)


def test_a_wrong_override_is_blamed_on_the_variable_or_flag():
    with pytest.raises(ConfigError, match=re.escape("environment STREAMLEARN__TRAIN__BATCH: train.batch = 'x'")):
        load(None, env={"STREAMLEARN__TRAIN__BATCH": "x"})
    with pytest.raises(ConfigError, match=re.escape("--set train.nope: train.nope: no such key")):
        load(None, env={}, overrides={"train.nope": "1"})


def test_a_config_survives_json_and_its_digest_tells_any_change():
    one = load(None, env={})
    again = config_file.from_json(one.model_dump_json(), where="x")
    assert again == one and again.digest == one.digest
    assert load(None, env={}, overrides={"train.batch": "65"}).digest != one.digest


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load(config_file.Path("nowhere.toml"), env={})


def test_every_key_of_the_defaults_is_in_the_schema():
    assert set(Config.model_json_schema()["properties"]) == set(load(None, env={}).model_dump())


def test_every_command_of_the_help_is_there():
    from streamlearn.__main__ import cli

    for name in COMMANDS:
        result = CliRunner().invoke(cli, [name, "--help"])
        assert result.exit_code == 0, (name, result.output, result.exception)
