"""The page: complete, self-contained, honest about what is missing; as a browser shows it."""

import io
import json
import re

import pytest
from click.testing import CliRunner
from PIL import Image

from streamlearn.__main__ import cli
from streamlearn.contract.config import Config
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.status import Heartbeat
from streamlearn.report import build_report
from streamlearn.view import line, overview, panel, sparkline
from tests.report.homes import DESKTOP_PX, PHONE_PX, digest, drifted, looked_at, real, tell, told


@pytest.fixture
def home(tmp_path):
    return told(tmp_path)


def page_of(home, channels=None, config=None):
    return build_report(home, config or Config(), FolderStore(home / "store"), home / "report.html", channels).read_text()


def part(page, key):
    return page.split(f"<section id={key}>")[1].split("</section>")[0]


def test_the_page_has_every_part_and_asks_nobody_for_anything(home):
    drifted(home)
    page = page_of(home)
    drawn = {key: part(page, key).count("<svg") for key in ("probes", "loss", "collapse", "drift", "intake")}
    assert drawn == {"probes": 2, "loss": 4, "collapse": 4, "drift": 1, "intake": 1} and page.count("data:image/jpeg") == 4
    assert "600" in page and "40.0%" in page and "2.00 ×" in page and "rejected: gone" in page
    assert [u for u in re.findall(r"(?:src|href)=.?([a-z]+://[^ >]*)", page)] == []
    assert "<script" not in page and "@import" not in page and "default-src 'none'" in page


def test_whatever_stands_in_data_is_text_and_nothing_else(home):
    evil = "<script>alert(1)</script>$x^{$"
    drifted(home, evil)
    tell(home, "fetch", {"stored": 1, "outcomes": {evil: 2}})
    entry = {"bank": evil, "tag": evil, "digest": evil, "step": 900, "knn": 0.5, "generation": evil, "alarms": ["rankme"], "rankme": 1.0}
    tell(home, "evaluate", entry, entry | {"step": 901, "generation": "2027Q1"})
    tell(home, "train", {"event": "warm_start", "step": 20})
    picture = {"jpeg": "aGVsbG8=", "name": evil}
    near = {"near": [[[0, 1]]], "right": 0.5, "asked": 3}
    shown = {"schema": "streamlearn.retrieval/1", "bank": evil, "bank_digest": "d", "queries": [{"index": 0} | picture], "pixels": near}
    (home / "retrieval").mkdir()
    (home / "retrieval" / "b.json").write_text(
        json.dumps(shown | {"columns": [near | {"step": 1, "digest": evil}], "images": {"0": picture}})
    )
    Heartbeat(home, "fetch").beat(force=True, waiting=evil)
    Heartbeat(home, "connect").beat(force=True, connectors={evil: {"state": evil, "trace": evil}})
    Heartbeat(home, "evaluate").beat(force=True, failed={evil: evil}, refused_banks={evil: evil})
    page = page_of(home, {evil: evil, "best": digest(600)})
    assert "<script" not in page and page.count("&lt;script") > 20
    assert "<b>world" not in page and "<i>alert" not in page


def test_a_new_home_says_what_is_missing(tmp_path):
    page = page_of(tmp_path)
    for words in ("Nothing learnt yet", "No snapshot has been measured yet", "Nothing fetched yet", "Comes with the first snapshot"):
        assert words in page
    for key, how in (
        ("probes", "banks add"),
        ("retrieval", "evaluate"),
        ("transfer", "generation"),
        ("drift", "4,096"),
        ("intake", "streamlearn status"),
    ):
        assert how in part(page, key)
    assert "No collapse alarm" not in page, "nothing was measured, so nothing is known"


@pytest.mark.parametrize("name", ["continual.json", "drift/state.json", "history/gallery.json", "retrieval/b.json"])
@pytest.mark.parametrize("what", ["torn", "another's", "a list"])
def test_a_file_that_cannot_be_read_is_said_and_the_rest_is_shown(tmp_path, name, what):
    tell(tmp_path, "fetch", {"stored": 500, "outcomes": {"stored": 500}})
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text({"torn": '{"schema": "streamlearn.drift/1", "sou', "another's": '{"schema": "other/9"}', "a list": "[1, 2]"}[what])
    page = page_of(tmp_path)
    assert f"{path.name} cannot be read" in page and part(page, "intake").count("<svg") == 1


def test_lines_of_another_version_are_left_out(home):
    odd = [
        {"bank": 3, "step": 1},
        {"bank": "c", "step": "x"},
        {"bank": "c", "step": 700, "knn": "high", "alarms": None},
        {"bank": "c", "step": 800},
    ]
    before = part(page_of(home), "probes")
    tell(home, "evaluate", *odd)
    tell(home, "train", {"step": "x", "lr": 0.1}, {"step": 610, "lr": None}, {"event": 3, "step": 4}, {"event": "halved"})
    tell(home, "fetch", {"stored": "many"}, {"stored": 120, "at": "yesterday", "outcomes": [1]})
    assert part(page_of(home), "probes") == before


