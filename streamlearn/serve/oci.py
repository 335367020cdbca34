"""Pulls over OCI Distribution (distribution-spec v1.1): what skopeo, oras, docker and our own adapter ask for."""

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from streamlearn.contract.errors import NotFound
from streamlearn.contract.metrics import ServeMetrics
from streamlearn.contract.oci import DIGEST, INDEX
from streamlearn.serve.asked import Refused, label
from streamlearn.serve.sending import Sender, Sent
from streamlearn.serve.shelf import Shelf
from streamlearn.snapshots.artifact import MODEL

COUNT = re.compile(r"[0-9]{1,9}")


class Oci:
    def __init__(self, shelf: Shelf, sender: Sender, metrics: ServeMetrics):
        self.shelf, self.sender, self.metrics = shelf, sender, metrics

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v2", self.base),
            web.get("/v2/", self.base),
            web.get("/v2/_catalog", self.catalog),
            web.get("/v2/{name:.+}/tags/list", self.tags),
            web.get("/v2/{name:.+}/manifests/{reference}", self.manifest),
            web.get("/v2/{name:.+}/blobs/{digest}", self.blob),
            web.get("/v2/{name:.+}/referrers/{digest}", self.referrers),
        ]

    async def base(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({})

    async def catalog(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"repositories": [self.shelf.repository]})

    async def tags(self, request: web.Request) -> web.StreamResponse:
        self._ours(request)
        last, count = request.query.get("last", ""), request.query.get("n", "")
        if count and not COUNT.fullmatch(count):
            raise Refused(400, f"n = {count[:32]!r}: a number of tags", "PAGINATION_NUMBER_INVALID")
        index = await asyncio.to_thread(self.shelf.layout.index)
        names = [name for name in index.names() if name > last] if last else index.names()
        found = names[: int(count)] if count else names
        headers = {}
        if found and len(found) < len(names):
            following = urlencode({"n": count, "last": found[-1]})
            headers["Link"] = f'</v2/{self.shelf.repository}/tags/list?{following}>; rel="next"'
        return web.json_response({"name": self.shelf.repository, "tags": found}, headers=headers)

    async def manifest(self, request: web.Request) -> web.StreamResponse:
        self._ours(request)
        reference = request.match_info["reference"]
        try:
            digest = await asyncio.to_thread(self.shelf.digest_of, reference)
            known, data, _ = await asyncio.to_thread(self.shelf.read_manifest, digest)
        except NotFound as e:
            raise Refused(404, str(e), "MANIFEST_UNKNOWN") from e
        headers = {"Docker-Content-Digest": digest, "ETag": f'"{digest}"'}
        if digest in (request.headers.get("If-None-Match") or ""):
            return web.Response(status=304, headers=headers)
        if request.method == "GET":
            if known.artifact_type == MODEL:  # and not a measurement of one
                self.metrics.pulls.labels("oci", label(reference)).inc()
            self.metrics.bytes.labels("oci").inc(len(data))
        return web.Response(body=data, headers=headers | {"Content-Type": known.media_type})

    async def blob(self, request: web.Request) -> web.StreamResponse:
        self._ours(request)
        digest = _digest(request)
        try:
            return await self.sender.send(request, Sent(digest, "oci", f'"{digest}"', {"Docker-Content-Digest": digest}))
        except NotFound as e:
            raise Refused(404, str(e), "BLOB_UNKNOWN") from e

    async def referrers(self, request: web.Request) -> web.StreamResponse:
        self._ours(request)
        kind = request.query.get("artifactType", "")
        found = await asyncio.to_thread(self.shelf.layout.referrers, _digest(request), kind)
        body: Mapping[str, Any] = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [r.to_json() for r in found]}
        headers = {"Content-Type": INDEX} | ({"OCI-Filters-Applied": "artifactType"} if kind else {})
        return web.Response(body=json.dumps(body).encode(), headers=headers)

    def _ours(self, request: web.Request) -> None:
        if request.match_info["name"] != self.shelf.repository:
            raise Refused(404, f"no such repository; the one here is {self.shelf.repository}", "NAME_UNKNOWN")


def _digest(request: web.Request) -> str:
    digest = request.match_info["digest"]
    if not DIGEST.fullmatch(digest):
        raise Refused(400, "not a sha256 digest: sha256: and 64 small hexadecimal digits", "DIGEST_INVALID")
    return digest
