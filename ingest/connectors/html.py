"""The images of an HTML page, however broken.  Linear in its size: every search goes forward, and whatever never ends, ends the page.

Not html.parser: it takes a second for a megabyte, and quadratic time for some that are made to hurt.
"""

import re
from dataclasses import dataclass, field
from html import unescape
from urllib.parse import urljoin

MAX_TAGS = 10_000  # that are looked into, in one page
TAG_CHARS = 8192  # of one tag
_ATTRIBUTE = re.compile(r"""[\s/]*([^\s=>/"'<]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>"']+)))?""")
_NAME = re.compile(r"<(img|meta|base|a|link|script|style|textarea|title)(?=[\s/>])", re.IGNORECASE)
_RAW = {name: re.compile(f"</{name}", re.IGNORECASE) for name in ("script", "style", "textarea", "title")}  # what they hold is no markup
_PREVIEWS = {"og:image", "og:image:url", "og:image:secure_url", "twitter:image"}


@dataclass
class Page:
    """What a page says of images."""

    images: list[tuple[str, str]] = field(default_factory=list)  # (absolute URL, alternative text), each URL once
    license: str | None = None  # rel=license


def read(html: str, base: str) -> Page:
    """Never raises."""
    page, seen, at = Page(), set[str](), 0
    for _ in range(MAX_TAGS):
        tag = _next(html, at)
        if tag is None:
            break
        name, start = tag
        values, end = _attributes(html[start : start + TAG_CHARS])
        at = start + end
        rel = values.get("rel", "").lower().split()
        if name == "base" and values.get("href"):
            base = join(base, values["href"]) or base
        elif name in ("a", "link") and "license" in rel and page.license is None:
            page.license = join(base, values.get("href", "")) or None
        for link, alt in _links(name, values):
            url = join(base, link)
            if url and url not in seen:
                seen.add(url)
                page.images.append((url, alt))
    return page


def join(base: str, link: str) -> str:
    """The absolute URL; empty for what is none, or is no http.  An empty link would be the page itself."""
    try:
        url = urljoin(base, link.strip()) if link.strip() else ""
    except ValueError:
        return ""
    return url if url.lower().startswith(("http://", "https://")) else ""


def _next(html: str, at: int) -> tuple[str, int] | None:
    """The next tag that matters, and where its attributes begin."""
    found = _NAME.search(html, at)
    while found is not None:
        comment = html.find("<!--", at, found.start())
        if comment >= 0:
            at = html.find("-->", comment + 4) + 3
            if at < 3:
                return None
        elif (name := found[1].lower()) in _RAW:
            end = _RAW[name].search(html, found.end())
            if end is None:
                return None
            at = end.end()
        else:
            return name, found.end()
        if found.start() < at:  # else it stays the next one: looking for it anew after every comment would be quadratic
            found = _NAME.search(html, at)
    return None


def _attributes(tag: str) -> tuple[dict[str, str], int]:
    """Names in lower case, the first of each; and where the tag ends."""
    values: dict[str, str] = {}
    at = 0
    while found := _ATTRIBUTE.match(tag, at):
        values.setdefault(found[1].lower(), _unescape(found[2] or found[3] or found[4] or ""))
        at = found.end()
    return values, at


def _unescape(value: str) -> str:
    return unescape(value) if "&" in value else value


def _links(name: str, values: dict[str, str]) -> list[tuple[str, str]]:
    if name == "img":
        source = values.get("src", "").strip()
        if not source or source.lower().startswith("data:"):  # loaded later, by a script
            source = values.get("data-src", "")
        return [(source, values.get("alt", ""))] if source else []
    if name == "meta" and (values.get("property") or values.get("name") or "").lower() in _PREVIEWS:
        return [(values["content"], "")] if values.get("content") else []
    return []
