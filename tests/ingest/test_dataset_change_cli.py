"""`streamlearn dataset`, as a user runs it, over a home that the real fetch role has filled."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.contract.errors import ConfigError
from tests.ingest.life import Ageing, copied, fetched, outcomes, stored
from tests.ingest.server import serving


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    home = tmp_path_factory.mktemp("filled")
    with serving(Ageing()) as base:
        place = fetched(home, *(f"{base}/{n}.jpg" for n in range(12)), max_samples=2, max_age_s=60)
    (home / "config.json").write_text(place.config.model_dump_json())
    return base, home


@pytest.fixture
def base(filled):
    return filled[0]


@pytest.fixture
def place(filled, tmp_path):
    return copied(filled[1], tmp_path / "home")


def run(place, *args):
    """What a command says, as JSON."""
    result = CliRunner().invoke(cli, ["dataset", *args, "--home", str(place.home), "--json"], catch_exceptions=False, standalone_mode=True)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_whole_life(place, base):
    assert run(place, "cut", "--name", "2026Q4")["samples"] == 12
    assert run(place, "compact") | {"bytes": 0} == {"shards": 2, "merged": 6, "bytes": 0, "lost": 0, "dry_run": False}
    assert run(place, "takedown", "--url", f"{base}/3.jpg", "--reason", "asked")["samples"] == 1
    assert len(stored(place)) == 11 and ("", "rejected", "taken_down") in outcomes(place)
    assert run(place, "refresh", "--name", "2026Q4", "--rate", "0") == {"shards": 2, "candidates": 11, "dry_run": False}
    assert run(place, "purge", "--grace-days", "0")["shards"] == 5  # the sixth went with the takedown
    assert run(place, "expire")["shards"] == 0
    assert run(place, "expire", "--window-days", "0")["samples"] == 11 and stored(place) == []
    assert run(place, "purge", "--grace-days", "0")["shards"] == 2 and place.store.list("shards/") == []


@pytest.mark.parametrize(
    "args",
    [["cut"], ["compact"], ["takedown", "--host", "127.0.0.1"], ["expire", "--window-days", "0"], ["purge", "--grace-days", "0"]],
    ids=lambda args: args[0],
)
def test_a_dry_run_changes_nothing(place, args):
    version, objects = place.catalog.version(), place.store.list("")
    assert run(place, *args, "--dry-run")["dry_run"] is True
    assert place.catalog.version() == version and place.store.list("") == objects and len(stored(place)) == 12


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["takedown", "--sha256", "abc"], "64 hexadecimal digits"),
        (["takedown", "--host", "http://a.example/"], "without scheme"),
        (["refresh", "--name", "2031Q1"], "dataset cut --name 2031Q1"),
        (["cut", "--name", "../x"], "letters, digits"),
    ],
)
def test_a_wrong_value_is_the_users_to_mend(place, args, complaint):
    with pytest.raises(ConfigError, match=complaint):
        CliRunner().invoke(cli, ["dataset", *args, "--home", str(place.home)], catch_exceptions=False)


def test_a_home_without_a_loop_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no loop has run here"):
        CliRunner().invoke(cli, ["dataset", "compact", "--home", str(tmp_path)], catch_exceptions=False)


def test_as_a_process_it_ends_well(place, base):
    command = [sys.executable, "-m", "streamlearn", "dataset", "takedown", "--url", f"{base}/5.jpg", "--home", str(place.home)]
    for samples in (1, 0):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and f"{samples} samples" in done.stdout, done.stderr
    assert len(stored(place)) == 11
