"""The documentation is held to the code."""

import re

import pytest
from pydantic import BaseModel

from streamlearn.__main__ import COMMANDS
from streamlearn.contract.config import Config
from tests.conftest import REPO

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        name = field.alias or name  # as the file calls it
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [i for i in inner if isinstance(i, type) and issubclass(i, BaseModel)]
        found |= keys(sections[0], f"{prefix}{name}.") if sections else {f"{prefix}{name}"}
    return found


def test_every_config_key_is_documented_and_no_other():
    page = (REPO / "docs" / "configuration.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_.]+)` \|(?!.*see below)", page, flags=re.M))
    assert documented == keys(Config)


def test_every_command_is_in_the_readme():
    text = (REPO / "README.md").read_text()
    assert [name for name in COMMANDS if name != "role" and f"streamlearn {name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text()
    linked = [page.parent / target for target in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    named = [REPO / name for name in re.findall(r"`((?:streamlearn|ingest|bench|tests|docs)/[\w/]+\.(?:py|md))`", text)]
    assert [str(p) for p in linked + named if not p.exists()] == []
