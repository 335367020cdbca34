"""The pages: what a person needs, quick with thousands of snapshots, and nothing in them that is not meant to be there."""

import html
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from streamlearn.contract.oci_index import REF_NAME
from streamlearn.contract.registry import OciLayout, canonical
from streamlearn.serve.card import render
from streamlearn.snapshots.artifact import LINEAGE
from streamlearn.snapshots.history import MOVE
from streamlearn.snapshots.promote import promote, rollback
from streamlearn.snapshots.publish import publish, record_result
from tests.adapters.oci import require
from tests.conftest import REPO
from tests.serve.browser import look
from tests.serve.serving import TOKEN, filled, measured, serving
from tests.snapshots.test_publish import export

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&[x](javascript:alert(1))"


def page(served, path="/"):
    status, headers, body = served.ask(path)
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert headers["content-security-policy"].startswith("default-src 'none'") and "script-src" not in headers["content-security-policy"]
    assert "<script" not in body.decode() and not re.findall(r"(?:src|href)=.?(?:[a-z]+:)?//", body.decode())
    return body.decode()


def test_the_first_page_has_snapshots_channels_curves_and_the_commands_that_pull(public):
    text = page(public)
    for version in ("0.100.0", "0.200.0", "0.300.0"):
        assert f"<a href='/snapshots/{version}'>{version}</a>" in text
    assert text.count("<svg") == 1 and "63.3%" in text and "Pull stable" in text
    assert f"skopeo copy --src-tls-verify=false docker://{public.host}/team/model:stable" in text
    assert f"oras pull --plain-http {public.host}/team/model:stable" in text and f"HF_ENDPOINT={public.url} " in text
    assert f"--registry oci://{public.host}/team/model" in text and "hf-hub:" not in text  # timm has no such model


