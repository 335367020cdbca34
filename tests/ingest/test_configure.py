"""A connector's configuration: complaints by name, and Connect's strings there and back."""

import json
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ingest.connectors import definitions, plugins
from ingest.connectors.configure import CONNECT, absolute, build, coerced, connect_complaints, from_connect, to_connect
from streamlearn.cli.up import _resolve as resolve
from streamlearn.contract import config_file
from streamlearn.contract.config import Config, ConnectorConfig, Section
from streamlearn.contract.errors import ConfigError
from tests.conftest import REPO


class AllOptions(Section):
    text: str
    number: int = 3
    share: float = 0.5
    flag: bool = False
    words: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    pair: tuple[float, ...] = ()
    mode: Literal["a", "b"] = "a"
    maybe: int | None = None
    level: Literal[1, 2] = 1


class AllKinds:
    Options = AllOptions

    def __init__(self, name, options):
        self.options = options

    def check(self): ...
    def discover(self, cursor): ...
    def close(self): ...


@pytest.fixture(autouse=True, scope="module")
def all_kinds():
    plugins.BUILT_IN["all-kinds"] = "tests.ingest.test_configure:AllKinds"
    yield
    del plugins.BUILT_IN["all-kinds"]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
options = st.fixed_dictionaries(
    {"text": words},
    optional={
        "number": st.integers(),
        "share": finite,
        "flag": st.booleans(),
        "words": st.lists(words | st.sampled_from(["a,b", " a", "[", "", "[1,2]", '"'])),
        "sizes": st.lists(st.integers()),
        "pair": st.lists(finite),
        "mode": st.sampled_from(["a", "b"]),
        "maybe": st.integers(),
        "level": st.sampled_from([1, 2]),
        "tasks_max": st.just(1),
        "errors_tolerance": st.sampled_from(["none", "all"]),
        "errors_retry_delay_max_s": st.floats(1e-9, 1e9),
        "errors_log": st.booleans(),
        "dead_letter_topic": st.sampled_from(["dead-letters", "a.b", "dlq"]),
        "poll_s": st.floats(1e-6, 1e6),
    },
)


@given(options)
@example({"text": "", "words": ["[", "a"]})
@example({"text": "", "words": [" a"]})
@example({"text": "", "words": ["a,b"]})
@example({"text": "", "words": [""]})
def test_connects_strings_say_the_same_there_and_back(given_options):
    config = ConnectorConfig.of("c", "all-kinds", **given_options)
    flat = to_connect(config)
    assert flat["name"] == "c" and all(isinstance(v, str) for v in flat["config"].values())
    again = from_connect(json.loads(json.dumps(flat["config"])), where="x")
    assert again == config and again.given() == config.given() and to_connect(again) == flat


@given(options)
def test_the_whole_config_survives_json_with_flat_options(given_options):
    config = Config(connectors=(ConnectorConfig.of("c", "all-kinds", **given_options),))
    again = config_file.from_json(config.model_dump_json(), where="x")
    assert again == config and again.digest == config.digest


def test_connects_names_and_strings_are_read_by_the_type_they_are_for():
    flat = {
        "name": "c",
        "connector.class": "all-kinds",
        "tasks.max": 1,
        "errors.tolerance": "none",
        "errors.deadletterqueue.topic.name": "dlq",
        "errors.retry.delay.max.ms": "1500",
        "errors.log.enable": "False",
        "poll.interval.ms": 250,
        "text": "7",
        "number": "42",
        "share": "1e-3",
        "flag": "TRUE",
        "words": "a, b ,c",
        "sizes": "1,2",
        "maybe": "5",
    }
    config = from_connect(flat, where="x")
    assert (config.name, config.tasks_max, config.errors_tolerance, config.dead_letter_topic) == ("c", 1, "none", "dlq")
    assert (config.errors_retry_delay_max_s, config.errors_log, config.poll_s) == (1.5, False, 0.25)
    found = build(config).options
    assert (found.text, found.number, found.share, found.flag, found.maybe) == ("7", 42, 0.001, True, 5)
    assert (found.words, found.sizes) == (("a", "b", "c"), (1, 2))


GOOD = {"name": "c", "connector.class": "all-kinds", "text": "x"}
WRONG = [
    ({"number": "many"}, "number = 'many': input should be a valid integer"),
    ({"flag": "yes"}, "flag = 'yes': input should be a valid boolean"),
    ({"numbr": "1"}, "numbr: no such key; did you mean number?"),
    ({"errors.tolerence": "all"}, "errors.tolerence: no such key; did you mean errors.tolerance?"),
    ({"errors_tolerance": "all"}, "errors_tolerance: no such key; it is written errors.tolerance here"),
    ({"errors.tolerance": "some"}, "errors.tolerance = 'some': input should be 'none' or 'all'"),
    ({"tasks.max": "0"}, "tasks.max = 0: input should be greater than or equal to 1"),
    ({"tasks.max": "2"}, "tasks.max = 2: no class splits its work over several tasks yet; set it to 1"),
    ({"poll.interval.ms": "soon"}, "poll.interval.ms = 'soon': input should be a valid number"),
    ({"connector.class": "all-kind"}, "class = 'all-kind': no such connector class; did you mean all-kinds?"),
    ({"name": "No Name"}, "name = 'No Name': string should match pattern"),
    ({"mode": "c"}, "mode = 'c': input should be 'a' or 'b'"),
    ({"words": "[1"}, "words = '[1': input should be a valid tuple"),
]


