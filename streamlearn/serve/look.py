"""How the page looks, and the small pieces it is made of.  No script, nothing from elsewhere; nothing wider than a phone but in a box of its own."""

import html
from collections.abc import Iterable
from urllib.parse import quote

CSS = """
:root{--ink:#222831;--soft:#5c6672;--line:#e2e6ec;--card:#fff;--page:#f5f7fa;--blue:#1f6feb}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1000px;margin:0 auto;padding:16px}h1{font-size:1.5rem;margin:.3rem 0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:0 0 .6rem}
h3,h4,h5,h6{font-size:1rem;margin:1.1rem 0 .3rem}a{color:var(--blue);text-decoration:none}a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:14px 0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;padding:0;border:0;background:none}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px;min-width:0}.tile b{display:block;font-size:1.35rem}
.tile span,.soft{color:var(--soft);font-size:.85rem}svg{width:100%;height:auto;max-width:860px;display:block}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--line);white-space:nowrap}th{font-weight:600;color:var(--soft)}
th:first-child,td:first-child{text-align:left}table.card td,table.card th{text-align:left;white-space:normal;min-width:7em}
pre{background:#f0f3f7;border-radius:8px;padding:10px 12px;margin:.3rem 0 .9rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.82rem;line-height:1.45}
code{font-size:.88em}p{margin:.4rem 0}ul{margin:.3rem 0;padding-left:1.2rem}dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;margin:0}
dt{color:var(--soft);font-size:.88rem}dd{margin:0;min-width:0}.tag{display:inline-block;border-radius:99px;padding:0 8px;font-size:.78rem;
background:#e7eefc;color:#174ea6;margin-left:4px}.tag.stable{background:#e3f4e7;color:#1e6b33}.tag.best{background:#fdefd8;color:#8a4b00}
.why{display:block;min-width:16em;max-width:34em;white-space:normal;text-align:left}.moves th:last-child{text-align:left}
nav{display:flex;gap:16px;flex-wrap:wrap;margin:.6rem 0 0}.to{font-weight:600;margin:0}
@media(max-width:560px){svg{min-width:520px}main{padding:10px}section{padding:12px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
"""


def page(title: str, body: str) -> str:
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><link rel=icon href='data:,'>"
    return f"<!doctype html><html lang=en>{head}<title>{html.escape(title)}</title><style>{CSS}</style><main>{body}</main></html>"


def section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{f'<p class=soft>{note}</p>' if note else ''}{body}</section>"


def tiles(found: Iterable[tuple[str, str]]) -> str:
    made = "".join(f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for value, label in found)
    return f"<section class=tiles>{made}</section>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    made = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<div class=wide><table><tr>{''.join(f'<th>{html.escape(h)}' for h in head)}{made}</table></div>"


def facts(found: Iterable[tuple[str, str]]) -> str:
    """Values are HTML already."""
    return "<dl>" + "".join(f"<dt>{html.escape(name)}<dd>{value}" for name, value in found if value) + "</dl>"


def badges(tags: Iterable[str]) -> str:
    return "".join(f"<span class='tag {tag if tag in ('stable', 'best') else ''}'>{html.escape(tag)}</span>" for tag in tags)


def link(reference: str, words: str) -> str:
    return f"<a href='/snapshots/{quote(reference, safe=':')}'>{html.escape(words)}</a>"


def short(digest: str) -> str:
    return f"<code class=soft>{html.escape(digest[7:19])}</code>"


def sized(size: int) -> str:
    for unit, letter in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {letter}"
    return f"{size / 1e3:,.1f} kB"


def percent(value: object) -> str:
    """Of a measurement, which is data: anything but a share is a dash."""
    return f"{value:.1%}" if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 else "–"