def test_the_commands_on_the_page_do_what_they_say(public, tmp_path):
    """As a person copies them.  Not oras's: its command is not to be had everywhere (its library: test_clients.py)."""
    require("skopeo")
    found = [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page(public), re.DOTALL)]
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "HF_HOME": str(tmp_path / "hf")}
    env = os.environ | paths
    done = []
    for command in found:
        if not command.startswith("oras"):
            ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
            assert ran.returncode == 0, (command, ran.stderr)
            done.append(ran.stdout)
    weights = public.blob("model.safetensors", "stable")[1].read_bytes()
    assert len(found) == 4 and len(done) == 3 and (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert OciLayout(tmp_path / "model-layout").find("stable") is not None
    assert (Path(done[2].strip().splitlines()[-1]) / "model.safetensors").read_bytes() == weights


def test_a_snapshot_s_page_has_its_figures_lineage_files_and_card(public):
    text = page(public, "/snapshots/0.300.0")
    digest = public.layout.find("0.300.0").digest
    assert digest in text and public.layout.find("0.200.0").digest in text
    assert "<a href='/snapshots/0.200.0'>" in text or f"/snapshots/{public.layout.find('0.200.0').digest}'>0.200.0</a>" in text
    assert "application/vnd.streamlearn.probe.v1+json" in text and "63.3%" in text and "model.safetensors" in text
    assert "<h4>What it learnt from</h4>" in text and "test 0.300.0" in text
    assert page(public, f"/snapshots/{digest}") == text
    assert public.ask("/team/model")[1]["location"] == "/" and public.ask("/team/model/tree/0.100.0")[0] == 302


def test_the_first_page_says_who_moved_a_channel_and_why(tmp_path):
    layout = filled(tmp_path)
    promote(layout, "stable", "0.200.0", by="anna", why="no significant loss on 2 banks")
    with serving(layout) as served:
        assert "anna" in page(served)
        rollback(layout, "stable", by="ben", why="it was worse in the shop")
        text = page(served)
    table = text[text.index("<h2>Moves") :].split("</table>")[0]
    assert (
        table.index("ben") < table.index("it was worse in the shop") < table.index("anna") < table.index("no significant loss on 2 banks")
    )
    assert (
        "rolled back" in table and "promoted" in table and "0.200.0" in table and "moved by another tool" in table
    )  # filled() tags by hand


def test_a_private_page_says_where_the_token_goes_and_never_shows_one(private):
    text = private.ask("/", Authorization=f"Bearer {TOKEN}")[2].decode()
    assert "skopeo login --tls-verify=false -u me -p $TOKEN" in text and "HF_TOKEN=$TOKEN" in text and TOKEN not in text


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """Every text of a snapshot that its publisher chooses is an attack."""
    layout = OciLayout(tmp_path_factory.mktemp("evil") / "registry")
    made = export(7)
    made = replace(
        made, name=EVIL, license=EVIL, revision=EVIL, generation=EVIL, window=(EVIL, EVIL), notes={"init": EVIL}, cursor={EVIL: 1}
    )
    _, digest = publish(layout, made)
    record_result(layout, digest, measured(7, bank=EVIL) | {"protocol": EVIL, "logistic": EVIL})
    layout.attach(layout.manifest(digest)[0], f"application/{EVIL}", b"{}", {"org.streamlearn.protocol": EVIL})
    layout.attach(layout.manifest(digest)[0], "application/vnd.streamlearn.probe.v1+json", b"[" * 9000, {})
    layout.attach(
        layout.manifest(digest)[0],
        "application/vnd.streamlearn.probe.v1+json",
        canonical({"bank": {"x": [1]}, "knn": "1", "ridge": None}),
        {},
    )
    promote(layout, "best", digest, by=EVIL, why=EVIL)
    layout.attach(layout.manifest(digest)[0], MOVE, b"[" * 9000, {f"{LINEAGE}channel": "stable", f"{LINEAGE}number": EVIL})
    layout.tag(digest, "stable")
    with serving(layout) as served:
        yield served


@pytest.mark.parametrize("path", ["/", "/snapshots/candidate"])
def test_what_a_publisher_wrote_is_shown_and_never_obeyed(evil, path):
    text = page(evil, path)
    assert "<img" not in text and "&lt;script&gt;" in text and not re.search(r"<a [^>]*javascript", text)


CARDS = [
    "# a <b>\n\n**bold** `<i>` [x](https://e.example/<) ![y](http://e.example/z.png)", "```html\n<script>\n", "|a|b|\n|--|--|\n|<u>|`|\n", "---\nx: <y>\n---\n- <li>\n* b",
    "<style>*{display:none}</style>", "`" * 1000, "*" * 1000, "[" * 1000 + "](" * 1000, "| " * 3000, "#" * 100, "---", "---\n---", "|\n||\n|||", "\x00\x1b", "a" * 10**6, "|-" * 50_000,
]  # fmt: skip


@pytest.mark.parametrize("card", [*CARDS, EVIL], ids=lambda c: repr(c[:30]))
def test_a_card_has_no_markup_but_what_we_put_round_it(card):
    made = render(card)
    assert set(re.findall(r"</?[a-z0-9]+[^>]*>", made)) <= {
        *(f"<{x}>" for x in ["h3", "h4", "h5", "h6", "p", "b", "code", "pre", "ul", "li", "tr", "td", "th", "/h3", "/h4", "/h5", "/h6", "/p", "/b", "/code", "/pre", "/ul", "/table", "/div"]),
        "<div class=wide>", "<table class=card>",
    }  # fmt: skip


def test_a_card_reads_as_it_was_meant():
    made = render(
        "---\nlicense: mit\n---\n# T\n\none\ntwo `x<y` **b**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- l [w](https://e)\n\n```python\n# no head\n```\n"
    )
    assert made == (
        "<pre>license: mit</pre><h3>T</h3><p>one two <code>x&lt;y</code> <b>b</b></p>"
        "<div class=wide><table class=card><tr><th>a<th>b<tr><td>1<td>2</table></div>"
        "<ul><li>l w (https://e)</ul><pre># no head</pre>"
    )


def thousands(folder, count):
    """A layout whose index has so many versions, all of one snapshot's manifest with another step."""
    layout = filled(folder, steps=(1,))
    entry = dict(layout.index().tagged("0.1.0").entry)
    data = layout.manifest("0.1.0")[1]
    index = layout.index()
    for step in range(2, count + 1):
        blob = layout.put_blob(
            canonical(data | {"annotations": data["annotations"] | {"org.streamlearn.step": str(step)}}), entry["mediaType"]
        )
        marks = entry["annotations"] | {REF_NAME: f"0.{step}.0"}
        row = {**entry, "digest": blob.digest, "size": blob.size, "annotations": marks}
        index.rows[(f"0.{step}.0", "")] = type(index.tagged("0.1.0"))(row)
    layout.replace_index(index)
    return layout


def test_of_thousands_of_snapshots_only_those_on_the_page_are_opened(tmp_path):
    """The others' manifests could as well be gone."""
    layout = thousands(tmp_path, 1000)
    for step in range(2, 971):
        layout.path(layout.find(f"0.{step}.0").digest).unlink()
    with serving(layout) as served:
        first = page(served)
        assert "page 1 of 34" in first and first.count("<a href='/snapshots/0.") == 30
        assert served.ask("/?page=2")[0] == 404  # where they are wanted, it shows
        assert "0.1.0" in first and page(served) == first
        publish(layout, export(2000))
        assert "0.2000.0" in page(served)


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1200, 1000)], ids=["phone", "desktop"])
@pytest.mark.parametrize("path", ["/", "/snapshots/candidate"])
@pytest.mark.parametrize("which", ["public", "evil"])
def test_a_browser_shows_it_without_complaint_and_asks_nobody_else(request, which, path, width, height, tmp_path):
    served = request.getfixturevalue(which)
    seen = look(served.url + path, tmp_path, width=width, height=height)
    assert seen.requests in ([served.url + path], [served.url + path, "data:,"]) and seen.complaints == []
    assert seen.wide <= width  # nothing but the boxes inside scrolls sideways
    image = Image.open(io.BytesIO(seen.image)).convert("RGB")
    assert len(set(image.resize((64, 64)).getdata())) > 20
