"""The pages for people: what there is, how good it is, where it comes from, and the exact commands that pull it."""

import asyncio
import html
import re

from aiohttp import web

from streamlearn.contract.config_serve import ServeConfig
from streamlearn.contract.errors import NotFound
from streamlearn.contract.oci_index import Index
from streamlearn.serve.asked import CHANNELS, VERSION, Refused
from streamlearn.serve.card import render
from streamlearn.serve.commands import base, commands
from streamlearn.serve.figures import BANKS, Curves, by_bank, measured
from streamlearn.serve.hub import front_matter
from streamlearn.serve.look import badges, facts, link, page, percent, section, short, sized, table, tiles
from streamlearn.serve.moves import moves
from streamlearn.serve.shelf import Contents, Shelf
from streamlearn.snapshots.artifact import LINEAGE

ROWS = 30  # snapshots on a page of the list
ANCESTORS = 12  # of a lineage
PAGE = re.compile(r"[0-9]{1,6}")
IMAGE = "org.opencontainers.image."


class Pages:
    def __init__(self, shelf: Shelf, config: ServeConfig, *, private: bool):
        self.shelf, self.config, self.private = shelf, config, private
        self.curves = Curves(shelf)
        self.moved_at: tuple[Index | None, str] = (None, "")

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self.index),
            web.get("/snapshots/{reference}", self.snapshot),
            web.get(f"/{self.shelf.repository}", self.moved),
            web.get(f"/{self.shelf.repository}/tree/{{revision}}", self.moved),
        ]

    async def index(self, request: web.Request) -> web.StreamResponse:
        number = request.query.get("page", "1")
        if not PAGE.fullmatch(number) or int(number) < 1:
            raise Refused(400, f"page = {number[:32]!r}: a number from 1")
        return _html(await asyncio.to_thread(self._index, base(request, self.config), int(number)))

    async def snapshot(self, request: web.Request) -> web.StreamResponse:
        return _html(await asyncio.to_thread(self._snapshot, base(request, self.config), request.match_info["reference"]))

    async def moved(self, request: web.Request) -> web.StreamResponse:
        """Where Hugging Face has its pages of a model."""
        revision = request.match_info.get("revision", "main")
        raise web.HTTPFound("/" if revision == "main" else f"/snapshots/{await asyncio.to_thread(self.shelf.revision, revision)}")

    def _index(self, url: str, number: int) -> str:
        contents = self.shelf.contents()
        versions = contents.versions
        main = self.shelf.named("main")
        head = f"<h1>{html.escape(self.shelf.repository)}</h1><div class=soft>snapshots of a model that goes on learning</div>"
        if not versions:
            return page(self.shelf.repository, head + section("Snapshots", "<p>None has been published yet.</p>"))
        parts = [head, _tiles(contents)]
        if number == 1:
            parts += [
                self._pull(url, main if self.shelf.layout.index().tagged(main) else f"0.{versions[-1][0]}.0"),
                self._channels(contents),
                self._moved(contents),
            ]
            parts.append(self.curves.of(versions))
        parts.append(self._list(contents, number))
        return page(self.shelf.repository, "".join(parts))

    def _pull(self, url: str, tag: str) -> str:
        digest = self.shelf.digest_of(tag)
        in_timm = front_matter(self.shelf.text(digest, "README.md")).get("library_name") == "timm"
        made = commands(url, self.shelf.repository, tag, private=self.private, in_timm=in_timm)
        note = "Put a token of this registry into TOKEN first." if self.private else ""
        return section(f"Pull {html.escape(tag)}", made, note)

    def _channels(self, contents: Contents) -> str:
        """Where the channel tags point."""
        rows = []
        for channel in CHANNELS:
            row = contents.index.tagged(channel)
            if row is not None:
                version = next((tag for tag in contents.tags[row.digest] if VERSION.fullmatch(tag)), row.digest[:19])
                found = by_bank(self.shelf.results(row.digest))
                figures = ", ".join(f"{html.escape(bank)} {percent(found[bank].get('knn'))}" for bank in sorted(found)[:BANKS])
                rows.append([badges([channel]), link(row.digest, version), figures or "–", short(row.digest)])
        body = table(["channel", "points to", "k-NN", "digest"], rows) if rows else "<p>None yet.</p>"
        return section("Channels", body, "Tags that move; a version never does. <code>main</code> is stable, else candidate.")

    def _moved(self, contents: Contents) -> str:
        """Read once for each state of the index: of a tag that another tool moved, the record before has to be looked for everywhere."""
        if self.moved_at[0] is not contents.index:
            self.moved_at = (contents.index, moves(self.shelf, contents))
        return self.moved_at[1]

    def _list(self, contents: Contents, number: int) -> str:
        pages = -(-len(contents.versions) // ROWS)
        if number > pages:
            raise Refused(404, f"there are {pages} pages")
        shown = contents.versions[::-1][(number - 1) * ROWS : number * ROWS]
        found = {digest: by_bank(self.shelf.results(digest)) for _, digest in shown}
        banks = list(dict.fromkeys(bank for results in found.values() for bank in sorted(results)))[:BANKS]
        rows = []
        for step, digest in shown:
            channels = [tag for tag in contents.tags[digest] if not VERSION.fullmatch(tag)]
            size = sum(file.size for file in self.shelf.files(digest).values())
            figures = [percent(found[digest].get(bank, {}).get(key)) for bank in banks for key in ("knn", "ridge")]
            when = html.escape(self.shelf.marks(digest).get(IMAGE + "created", "–")[:16].replace("T", " "))
            rows.append([link(f"0.{step}.0", f"0.{step}.0") + badges(channels), *figures, f"{step:,}", when, sized(size), short(digest)])
        turn = " · ".join(
            [f"<a href='/?page={number - 1}'>newer</a>"] * (number > 1)
            + [f"page {number} of {pages}"]
            + [f"<a href='/?page={number + 1}'>older</a>"] * (number < pages)
        )
        head = ["snapshot", *(f"{probe} {bank}" for bank in banks for probe in ("k-NN", "ridge")), "step", "learnt up to", "size", "digest"]
        return section("Snapshots", table(head, rows) + (f"<nav>{turn}</nav>" if pages > 1 else ""))

    def _snapshot(self, url: str, reference: str) -> str:
        digest = self.shelf.revision(reference)
        marks, contents = self.shelf.marks(digest), self.shelf.contents()
        tags = contents.tags.get(digest, ())
        name = next((tag for tag in tags if VERSION.fullmatch(tag)), tags[0] if tags else digest)
        title = f"{self.shelf.repository} {name[:19]}"
        channels = badges(tag for tag in tags if tag != name)
        head = f"<nav><a href='/'>all snapshots</a></nav><h1>{html.escape(title)}{channels}</h1>"
        parts = [
            head,
            self._facts(digest, marks),
            measured(self.shelf.results(digest)),
            self._lineage(digest, contents),
            self._pull(url, name),
            self._files(digest, name),
            section("Model card", render(self.shelf.text(digest, "README.md")) or "<p>This snapshot has none.</p>"),
        ]
        return page(title, "".join(parts))

    def _facts(self, digest: str, marks: dict[str, str]) -> str:
        window = marks.get(LINEAGE + "window", "").replace("/", " to ", 1)
        found = [
            ("digest", f"<code>{html.escape(digest)}</code>"),
            ("digest before it", f"<code>{html.escape(marks.get(LINEAGE + 'parent.digest', ''))}</code>"),
            ("step", html.escape(marks.get(LINEAGE + "step", ""))),
            ("learnt from images fetched", html.escape(window)),
            ("generation", html.escape(marks.get(LINEAGE + "generation", ""))),
            ("began as", html.escape(marks.get(LINEAGE + "init", ""))),
            ("code", html.escape(marks.get(IMAGE + "revision", ""))),
            ("licence", html.escape(marks.get(IMAGE + "licenses", ""))),
        ]
        return section("Facts", facts(found))

    def _lineage(self, digest: str, contents: Contents) -> str:
        """The snapshots before it, and all that refers to it."""
        chain: list[str] = []
        at = digest
        while len(chain) < ANCESTORS and (parent := self.shelf.marks(at).get(LINEAGE + "parent.digest", "")):
            try:
                self.shelf.manifest(parent)
            except NotFound:
                chain.append(f"{html.escape(parent[:19])} (not here any more)")
                break
            version = next((tag for tag in contents.tags.get(parent, ()) if VERSION.fullmatch(tag)), parent[:19])
            chain.append(link(parent, version))
            at = parent
        before = " ← ".join(chain) or "none: this is where the run began"
        more = " ← …" if len(chain) == ANCESTORS else ""
        referring = self.shelf.layout.referrers(digest)
        rows = [
            [
                html.escape(r.artifact_type[:80]),
                html.escape(r.annotations.get(LINEAGE + "protocol", "")[:60]),
                f"{r.size:,}",
                short(r.digest),
            ]
            for r in referring[:ROWS]
        ]
        made = table(["kind", "protocol", "bytes", "digest"], rows) if rows else "<p class=soft>Nothing refers to it.</p>"
        more_rows = f"<p class=soft>and {len(referring) - ROWS} more</p>" if len(referring) > ROWS else ""
        return section("Lineage", f"<p>Snapshots before it: {before}{more}</p><h3>What refers to it</h3>{made}{more_rows}")

    def _files(self, digest: str, name: str) -> str:
        at = f"/{self.shelf.repository}/resolve/{name if not name.startswith('sha256:') else digest[7:47]}"
        rows = [
            [f"<a href='{html.escape(f'{at}/{f.name}?download=true')}'>{html.escape(f.name)}</a>", sized(f.size), short(f.digest)]
            for f in self.shelf.files(digest).values()
        ]
        return section("Files", table(["file", "size", "sha256"], rows))


def failure(status: int, message: str) -> str:
    return page(f"{status}", f"<nav><a href='/'>all snapshots</a></nav>{section(str(status), f'<p>{html.escape(message)}</p>')}")


def _tiles(contents: Contents) -> str:
    names = {channel: row.digest for channel in CHANNELS if (row := contents.index.tagged(channel))}
    newest = contents.versions[-1]
    found = [(f"{len(contents.versions):,}", "snapshots"), (f"0.{newest[0]}.0", "newest")]
    for channel, digest in names.items():
        if channel != "candidate" or digest != newest[1]:
            version = next((tag for tag in contents.tags[digest] if VERSION.fullmatch(tag)), digest[7:19])
            found.append((version, channel))
    return tiles(found)


def _html(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/html", headers={"Cache-Control": "no-cache"})
