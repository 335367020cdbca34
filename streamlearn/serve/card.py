"""A model card as HTML.  The card is data: every letter of it is escaped, no tag, address or attribute of it is ever passed on.

Of Markdown what our cards use: headings, paragraphs, tables, fenced code, lists, `code`, **bold**, and links as their words and address.
All else is shown as it is written.
"""

import html
import re
from collections.abc import Callable

LINK = re.compile(r"!?\[([^\]\n]{0,300})\]\(([^)\s]{0,500})\)")
CODE = re.compile(r"`([^`\n]+)`")
BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
RULE = re.compile(r"\|(?:\s*:?-+:?\s*\|)+")
MOST_LINES = 5000


def render(text: str) -> str:
    """HTML of a card, its front matter in a box of its own."""
    lines = text.replace("\r", "").split("\n")[:MOST_LINES]
    found, at = [], 0
    if lines and lines[0] == "---" and "---" in lines[1:]:
        at = lines.index("---", 1) + 1
        found.append(f"<pre>{html.escape(chr(10).join(lines[1 : at - 1]))}</pre>")
    while at < len(lines):
        made, at = _block(lines, at)
        found.append(made)
    return "".join(found)


def _block(lines: list[str], at: int) -> tuple[str, int]:
    """(HTML, index of the line after) of the block that begins at `at`."""
    line = lines[at]
    if line.startswith("```"):
        end = next((i for i in range(at + 1, len(lines)) if lines[i].startswith("```")), len(lines))
        return f"<pre>{html.escape(chr(10).join(lines[at + 1 : end]))}</pre>", end + 1
    if match := re.match(r"(#{1,6}) +(.*)", line):
        level = min(len(match[1]) + 2, 6)  # the page has h1 and h2 of its own
        return f"<h{level}>{_words(match[2])}</h{level}>", at + 1
    if line.startswith("|"):
        end = _while(lines, at, lambda x: x.startswith("|"))
        return _table(lines[at:end]), end
    if re.match(r"[-*] ", line):
        end = _while(lines, at, lambda x: re.match(r"[-*] ", x) is not None)
        return "<ul>" + "".join(f"<li>{_words(x[2:])}" for x in lines[at:end]) + "</ul>", end
    if not line.strip():
        return "", at + 1
    end = _while(lines, at + 1, lambda x: bool(x.strip()) and not re.match(r"```|#{1,6} |\||[-*] ", x))
    return f"<p>{_words(' '.join(lines[at:end]))}</p>", end


def _while(lines: list[str], at: int, good: Callable[[str], bool]) -> int:
    while at < len(lines) and good(lines[at]):
        at += 1
    return at


def _table(lines: list[str]) -> str:
    rows = [[_words(cell.strip()) for cell in line.strip().strip("|").split("|")] for line in lines if not RULE.fullmatch(line.strip())]
    kinds = ["th" if len(rows) < len(lines) else "td", *["td"] * len(rows)]
    made = "".join("<tr>" + "".join(f"<{kind}>{cell}" for cell in row) for row, kind in zip(rows, kinds, strict=False) if any(row))
    return f"<div class=wide><table class=card>{made}</table></div>"


def _words(text: str) -> str:
    """One run of text; escaped first, so that what is put around parts of it is all the markup there is."""
    escaped = html.escape(text)
    parts = CODE.split(escaped)
    for i in range(0, len(parts), 2):
        plain = LINK.sub(lambda m: f"{m[1]} ({m[2]})" if m[1] != m[2] else m[1], parts[i])
        parts[i] = BOLD.sub(r"<b>\1</b>", plain)
    for i in range(1, len(parts), 2):
        parts[i] = f"<code>{parts[i]}</code>"
    return "".join(parts)
