"""The part of Hugging Face's Hub API that pulls: what huggingface_hub (2.4.0 read), timm and transformers ask for with HF_ENDPOINT.

A repository's revisions are the tags; `main` is `stable`, else `candidate`.  A commit is the first 40 letters of a manifest's digest, so a client
that has resolved a tag goes on with what it was, wherever the tag moves.  X-Error-Code is what the clients' exceptions are made from.
"""

import asyncio
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from streamlearn.contract.errors import NotFound
from streamlearn.contract.metrics import ServeMetrics
from streamlearn.serve.asked import COMMIT, VERSION, Refused, label
from streamlearn.serve.sending import Sender, Sent
from streamlearn.serve.shelf import File, Shelf

POINTER = 134  # bytes of a git-lfs pointer, which clients want to know and nobody has
WEIGHTS = "model.safetensors"
REPO = "{repo:[^/]+(?:/[^/]+)?}"


class Hub:
    def __init__(self, shelf: Shelf, sender: Sender, metrics: ServeMetrics, *, private: bool):
        self.shelf, self.sender, self.metrics, self.private = shelf, sender, metrics, private

    def routes(self) -> list[web.RouteDef]:
        api = f"/api/models/{REPO}"
        return [
            web.get(f"{api}/revision/{{revision}}", self.info),
            web.get(f"{api}/tree/{{revision}}", self.tree),
            web.get(f"{api}/tree/{{revision}}/{{path:.*}}", self.tree),
            web.get(f"{api}/refs", self.refs),
            web.get(api, self.info),
            web.get(f"/{REPO}/resolve/{{revision}}/{{file:.+}}", self.resolve),
        ]

    async def info(self, request: web.Request) -> web.StreamResponse:
        revision = request.match_info.get("revision", "main")
        digest = await self._found(request, revision)
        self.metrics.pulls.labels("hf", label(self.shelf.named(revision))).inc()
        return web.json_response(await asyncio.to_thread(self._info, digest))

    async def tree(self, request: web.Request) -> web.StreamResponse:
        digest = await self._found(request, request.match_info["revision"])
        below = request.match_info.get("path", "").strip("/")
        found = [_entry(f) for f in self.shelf.files(digest).values() if not below or f.name == below or f.name.startswith(below + "/")]
        if below and not found:
            raise Refused(404, f"no file {below[:200]!r} in this revision", "EntryNotFound", {"X-Repo-Commit": digest[7:47]})
        return web.json_response(found)

    async def refs(self, request: web.Request) -> web.StreamResponse:
        self._ours(request)
        index = await asyncio.to_thread(self.shelf.layout.index)
        rows = [(name, row.digest[7:47]) for name in index.names() if (row := index.tagged(name))]
        main = [commit for name, commit in rows if name == self.shelf.named("main")]
        return web.json_response(
            {
                "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": commit} for commit in main],
                "converts": [],
                "tags": [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit} for name, commit in rows],
            }
        )

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        revision, name = request.match_info["revision"], request.match_info["file"]
        digest = await self._found(request, revision)
        commit = {"X-Repo-Commit": digest[7:47]}
        file = self.shelf.files(digest).get(name)
        if file is None:
            raise Refused(404, f"no file {name[:200]!r} in this revision", "EntryNotFound", commit)
        etag = f'"{file.digest[7:]}"'
        headers = commit | {"X-Linked-Etag": etag, "X-Linked-Size": str(file.size)}
        if request.query.get("download") == "true":
            headers["Content-Disposition"] = f'attachment; filename="{name.rpartition("/")[2]}"'
        if request.method == "GET" and name == WEIGHTS and not COMMIT.fullmatch(revision):  # who names a commit was counted by `info`
            self.metrics.pulls.labels("hf", label(self.shelf.named(revision))).inc()
        try:
            return await self.sender.send(request, Sent(file.digest, "hf", etag, headers))
        except NotFound as e:
            raise Refused(404, str(e), "EntryNotFound", commit) from e

    async def _found(self, request: web.Request, revision: str) -> str:
        self._ours(request)
        try:
            digest = await asyncio.to_thread(self.shelf.revision, revision)
            await asyncio.to_thread(self.shelf.manifest, digest)
        except NotFound as e:
            raise Refused(404, f"no revision {revision[:128]!r}: {e}", "RevisionNotFound") from e
        return digest

    def _ours(self, request: web.Request) -> None:
        if request.match_info["repo"] != self.shelf.repository:
            raise Refused(404, f"no such model; the one here is {self.shelf.repository}", "RepoNotFound")

    def _info(self, digest: str) -> dict[str, Any]:
        marks, files = self.shelf.marks(digest), self.shelf.files(digest)
        head = front_matter(self.shelf.text(digest, "README.md"))
        tags = [*head.get("tags", "").strip("[]").replace(" ", "").split(","), *self.shelf.contents().tags.get(digest, ())]
        found = {
            "id": self.shelf.repository,
            "modelId": self.shelf.repository,
            "sha": digest[7:47],
            "private": self.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [tag for tag in tags if tag and not VERSION.fullmatch(tag)],
            "library_name": head.get("library_name", "streamlearn"),
            "pipeline_tag": head.get("pipeline_tag", "image-feature-extraction"),
            "siblings": [{"rfilename": f.name, "size": f.size, "blobId": f.digest[7:47], "lfs": _lfs(f) | {"sha256": f.digest[7:]}} for f in files.values()],
        }  # fmt: skip
        when = _moment(marks.get("org.opencontainers.image.created", ""))
        return found | ({"createdAt": when, "lastModified": when} if when else {})


def front_matter(card: str) -> dict[str, str]:
    """The `key: value` lines between the dashes at a card's top."""
    if not card.startswith("---\n"):
        return {}
    lines = card[4 : max(card.find("\n---", 3), 4)].splitlines()
    return {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}


def _lfs(file: File) -> dict[str, Any]:
    return {"oid": file.digest[7:], "size": file.size, "pointerSize": POINTER}


def _entry(file: File) -> dict[str, Any]:
    return {"type": "file", "path": file.name, "size": file.size, "oid": file.digest[7:47], "lfs": _lfs(file)}


def _moment(text: str) -> str:
    """As the clients parse it, to the millisecond; '' where it is none."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    except (ValueError, OverflowError):
        return ""
