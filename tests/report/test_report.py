"""The page: complete, self-contained, honest about what is missing; as a browser shows it."""

import io
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from streamlearn.contract.config import Config
from streamlearn.contract.object_store import FolderStore
from streamlearn.contract.shards import STORED, Outcome, ShardWriter, sidecar_key, write_sidecar
from streamlearn.report import build_report
from streamlearn.view import line, overview, panel, sparkline
from tests.conftest import missing
from tests.ingest.server import picture


def tell(home, role, *lines):
    path = home / "history" / f"{role}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps({"at": "2026-11-21T05:00:00.000Z"} | x) + "\n" for x in lines)


@pytest.fixture
def home(tmp_path):
    """A home with a past: 600 steps, three snapshots, a halving, a crash in the fetcher, a gallery."""
    steps = range(10, 610, 10)
    common = {"grad_norm": 1.0, "code_entropy": 0.4, "perplexity": 0.8}
    tell(
        tmp_path,
        "train",
        *({"step": s, "loss": 5 - s / 300, "lr": 0.3 if s < 400 else 0.15, "images": 128 * s, "fresh": 40 * s} | common for s in steps),
    )
    tell(
        tmp_path,
        "train",
        {"event": "halved", "step": 400, "lr": 0.15},
        {"step": 600, "loss": None, "lr": 0.15, "images": 1, "fresh": 1} | common,
    )
    probe = {
        "bank": "world <b>",
        "raw_knn": 0.2,
        "raw_ridge": 0.22,
        "random_knn": 0.15,
        "random_ridge": 0.2,
        "effective_rank": 12.0,
        "rankme": 80.0,
    }
    tell(
        tmp_path,
        "evaluate",
        *(
            {"tag": f"0.{s}.0", "digest": "sha256:" + "ab" * 32, "step": s, "knn": s / 1500, "ridge": s / 1200} | probe
            for s in (200, 400, 600)
        ),
    )
    tell(tmp_path, "fetch", {"stored": 500, "outcomes": {"stored": 500, "rejected:gone": 3}}, {"stored": 100, "outcomes": {"stored": 100}})
    key = "shards/a.tar"
    (tmp_path / "store" / "shards").mkdir(parents=True)
    writer = ShardWriter(tmp_path / "store" / key)
    starts = [writer.add(i, picture(i), "jpg", {}) for i in range(4)]
    writer.close()
    outcomes = [Outcome(offset=i, outcome=STORED, ext="jpg", member_offset=at, member_size=len(picture(i))) for i, at in enumerate(starts)]
    write_sidecar(tmp_path / "store" / sidecar_key(key), outcomes)
    gallery = {"step": 600, "prototypes": [{"id": 5, "use": 9, "refs": [f"{key}#{i}" for i in range(4)] + ["shards/gone.tar#0"]}]}
    (tmp_path / "history" / "gallery.json").write_text(json.dumps(gallery))
    return tmp_path


def test_the_page_has_every_part_and_asks_nobody_for_anything(home):
    page = build_report(home, Config(), FolderStore(home / "store"), home / "report.html").read_text()
    assert page.count("<svg") == 5 and page.count("data:image/jpeg") == 4
    assert "600" in page and "40.0%" in page and "2.00 ×" in page and "rejected: gone" in page
    assert "world &lt;b&gt;" in page and "<b>world" not in page
    outside = [u for u in re.findall(r"(?:src|href)=.?([a-z]+://[^ >]*)", page)]
    assert outside == []
    assert "<script" not in page and "@import" not in page


def test_a_new_home_says_what_is_missing(tmp_path):
    page = build_report(tmp_path, Config(), FolderStore(tmp_path / "store"), tmp_path / "report.html").read_text()
    for words in ("Nothing learnt yet", "No snapshot has been measured yet", "Nothing fetched yet", "Comes with the first snapshot"):
        assert words in page


def test_a_browser_shows_it_without_complaint(home, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("chromium is not installed")
    build_report(home, Config(), FolderStore(home / "store"), home / "report.html")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    flags += ["--disable-component-update", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    for name, size in (("phone", "400,2400"), ("desktop", "1200,2400")):
        shot = tmp_path / f"{name}.png"
        done = subprocess.run(
            [chromium, *flags, f"--window-size={size}", f"--screenshot={shot}", f"file://{home}/report.html"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "CONSOLE" not in done.stderr
        image = Image.open(shot).convert("RGB")
        assert image.width == int(size.split(",")[0]) and len(set(image.resize((64, 64)).getdata())) > 50


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