@pytest.mark.parametrize(("change", "complaint"), WRONG, ids=[c for _, c in WRONG])
def test_what_is_wrong_is_said_with_file_connector_key_value_and_remedy(change, complaint):
    with pytest.raises(ConfigError) as e:
        from_connect(GOOD | change, where="my.json")
    assert f"my.json: connector {change.get('name', 'c')}: {complaint}" in str(e.value)


def test_all_complaints_are_made_at_once_also_for_what_is_missing():
    found = connect_complaints({"connector.class": "all-kinds", "number": "x", "tasks.max": "y"})
    assert [key for key, _ in found] == ["name", "tasks.max", "text", "number"]
    assert connect_complaints({}) == [
        ("name", "name: required, and has no default"),
        ("connector.class", "connector.class: required, and has no default"),
    ]


def test_a_toml_option_is_validated_by_its_class_with_the_files_name():
    raw = {"connectors": [{"name": "c", "class": "all-kinds", "text": "x", "share": 1, "words": ["a"]}]}
    assert build(config_file.validate(raw, where="x").connectors[0]).options.words == ("a",)
    raw["connectors"][0]["share"] = "high"
    with pytest.raises(ConfigError, match="^run.toml: connector c: share = 'high': input should be a valid number$"):
        build(config_file.validate(raw, where="x").connectors[0], "run.toml")


def test_paths_of_this_machine_are_relative_to_their_file(tmp_path):
    config = absolute(ConnectorConfig.of("c", "urls", path="lists/*.parquet", url_column="url"), tmp_path)
    assert config.options == {"path": f"{tmp_path}/lists/*.parquet", "url_column": "url"}
    assert absolute(ConnectorConfig.of("c", "folder", path="/data"), tmp_path).options == {"path": "/data"}


def test_up_takes_paths_from_where_its_file_lies_and_names_it_in_complaints(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[[connectors]]\nname = 'c'\nclass = 'urls'\npath = 'lists/u.txt'\nfollow = false\n")
    config, _ = resolve(path, tmp_path / "home", {}, demo=False, images=None, urls=None, probe=None)
    assert config.connectors[0].options == {"path": f"{tmp_path}/lists/u.txt", "follow": False}
    path.write_text(path.read_text() + "folow = true\n")
    with pytest.raises(ConfigError, match=r"run.toml: connector c: folow: no such key; did you mean follow\?"):
        resolve(path, tmp_path / "home", {}, demo=False, images=None, urls=None, probe=None)


def test_a_value_that_is_no_string_stays_as_it_is():
    assert coerced(3, int) == 3 and coerced([1], tuple[int, ...]) == [1] and coerced(3, str) == "3"


def test_validation_answers_in_connects_shape():
    found = definitions.validate("all-kinds", {"connector.class": "all-kinds", "name": "c", "number": "x", "nope": "1"})
    configs = {c["value"]["name"]: c for c in found["configs"]}
    assert found["name"] == "all-kinds" and found["error_count"] == 3 and found["groups"] == ["Common", "all-kinds"]
    assert configs["text"]["value"]["errors"] == ["text: required, and has no default"] and configs["text"]["definition"]["required"]
    assert configs["number"]["value"]["value"] == "x" and len(configs["number"]["value"]["errors"]) == 1
    assert "no such key" in configs["nope"]["value"]["errors"][0]
    assert configs["poll.interval.ms"]["definition"] | {"documentation": "", "order": 0} == {
        "name": "poll.interval.ms", "type": "LONG", "required": False, "default_value": "1000", "importance": "MEDIUM", "documentation": "",
        "group": "Common", "width": "MEDIUM", "display_name": "poll.interval.ms", "dependents": [], "order": 0,
    }  # fmt: skip
    types = {name: configs[name]["definition"]["type"] for name in ("text", "number", "share", "flag", "words", "maybe")}
    assert types == {"text": "STRING", "number": "INT", "share": "DOUBLE", "flag": "BOOLEAN", "words": "LIST", "maybe": "INT"}
    assert set(CONNECT.values()) <= set(configs)


@pytest.mark.parametrize("path", sorted((REPO / "ops" / "connectors").glob("*.json")), ids=lambda p: p.name)
def test_the_example_configurations_are_good(path):
    raw = json.loads(path.read_text())
    if raw["config"]["connector.class"] in plugins.plugins():
        config = from_connect({"name": raw["name"]} | raw["config"], where=path.name)
        build(config)
        assert to_connect(config) == {"name": raw["name"], "config": {"name": raw["name"]} | raw["config"]}