def test_an_alarm_of_the_newest_snapshot_stands_at_the_top_until_a_sound_one_is_measured(home):
    entry = {
        "bank": "world <b>",
        "tag": "0.700.0",
        "digest": digest(700),
        "step": 700,
        "knn": 0.2,
        "effective_rank": 1.8,
        "alarms": ["effective_rank"],
    }
    assert "No collapse alarm" in page_of(home)
    tell(home, "evaluate", entry)
    page = page_of(home)
    top = page.split("<section id=")[0]
    assert "Collapse alarm:" in top and "effective rank 1.8 (alarm below 3)" in top and "No collapse alarm" not in page
    tell(home, "evaluate", entry | {"step": 800, "effective_rank": 9.0, "alarms": []})
    page = page_of(home)
    assert "Collapse alarm:" not in page and "Snapshots that raised alarms: 1, the last at step 700" in page


def test_channels_are_marked_where_they_point(home):
    page = page_of(home, {"best": digest(400), "candidate": digest(600), "stable": digest(7)})
    assert re.findall(r"0\.(\d+)\.0</code> <code class=soft>\w+</code><span class=tag>(\w+)", page) == [
        ("400", "best"),
        ("600", "candidate"),
    ]
    assert part(page, "probes").count(">best</text>") == 2 and ">stable</text>" not in page


@pytest.mark.parametrize(
    ("interval", "words"), [([-0.2, -0.1], "it forgets"), ([0.1, 0.2], "helped"), ([-0.1, 0.2], "no change"), (None, "")]
)
def test_the_matrix_is_told_in_words_that_the_interval_bears_out(tmp_path, interval, words):
    measures = {
        "in_domain": 0.4,
        "backward": 0.35,
        "forward": None,
        "forgetting": 0.031,
        "backward_transfer": -0.05,
        "forward_transfer": 0.1,
    }
    found = {
        "generations": ["2026Q3", "<Q4>"],
        "snapshots": [{"step": 10}, None],
        "matrix": [[0.412, 0.25], [0.39, None]],
        "untrained": [0.2, None],
    }
    found |= {"measures": measures, "intervals": {"backward_transfer": interval} if interval else {}, "by_snapshot": []}
    (tmp_path / "continual.json").write_text(json.dumps({"schema": "streamlearn.continual/1", "probes": {"knn": found}, "prequential": []}))
    told_ = part(page_of(tmp_path), "transfer")
    assert [w for w in ("it forgets", "helped", "no change") if w in told_] == ([words] if words else [])
    assert "41.2" in told_ and "3.1 points" in told_ and "-5.0 points" in told_ and "&lt;Q4&gt;" in told_ and "On the future" not in told_


def test_a_result_that_only_the_registry_had_is_drawn_too(tmp_path):
    row = {"step": 900, "digest": digest(900), "generation": "", "scores": {"world <b>": 0.9}}
    found = {"generations": [], "snapshots": [], "matrix": [], "untrained": [], "measures": {}, "intervals": {}, "by_snapshot": [row]}
    (tmp_path / "continual.json").write_text(json.dumps({"schema": "streamlearn.continual/1", "probes": {"knn": found}, "prequential": []}))
    page = page_of(tmp_path)
    assert "90.0% at step 900" in page and "0.900.0" in part(page, "snapshots")


@pytest.mark.slow
def test_a_browser_shows_a_real_home_without_complaint_on_a_desk_and_on_a_phone(tmp_path, data_dir):
    config, registry = real(tmp_path, data_dir)
    told(tmp_path)
    drifted(tmp_path)
    channels = {"candidate": registry.find("candidate").digest}
    page = page_of(tmp_path, channels, config)
    near, heat = part(page, "retrieval"), part(page, "transfer")
    assert near.count("alt='airplane, right'") > 0 and near.count("<img class=ok") > 20 and "step 32" in near
    assert "2026Q3" in heat and "Forgetting" in heat and "95 %" in heat and "candidate" in near
    for width in (DESKTOP_PX, PHONE_PX):
        needs, complaints, shot = looked_at(tmp_path / "report.html", tmp_path, width)
        image = Image.open(shot).convert("RGB")
        assert complaints == [] and needs == width == image.width
        assert len(set(image.resize((64, 64)).getdata())) > 50


def test_the_command_writes_the_page_with_the_registrys_channels(tmp_path):
    (tmp_path / "config.json").write_text(Config(home=str(tmp_path)).model_dump_json(by_alias=True))
    told(tmp_path)
    done = CliRunner().invoke(cli, ["report", "--home", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "0.600.0" in (tmp_path / "report.html").read_text() and not (tmp_path / "registry").exists()


def test_the_views_bear_anything_that_is_missing(home, tmp_path):
    from rich.console import Console

    for place in (tmp_path / "empty", home):
        view = overview(place, {"train": 2})
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(panel(view, 3700))
        text = console.export_text()
        assert "1 h 01 min" in text
        assert line(view, 12).startswith("up 12 s | ingest")
    assert "world <b> k-NN" in text and "40.0%" in text and sparkline([1, 2, 3]) == "▁▅█"
