"""The table of mutants does not rot: what it replaces is there, and what it runs is, too."""

import pytest

from bench import mutants
from tests.conftest import REPO


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.rule)
def test_what_a_mutant_replaces_stands_in_its_file_once(mutant):
    assert (REPO / mutant.file).read_text().count(mutant.replace) == 1 and mutant.by != mutant.replace
    if not mutant.command.startswith("-m"):
        assert (REPO / mutant.command.split()[0]).is_file()
