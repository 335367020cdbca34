"""Classes of connectors: ours, and those of packages that know nothing of our files."""

import re
import sys
import threading
import tomllib

import pytest
from prometheus_client import CollectorRegistry

from ingest.connectors import plugins
from ingest.connectors.configure import build
from ingest.connectors.run import Source
from streamlearn.contract.config import ConnectorConfig
from streamlearn.contract.errors import ConfigError
from streamlearn.contract.metrics import ConnectMetrics
from tests.conftest import REPO
from tests.ingest.connecting import install, make_log, urls


def blocks(language):
    text = (REPO / "docs" / "connectors.md").read_text().split("## Write one")[1]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The package of docs/connectors.md, installed as the page writes it."""
    (code,), (project,) = blocks("python"), blocks("toml")
    described = tomllib.loads(project)["project"]
    entries = described["entry-points"]["streamlearn.connectors"]
    install(tmp_path / "site", monkeypatch, described["name"], {"streamlearn_jsonlines": code}, entries, version=described["version"])


def test_the_example_of_the_page_is_a_connector_that_misses_and_repeats_nothing(page, tmp_path):
    log, path = make_log(tmp_path), tmp_path / "list.jsonl"
    path.write_text('{"image": "http://x/1.jpg", "by": "CC0"}\nnonsense\n{"image": "http://x/2')
    config = ConnectorConfig.of("mine", "jsonlines", path=str(path))
    for rest in ("", '.jpg"}\n', '{"image": "http://x/3.jpg"}\n'):
        with path.open("a") as f:
            f.write(rest)
        source = Source("mine", build(config), log, ConnectMetrics(CollectorRegistry()))  # each time anew: only the cursor is left
        source.poll(threading.Event())
    assert urls(log) == [f"http://x/{i}.jpg" for i in (1, 2, 3)]
    assert plugins.plugins()["jsonlines"].version == "1.0"


def test_the_example_is_about_forty_lines():
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 50


def test_an_option_of_a_package_is_complained_of_by_name(page):
    with pytest.raises(ConfigError, match=r"run.toml: connector mine: kee: no such key; did you mean key\?"):
        build(ConnectorConfig.of("mine", "jsonlines", path="x", kee="url"), "run.toml")
    with pytest.raises(ConfigError, match=r"pol_s: no such key; did you mean poll_s\?"):
        build(ConnectorConfig.of("mine", "jsonlines", path="x", pol_s=3), "run.toml")


GOOD = "from streamlearn.contract.config import Section\nclass C:\n    Options = Section\n    def check(self): ...\n    def discover(self, c): ...\n"
BAD = [
    ("import a_library_that_nobody_has", "needs what is not installed: No module named 'a_library_that_nobody_has'"),
    ("1 / 0", "cannot be imported: ZeroDivisionError"),
    ("class D: ...", "cannot be imported: AttributeError"),
    ("class C: ...", "is no connector: it has no Options"),
    (GOOD, "is no connector: it has no close"),
    (
        GOOD.replace("Options = Section", "class Options(Section):\n        poll_s: int = 1") + "    def close(self): ...\n",
        "is no connector: its option poll_s is a key of every",
    ),
]


@pytest.mark.parametrize(("code", "complaint"), BAD, ids=[c for _, c in BAD])
def test_a_bad_package_is_named_when_it_is_used_and_troubles_nobody_else(tmp_path, monkeypatch, code, complaint):
    install(tmp_path / "site", monkeypatch, "bad-one", {"bad_one_module": code}, {"bad": "bad_one_module:C"})
    assert "bad" in plugins.plugins() and plugins.load("folder")
    with pytest.raises(ConfigError, match=f"class bad .bad_one_module:C of bad-one. {complaint}"):
        plugins.load("bad")


def test_a_package_cannot_take_a_name_of_ours(tmp_path, monkeypatch, caplog):
    install(tmp_path / "site", monkeypatch, "thief", {"thief_module": "class C: ..."}, {"folder": "thief_module:C"})
    assert plugins.load("folder").__module__ == "ingest.connectors.folder" and "thief_module" not in sys.modules
    assert "package thief offers the connector class folder, which streamlearn has already" in caplog.text


def test_an_unknown_class_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"f: connector c: class = 'foldr': no such connector class; did you mean folder\?"):
        build(ConnectorConfig.of("c", "foldr"), "f")


def test_a_class_of_ours_whose_module_is_not_there_is_not_listed(monkeypatch):
    monkeypatch.setitem(plugins.BUILT_IN, "ghost", "ingest.connectors.ghost:Ghost")
    assert "ghost" not in plugins.plugins() and {"folder", "urls"} <= set(plugins.plugins())


def test_a_class_that_does_not_split_takes_one_task(tmp_path):
    with pytest.raises(ConfigError, match="tasks_max = 2: no class splits its work"):
        build(ConnectorConfig.of("c", "folder", path=str(tmp_path), tasks_max=2))
