"""Feeds: RSS, Atom, Media RSS and JSON Feed, each looked at every `interval_s`.

The cursor, for each feed: the validators of the last answer that was told whole (512 characters each), when to look again, whether it is
gone (410), and a mark of each of the last 2,000 images told, 8 bytes each.  So a feed takes at most 20 KiB, forty of them 800 KiB: within the
megabyte of a Kafka record.  The validators come last: killed between two batches of one answer, the feed is asked for whole again.

A 304, or the same feed once more, writes nothing.  What fails waits by itself, and does not hold up the others.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from pydantic import Field

from ingest.connectors import feed_parse
from ingest.connectors.base import BATCH, Cursor, Found
from ingest.connectors.http import MAX_WAIT_S, Answer, HttpOptions, Late, Web
from ingest.connectors.offer import Marks, mark, offer, refuse
from ingest.fetch.guard import complaint
from streamlearn.contract.errors import ConfigError, Retryable

logger = logging.getLogger(__name__)
TOLD = 2000  # images of one feed that are remembered, and that are taken from one answer
VALIDATOR_CHARS = 512
LOOK_S = 5.0  # of one `discover`: the next one goes on with the feeds that are due


class FeedOptions(HttpOptions):
    feeds: tuple[str, ...] = Field(min_length=1, max_length=40)  # URLs; more of them: another connector
    interval_s: float = Field(default=900.0, ge=1)  # between looks at one feed
    max_bytes: int = Field(default=4 * 2**20, ge=1024)  # of one feed, unpacked: a megabyte that is made to hurt takes half a minute to read
    from_html: bool = True  # also the <img> of entries' HTML


class FeedConnector:
    Options = FeedOptions

    def __init__(self, name: str, options: FeedOptions):
        self.name, self.options, self.web = name, options, Web(options)
        self._later: dict[str, float] = {}  # unix seconds; of feeds that failed or had nothing new: not worth a cursor

    def check(self) -> None:
        for url in self.options.feeds:
            why = complaint(url) or ("over 2,000 characters" if len(url) > 2000 else "")
            if why:
                raise ConfigError(f"connector {self.name}: feeds = {url[:200]!r}: {why}; name the feed's http or https URL")
        if len(set(self.options.feeds)) < len(self.options.feeds):
            raise ConfigError(f"connector {self.name}: feeds = {list(self.options.feeds)!r}: one is named twice; name it once")

    def close(self) -> None:
        self.web.close()

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        known = cursor["feeds"] if cursor else {}
        states: dict[str, dict[str, Any]] = {url: dict(known.get(url, {})) for url in self.options.feeds}
        begun, failed = time.monotonic(), ""
        for url in sorted((u for u in states if self._due(u, states[u]) <= time.time()), key=lambda u: self._due(u, states[u])):
            try:
                for found in self._look(url, states[url]):
                    found.cursor = {"feeds": {u: dict(s) for u, s in states.items() if s}}
                    yield found
                self._later[url] = time.time() + self.options.interval_s  # not before: what was not recorded is asked for again
            except Retryable as e:
                failed = f"feed {e}"
                logger.warning("connector %s: %s", self.name, failed)
                self._later[url] = time.time() + max(e.after_s, min(self.options.interval_s, 60.0))
            if time.monotonic() - begun > LOOK_S:
                break
        if failed:
            next_look = min(self._due(u, s) for u, s in states.items())
            raise Retryable(failed, after_s=max(0.0, next_look - time.time()))

    def _due(self, url: str, state: dict[str, Any]) -> float:
        """Unix seconds.  A clock that was wrong when the cursor was recorded costs one interval."""
        if state.get("gone"):
            return float("inf")
        recorded = min(float(state.get("next", 0.0)), time.time() + self.options.interval_s)
        return max(recorded, min(self._later.get(url, 0.0), time.time() + MAX_WAIT_S))

    def _look(self, url: str, state: dict[str, Any]) -> Iterator[Found]:
        """One feed: batches, after each of which `state` is what to record.  Raises Retryable."""
        headers = {"Accept": "application/feed+json, application/atom+xml, application/rss+xml, application/xml;q=0.9, */*;q=0.5"}
        headers |= {name: state[key] for name, key in (("If-None-Match", "etag"), ("If-Modified-Since", "modified")) if state.get(key)}
        answer = self.web.get(url, headers | {"Accept-Encoding": "gzip"})
        if answer.status == 304:
            return
        if answer.status == 410:
            logger.warning("connector %s: feed %s is gone (410): it is not asked for again", self.name, url)
            state.clear()
            state["gone"] = True
            yield Found()
        elif answer.status != 200:
            raise Retryable(f"{url}: HTTP {answer.status}", after_s=self.options.interval_s)
        else:
            yield from self._told(url, answer, state)

    def _told(self, url: str, answer: Answer, state: dict[str, Any]) -> Iterator[Found]:
        told, found = Marks(state.get("told"), TOLD), Found()
        images = self._images(url, answer, told, found)
        marks = [mark(image.entry, image.url) for image in images]
        told.add([m for m in marks if m in told])  # first what the feed still shows, so that none of it gives way to what is new
        for image, made in zip(images, marks, strict=True):
            if made in told:
                continue
            told.add([made])
            offer(found, self.name, image.url, f"{url}#{image.entry}", license=image.license, alt=image.alt)
            if len(found) >= BATCH:
                state["told"] = told.dump()
                yield found
                found = Found()
        after = {"etag": answer.headers.get("ETag", ""), "modified": answer.headers.get("Last-Modified", "")}
        after = {k: v for k, v in after.items() if 0 < len(v) <= VALIDATOR_CHARS and v.isascii() and v.isprintable()}
        if len(found) or after != {k: state[k] for k in ("etag", "modified") if k in state} or "next" not in state:
            state.clear()
            state |= after | {"told": told.dump(), "next": round(time.time() + self.options.interval_s, 3)}
            yield found

    def _images(self, url: str, answer: Answer, told: Marks, found: Found) -> list[feed_parse.Image]:
        """What is in the answer; garbage is refused, once as long as it stays the same."""
        try:
            if not answer.whole:
                raise feed_parse.NoFeed(f"over max_bytes = {self.options.max_bytes}")
            kind = answer.headers.get("Content-Type", "")
            parse = partial(feed_parse.images, answer.body, answer.url, kind, from_html=self.options.from_html)
            images = self.web.patience.call("reading it", parse, self.options.total_s)
        except (feed_parse.NoFeed, Late) as e:
            garbage = mark("garbage", hashlib.sha256(answer.body).hexdigest())
            if garbage not in told:
                told.add([garbage])
                refuse(found, url, url, str(e))
            return []
        if len(images) > TOLD:
            logger.warning("connector %s: %s has %d images; the first %d are taken", self.name, url, len(images), TOLD)
        return images[:TOLD]
