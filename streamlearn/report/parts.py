"""What the page is made of: sections, tables, figures.  Every text that comes from data goes through `esc`."""

import html
from collections.abc import Iterable, Sequence

CSS = """
:root{color-scheme:light dark;--ink:#222831;--soft:#5f6a77;--line:#e2e6ec;--card:#fff;--page:#f5f7fa;--blue:#1f6feb;--orange:#d9480f;
--green:#2b8a3e;--red:#c92a2a;--grid:#e6e9ee;--tint:31,111,235}
@media(prefers-color-scheme:dark){:root{--ink:#e3e8ee;--soft:#9aa6b4;--line:#333c48;--card:#1b222b;--page:#12171d;--blue:#6aa5ff;--orange:#ff9a5c;
--green:#69c97f;--red:#ff7b7b;--grid:#2b343f;--tint:106,165,255}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}h1{font-size:1.6rem;line-height:1.2;margin:.4rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 .4rem}h3{font-size:.95rem;margin:1.1rem 0 .3rem}p{margin:.3rem 0 .7rem;max-width:75ch}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:14px 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;padding:0;border:0;background:none}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px;min-width:0;overflow-wrap:anywhere}
.tile b{display:block;font-size:1.35rem;line-height:1.3}.tile span,.soft,figcaption small{color:var(--soft);font-size:.85rem}
nav{display:flex;flex-wrap:wrap;gap:4px 14px;margin:8px 0;font-size:.88rem}a{color:var(--blue)}
.notice{border-left:5px solid var(--red);padding:8px 14px;margin:8px 0;background:var(--card);border-radius:0 8px 8px 0;overflow-wrap:anywhere}
.notice.calm{border-color:var(--green)}.notice.look{border-color:var(--orange)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:16px 18px;align-items:end}
.grid.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
figure{margin:0;min-width:0;max-width:520px}figcaption{font-size:.92rem;font-weight:600;overflow-wrap:anywhere}figcaption small{font-weight:400;display:block}
svg{width:100%;height:auto;display:block}.key{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.85rem;color:var(--soft);margin:0 0 .8rem}
.key i{display:inline-block;width:22px;height:0;border-top:2px solid;vertical-align:middle;margin-right:6px}.key .dash{border-top-style:dashed}
.key .dots{border-top-style:dotted}.scroll{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.88rem;min-width:min(100%,20rem)}
caption{text-align:left;color:var(--soft);font-size:.85rem;padding:4px 0}th{font-weight:600}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}code{font-size:.9em}.win{color:var(--green);font-weight:600}.bad{color:var(--red);font-weight:600}
.heat td,.heat th{text-align:center;padding:7px 12px;border:1px solid var(--card)}.heat th:first-child{text-align:left;padding-left:0}
.tag{display:inline-block;border:1px solid;border-radius:9px;padding:0 7px;font-size:.75rem;line-height:1.5;color:var(--blue);margin-left:4px}
.bar{display:block;height:9px;border-radius:3px;background:var(--blue)}.bar.no{background:var(--orange)}td.wide{width:14rem;min-width:7rem}
.row{display:flex;gap:4px;align-items:center;margin:4px 0}.row img{width:72px;height:72px;object-fit:cover;border-radius:4px}
.row span{width:90px;flex:none}.near{border-collapse:separate;border-spacing:0}.near td,.near th{padding:5px 9px 5px 0;text-align:left;vertical-align:top}
.near td div{display:flex;gap:2px}.near img{width:35px;height:35px;object-fit:cover;border:3px solid var(--line);border-radius:4px;display:block}
.near img.ok{border-color:var(--green)}.near img.ask{width:48px;height:48px;border-color:var(--ink)}.near .soft{display:block;font-weight:400;white-space:normal}
.near th:first-child{min-width:88px;max-width:110px;white-space:normal;overflow-wrap:anywhere}.wrap td{white-space:normal}
@media(max-width:640px){main{padding:10px}section{padding:12px}.tiles{padding:0}tbody th{white-space:normal}th,td{padding:4px 6px}
.bars th:last-child,.bars td:last-child{display:none}.row{flex-wrap:wrap;gap:2px}.row span{width:100%}.row span br{display:none}
.row img{width:calc(12.5% - 2px);height:auto;aspect-ratio:1}.near,.near tbody,.near caption{display:block}.near thead{display:none}
.near tr{display:block;padding:8px 0;border-bottom:1px solid var(--line)}.near th:first-child{display:flex;gap:8px;align-items:center;max-width:none}
.near th,.near td{border:0;padding:2px 0}.near img{width:40px;height:40px}.near td{display:flex;align-items:center}
.near td::before{content:attr(data-of);width:108px;flex:none;font-size:.8rem;color:var(--soft);white-space:pre-line;line-height:1.25}}
"""


def esc(value: object) -> str:
    return html.escape(str(value))


def section(key: str, title: str, *body: str, note: str = "") -> str:
    """`title`, `note` and `body` are HTML; `key` is where the page's links lead."""
    return f"<section id={key}><h2>{title}</h2>{f'<p class=soft>{note}</p>' if note else ''}{''.join(body)}</section>"


def missing(what: str, how: str) -> str:
    """Says what is not there, and how to get it."""
    return f"<p>{what} <span class=soft>{how}</span></p>"


def drawing(caption: str, svg: str, alt: str, small: str = "") -> str:
    """A plot with its heading; `alt` says to those who cannot see it what it shows."""
    marked = svg.replace("<svg", f'<svg role="img" aria-label="{esc(alt)}"', 1)
    return f"<figure><figcaption>{caption}{f'<small>{small}</small>' if small else ''}</figcaption>{marked}</figure>"


def grid(drawings: Iterable[str], *, wide: bool = False) -> str:
    return f"<div class='grid{' wide' if wide else ''}'>{''.join(drawings)}</div>"


def key(entries: Sequence[tuple[str, str, str]]) -> str:
    """Colour (as CSS has it); `dash`, `dots`, nothing for a line, or the sign itself; and what it stands for."""
    signs = (
        f"<i class='{how}' style='color:{c}'></i>" if how in ("", "dash", "dots") else f"<b style='color:{c}'>{how} </b>"
        for c, how, _ in entries
    )
    return "<div class=key>" + "".join(f"<span>{sign}{what}</span>" for sign, (_, _, what) in zip(signs, entries, strict=True)) + "</div>"


def table(head: Sequence[str], rows: Iterable[str], *, caption: str = "", kind: str = "") -> str:
    """`head` is HTML, `rows` are whole <tr>s; scrolls by itself where it is wider than the page."""
    cells = "".join(f"<th scope=col>{cell}" for cell in head)
    told = f"<caption>{caption}</caption>" if caption else ""
    return f"<div class=scroll tabindex=0><table class='{kind}'>{told}<thead><tr>{cells}<tbody>{''.join(rows)}</table></div>"


def row(first: str, cells: Iterable[str], kind: str = "") -> str:
    return f"<tr{f' class={kind}' if kind else ''}><th scope=row>{first}" + "".join(f"<td>{cell}" for cell in cells)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def long(seconds: float) -> str:
    """In words, as exact as one would say it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


def clock(at: object) -> str:
    """Day and minute, UTC."""
    text = str(at)
    return esc(f"{text[:10]} {text[11:16]}" if len(text) >= 16 else text)
