"""How the role is put together: where the weights come from, and whose code it is."""

import subprocess

import pytest

from streamlearn.cli import learner
from streamlearn.cli.up import _prepare, _resolve
from streamlearn.contract.errors import ConfigError

TOML = """
[[connectors]]
name = "photos"
class = "folder"
path = "photos"
[train]
init = "{init}"
"""


def resolved(tmp_path, init, **overrides):
    (tmp_path / "photos").mkdir(exist_ok=True)
    file = tmp_path / "run.toml"
    file.write_text(TOML.format(init=init))
    return _resolve(file, tmp_path / "home", overrides, demo=False, images=None, urls=None, probe=None)


def test_a_path_is_relative_to_the_file_that_names_it_and_a_tag_is_left_alone(tmp_path):
    assert resolved(tmp_path, "seer.torch")[0].train.init == str(tmp_path / "seer.torch")
    assert resolved(tmp_path, "../weights/pulled")[0].train.init == str(tmp_path.parent / "weights" / "pulled")
    assert resolved(tmp_path, "stable")[0].train.init == "stable" and resolved(tmp_path, "")[0].train.init == ""
    digest = "sha256:" + "0" * 64
    assert resolved(tmp_path, digest)[0].train.init == digest


def test_a_file_that_is_not_there_is_said_before_anything_starts(tmp_path):
    config, home = resolved(tmp_path, "seer.torch")
    with pytest.raises(ConfigError, match=r"train\.init = '.*seer\.torch': no such file; only a home that has not learnt yet needs it"):
        _prepare(config, home)
    assert not (home / "config.json").exists()
    (home / "store" / "checkpoints").mkdir(parents=True)
    (home / "store" / "checkpoints" / "latest.json").write_text("{}")
    _prepare(config, home)


def test_the_code_that_runs_is_named_by_the_environment_or_by_git(monkeypatch, tmp_path):
    monkeypatch.setenv("STREAMLEARN_REVISION", "abc123")
    assert learner.revision() == "abc123"
    monkeypatch.delenv("STREAMLEARN_REVISION")
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=learner.TOP, capture_output=True, text=True, check=False)
    assert learner.revision().removesuffix("-dirty") == asked.stdout.strip()
    monkeypatch.setattr(learner, "TOP", tmp_path)  # installed, without its repository
    assert learner.revision() == ""
