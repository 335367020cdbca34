"""What can be seen with the eye: what snapshots find nearest to the same queries, and what prototypes stand for."""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from streamlearn.contract.errors import Corrupt, NotFound, Retryable
from streamlearn.contract.object_store import ObjectStore
from streamlearn.contract.shards import STORED, read_sidecar, sidecar_key
from streamlearn.report.parts import esc, missing, percent, section, table
from streamlearn.report.past import Document, document
from streamlearn.report.told import Told
from streamlearn.stream.decode import decode

THUMB = 72  # px
BANKS = 3  # whose neighbours are shown
SCHEMA = "streamlearn.retrieval/1"


def retrieval(told: Told) -> str:
    title = "What it finds alike"
    files = sorted((told.home / "retrieval").glob("*.json"))
    found = [document(path, "bank", "queries", "pixels", "columns", "images", schema=SCHEMA) for path in files]
    order = list(told.banks)
    found.sort(key=lambda d: order.index(name) if (name := d.value.get("bank")) in order else len(order))
    shown = [part for known in found if (part := _neighbours(told, known))]
    if not shown:
        how = "They come with the next snapshot that is measured on a bank; the role <code>evaluate</code> adds them."
        return section("retrieval", title, missing(_why(found), how))
    note = (
        "The same queries for every snapshot, the first test image of each of a few classes; beside them the bank's images that the snapshot finds "
        "nearest. Framed green: the same class. It sees no label, neither in learning nor here."
    )
    more = f"<p class=soft>{len(shown) - BANKS} more banks in <code>retrieval/</code>.</p>" if len(shown) > BANKS else ""
    return section("retrieval", title, *shown[:BANKS], more, note=note)


def _why(found: list[Document]) -> str:
    return esc("; ".join(d.why for d in found if d.why)) or "No neighbours yet."


def _neighbours(told: Told, known: Document) -> str:
    try:
        return _bank(told, known.value)
    except (KeyError, IndexError, TypeError, ValueError) as e:
        known.why = known.why or f"a retrieval file cannot be read: {e!r}"  # of another version, or cut short and mended by hand
        return ""


def _bank(told: Told, value: Mapping[str, Any]) -> str:
    columns: list[tuple[str, list[str], Any]] = [("raw pixels", [], value["pixels"])]
    columns += [(f"step {c['step']:,}", told.tags(c["digest"]), c) for c in value["columns"]]
    tags = ("".join(f" <span class=tag>{esc(tag)}</span>" for tag in marks) for _, marks, _ in columns)
    head = [
        f"{name}{tag}<span class=soft>{percent(c['right'])} of neighbours right</span>"
        for tag, (name, _, c) in zip(tags, columns, strict=True)
    ]
    rows = []
    for i, query in enumerate(value["queries"]):
        asked = f"<img class=ask alt='' src='{_jpeg(query['jpeg'])}'><span class=soft>{esc(query['name'])}</span>"
        cells = []
        for name, marks, column in columns:
            label = esc("\n".join((name, *marks, f"{percent(column['right'])} right")))
            near = [(value["images"][str(index)], bool(right)) for index, right in column["near"][i]]
            cells.append(f"<td data-of='{label}'><div>" + "".join(_neighbour(image, right) for image, right in near) + "</div>")
        rows.append(f"<tr><th scope=row>{asked}{''.join(cells)}")
    asked = value["pixels"]["asked"]
    caption = f"Nearest first; the shares are over the neighbours of {asked:,} test images"
    return f"<h3>{esc(value['bank'])}</h3>" + table(("query", *head), rows, caption=caption, kind="near")


def _neighbour(image: Mapping[str, str], right: bool) -> str:
    said = esc(f"{image['name']}, {'right' if right else 'wrong'}")
    return f"<img{' class=ok' if right else ''} alt='{said}' title='{said}' src='{_jpeg(image['jpeg'])}'>"


def _jpeg(text: str) -> str:
    """A data URL of what is base64 indeed."""
    try:
        base64.b64decode(text, validate=True)
    except binascii.Error as e:
        raise ValueError(f"a picture is not base64: {e}") from e
    return f"data:image/jpeg;base64,{text}"


def gallery(told: Told) -> str:
    title, note = "What some prototypes stand for", "For each, the most typical of a sample of the images learnt."
    known = document(told.home / "history" / "gallery.json", "step", "prototypes")
    if not known.value:
        return section("gallery", title, missing(esc(known.why) or "None yet.", "Comes with the first snapshot."))
    rows = []
    for prototype in known.value["prototypes"]:
        number, use = esc(prototype["id"]), esc(prototype["use"])
        sources = [src for ref in prototype["refs"] if (src := thumbnail(told.store, ref))]
        images = "".join(f'<img alt="typical of prototype {number}" src="{src}">' for src in sources)
        rows.append(f"<div class=row><span class=soft>no. {number}<br>{use} images</span>{images}</div>")
    return section("gallery", title, f"<div class=scroll tabindex=0>{''.join(rows)}</div>", note=f"{note} Step {known.value['step']:,}.")


def thumbnail(store: ObjectStore, ref: str) -> str:
    """A data URL; empty where the image has gone or cannot be read."""
    name, _, index = ref.rpartition("#")
    try:
        rows = read_sidecar(store.get(sidecar_key(name))).to_pylist()
        sample = [row for row in rows if row["outcome"] == STORED][int(index)]
        image = Image.fromarray(decode(store.get_range(name, sample["member_offset"], sample["member_size"])))
    except (NotFound, Corrupt, Retryable, IndexError):
        return ""
    image.thumbnail((2 * THUMB, 2 * THUMB))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
