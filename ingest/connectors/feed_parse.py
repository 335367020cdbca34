"""The images of a feed: RSS 0.9 to 2.0, Atom, Media RSS, JSON Feed 1.1.

Feeds are written by anybody.  What cannot be read is `NoFeed`, and nothing else is raised.  feedparser reads the XML: it resolves no
external entities and expands none that are nested, so neither a file of this machine nor a thousand million laughs come out of a feed.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from xml.sax import SAXException

import feedparser

from ingest.connectors import html
from ingest.connectors.offer import IMAGE_EXTENSIONS
from streamlearn.contract.errors import StreamlearnError

# what feedparser has been seen to raise on garbage: its loose parser works with regular expressions on whatever it gets
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError, SAXException)


class NoFeed(StreamlearnError):
    """Why not."""


@dataclass(frozen=True)
class Image:
    entry: str  # the entry's id: its own, else its link
    url: str
    alt: str
    license: str


def images(body: bytes, url: str, content_type: str, *, from_html: bool) -> list[Image]:
    """In the feed's order, each (entry, URL) once.  Raises NoFeed."""
    try:
        found = (
            _json(body, url, from_html)
            if "json" in content_type.lower() or body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"
            else _xml(body, url, content_type, from_html)
        )
        return list(dict.fromkeys(found))
    except _BROKEN as e:
        raise NoFeed(f"{type(e).__name__}: {e}"[:300]) from e


def _xml(body: bytes, url: str, content_type: str, from_html: bool) -> Iterator[Image]:
    headers = {"content-location": url, "content-type": content_type}
    # sanitizing would only take time: of its HTML nothing but the images is looked at
    feed = feedparser.parse(io.BytesIO(body), response_headers=headers, sanitize_html=False, resolve_relative_uris=False)
    if not dict.get(feed, "version") and not feed.entries:
        raise NoFeed("neither RSS nor Atom nor JSON Feed")
    for entry in feed.entries:
        raw = dict(entry)  # a FeedParserDict guesses where a key is absent
        title = _text(raw.get("title"))
        license_ = _license(raw) or _license(dict(feed.feed))
        name = _text(raw.get("id")) or _text(raw.get("link")) or title
        base = _base(raw) or url
        for link, alt in _media(raw) or _thumbnails(raw):
            yield from _image(name, html.join(base, link) or link, alt or title, license_)
        for link, alt in _enclosures(raw):
            yield from _image(name, html.join(base, link) or link, alt or title, license_)
        if from_html:
            for text, own in _markup(raw):
                page = html.read(text, own or base)
                for link, alt in page.images:
                    yield from _image(name, link, alt or title, license_ or page.license or "")


def _image(entry: str, url: str, alt: str, license_: str) -> Iterator[Image]:
    if url:
        yield Image(entry, url, alt, license_)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _dicts(value: object) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list) else []


def _base(entry: Mapping[str, Any]) -> str:
    """xml:base, which feedparser keeps beside every text."""
    for part in [*_dicts(entry.get("content")), *(entry.get(k) for k in ("summary_detail", "title_detail"))]:
        if isinstance(part, Mapping) and _text(part.get("base")):
            return _text(part.get("base"))
    return ""


def _is_image(kind: object, link: str) -> bool:
    kind = _text(kind).lower()
    return kind.startswith("image/") or (not kind and link.partition("?")[0].lower().endswith(IMAGE_EXTENSIONS))


def _media(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for media in _dicts(entry.get("media_content")):
        link, medium = _text(media.get("url")), _text(media.get("medium")).lower()
        if link and (medium == "image" or (not medium and _is_image(media.get("type"), link))):
            found.append((link, _text(media.get("title"))))
    return found


def _thumbnails(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(_text(t.get("url")), "") for t in _dicts(entry.get("media_thumbnail"))]


def _enclosures(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    links = [link for link in _dicts(entry.get("links")) if link.get("rel") == "enclosure"]
    return [(_text(e.get("href")), _text(e.get("title"))) for e in links if _is_image(e.get("type"), _text(e.get("href")))]


def _markup(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    parts = _dicts(entry.get("content")) or _dicts([entry.get("summary_detail")])
    return [(_text(p.get("value")), _text(p.get("base"))) for p in parts]


def _license(context: Mapping[str, Any]) -> str:
    media = context.get("media_license")
    if isinstance(media, Mapping) and (_text(media.get("href")) or _text(media.get("content"))):
        return _text(media.get("href")) or _text(media.get("content"))
    links = [_text(link.get("href")) for link in _dicts(context.get("links")) if link.get("rel") == "license"]
    return next(filter(None, links), "") or _text(context.get("rights"))


def _json(body: bytes, url: str, from_html: bool) -> Iterator[Image]:
    feed = json.loads(body.decode("utf-8-sig"))
    if not isinstance(feed, dict) or not _text(feed.get("version")).startswith("https://jsonfeed.org/version/"):
        raise NoFeed("JSON, but no JSON Feed")
    for item in _dicts(feed.get("items")):
        number = item.get("id")
        name = str(number) if isinstance(number, str | int | float) else _text(item.get("url"))
        title, license_ = _text(item.get("title")) or _text(item.get("summary")), _text(item.get("license")) or _text(feed.get("license"))
        links = [(_text(item.get(key)), title) for key in ("image", "banner_image")]
        for attachment in _dicts(item.get("attachments")):
            if _is_image(attachment.get("mime_type"), _text(attachment.get("url"))):
                links.append((_text(attachment.get("url")), _text(attachment.get("title")) or title))
        for link, alt in links:
            if link:
                yield from _image(name, html.join(url, link) or link, alt, license_)
        if from_html:
            page = html.read(_text(item.get("content_html")), url)
            for link, alt in page.images:
                yield from _image(name, link, alt or title, license_ or page.license or "")
