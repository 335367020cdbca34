"""A small registry of our own, for what Debian's does not do: the referrers API, uploads that go on within a chunk, blobs on another host,
compare-and-set of tags; and for what no registry should do: wrong bytes, no digests, refusals on order."""

import hashlib
import json
import re
import socket
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from streamlearn.contract.oci import INDEX, MANIFEST, digest_of


class OciServer:
    """`with OciServer() as server:`; all repositories share their blobs.  Attributes are set by tests, at any time."""

    def __init__(self):
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}  # by digest: media type, bytes
        self.tags: dict[str, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []  # method, path with query, headers
        self.before: Callable[[str, str], tuple[int, dict[str, str]] | None] = lambda method, path: None  # an answer of its own
        self.elsewhere = ""  # where blobs are redirected to
        self.serves = lambda data: data  # what is sent of a blob or a manifest
        self.referrers_api, self.ranges, self.heeds_preconditions, self.page = True, True, False, 1000
        self.lock = threading.Lock()
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"served": self, "protocol_version": "HTTP/1.1"}))
        self.httpd.daemon_threads = True
        self.httpd.handle_error = lambda request, address: None  # clients are killed here; what a handler does wrong, the test sees
        self.host = f"127.0.0.1:{self.httpd.server_address[1]}"

    def __enter__(self) -> "OciServer":
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        ending = threading.Thread(target=self.httpd.shutdown)
        ending.start()
        socket.create_connection(self.httpd.server_address).close()  # wakes it: it looks around only then, or now and again
        ending.join()
        self.httpd.server_close()

    def asked(self, method: str, path: str = "") -> list[str]:
        return [p for m, p, _ in self.log if m == method and re.search(path, p)]


class _Handler(BaseHTTPRequestHandler):
    served: OciServer

    def log_message(self, *args: object) -> None: ...

    def handle_one(self) -> None:
        s = self.served
        with s.lock:
            s.log.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            mine = s.before(self.command, self.path)
        if mine is not None:
            self._body()
            self._say(mine[0], mine[1])
            return
        path, query = urlsplit(self.path).path, {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        for pattern, act in (
            (r"/v2/.+/blobs/uploads/$", self._upload_new),
            (r"/v2/.+/blobs/uploads/([0-9a-f]+)$", self._upload),
            (r"/v2/.+/blobs/(sha256:[0-9a-f]{64})$", self._blob),
            (r"/v2/.+/manifests/([^/]+)$", self._manifest),
            (r"/v2/.+/tags/list$", self._tags),
            (r"/v2/.+/referrers/(.+)$", self._referrers),
        ):
            found = re.match(pattern, path)
            if found:
                act(query, *found.groups())
                return
        self._say(404)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_one

    def _body(self, keep: Callable[[bytes], object] = lambda data: None) -> bool:
        left = int(self.headers.get("Content-Length", 0))
        while left:
            data = self.rfile.read1(min(left, 2**16))
            if not data:
                return False  # hung up
            keep(data)
            left -= len(data)
        return True

    def _say(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", length: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._say(status, {"Content-Type": "application/json"}, json.dumps({"errors": [{"code": code, "message": "of the test"}]}).encode())

    def _upload_new(self, query: dict[str, str]) -> None:
        self._body()
        if query.get("mount") in self.served.blobs and query.get("from"):
            self._say(201, {"Location": f"/v2/x/blobs/{query['mount']}"})
            return
        name = uuid.uuid4().hex
        self.served.uploads[name] = b""
        self._say(202, {"Location": self.path.split("?")[0] + name, "Range": "0-0"})

    def _upload(self, query: dict[str, str], name: str) -> None:
        uploads = self.served.uploads
        if name not in uploads:
            self._body()
            self._refuse(404, "BLOB_UPLOAD_UNKNOWN")
            return
        told = self.headers.get("Content-Range", "").split("-")[0]
        if told.isdigit() and int(told) != len(uploads[name]):
            self._body()
            self._refuse(416, "RANGE_INVALID")
            return
        if self.command in ("PATCH", "PUT"):
            complete = self._body(lambda data: uploads.__setitem__(name, uploads[name] + data))  # what came stays, whatever happens
            if not complete:
                return
        where = {"Location": urlsplit(self.path).path, "Range": f"0-{max(0, len(uploads[name]) - 1)}"}
        if self.command != "PUT":
            self._say(204 if self.command == "GET" else 202, where)
            return
        data = uploads.pop(name)
        if digest_of(data) != query["digest"]:
            self._refuse(400, "DIGEST_INVALID")
            return
        self.served.blobs[query["digest"]] = data
        self._say(201, {"Location": f"/v2/x/blobs/{query['digest']}", "Docker-Content-Digest": query["digest"]})

    def _blob(self, query: dict[str, str], digest: str) -> None:
        if digest not in self.served.blobs:
            self._refuse(404, "BLOB_UNKNOWN")
        elif self.served.elsewhere:
            self._say(307, {"Location": f"{self.served.elsewhere}/v2/x/blobs/{digest}?signature=of-the-store"})
        else:
            self._send(self.served.serves(self.served.blobs[digest]), {})

    def _send(self, data: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if self.command != "GET" or not found or not self.served.ranges:
            self._say(200, headers, data)
        elif int(found[1]) >= len(data):
            self._say(416)
        else:
            rest = data[int(found[1]) :]
            self._say(206, headers | {"Content-Range": f"bytes {found[1]}-{len(data) - 1}/{len(data)}"}, rest)

    def _manifest(self, query: dict[str, str], reference: str) -> None:
        s = self.served
        if self.command == "PUT":
            self._put_manifest(reference)
            return
        if self.command == "DELETE":
            self._say(202 if s.tags.pop(reference, None) else 404)
            return
        digest = s.tags.get(reference, reference)
        if digest not in s.manifests:
            self._refuse(404, "MANIFEST_UNKNOWN")
            return
        kind, data = s.manifests[digest]
        self._say(200, {"Content-Type": kind, "Docker-Content-Digest": digest}, s.serves(data))

    def _put_manifest(self, reference: str) -> None:
        s, chunks = self.served, []
        self._body(chunks.append)
        data = b"".join(chunks)
        digest, manifest = digest_of(data), json.loads(data)
        with s.lock:
            held = s.tags.get(reference, "")
            wanted = self.headers.get("If-Match", f'"{held}"').strip('"')
            if s.heeds_preconditions and (wanted != held or (held and self.headers.get("If-None-Match") == "*")):
                self._refuse(412, "DENIED")
                return
            lacking = [p for p in [manifest.get("config"), *manifest.get("layers", [])] if p and p["digest"] not in s.blobs]
            if lacking:
                self._refuse(404, "MANIFEST_BLOB_UNKNOWN")
                return
            s.manifests[digest] = (self.headers["Content-Type"], data)
            if not reference.startswith("sha256:"):
                s.tags[reference] = digest
        subject = (manifest.get("subject") or {}).get("digest")
        told = {"OCI-Subject": subject} if subject and s.referrers_api else {}
        self._say(201, {"Docker-Content-Digest": digest, "Location": f"/v2/x/manifests/{digest}", **told})

    def _tags(self, query: dict[str, str]) -> None:
        names = sorted(self.served.tags)
        names = [n for n in names if n > query.get("last", "")]
        page = names[: self.served.page]
        more = {"Link": f'<{urlsplit(self.path).path}?last={page[-1]}>; rel="next"'} if len(names) > len(page) else {}
        self._say(200, more, json.dumps({"name": "x", "tags": page}).encode())

    def _referrers(self, query: dict[str, str], digest: str) -> None:
        if not self.served.referrers_api:
            self._say(404)
            return
        found = []
        for kind, data in self.served.manifests.values():
            manifest = json.loads(data)
            if (manifest.get("subject") or {}).get("digest") == digest:
                told = {"mediaType": kind, "digest": digest_of(data), "size": len(data), "artifactType": manifest.get("artifactType")}
                found.append(told | {"annotations": manifest.get("annotations")})
        self._say(200, {"Content-Type": INDEX}, json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": found}).encode())


def one_manifest(registry, text: str, **more) -> dict:
    """A manifest with one layer, whose blobs are pushed."""
    config, layer = registry.put_blob(b"{}", "application/vnd.oci.empty.v1+json"), registry.put_blob(text.encode(), "text/plain")
    fields = {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "x/y", "config": config.to_json(), "layers": [layer.to_json()]}
    return fields | more


def noise(size: int, seed: bytes = b"") -> bytes:
    """The same bytes every time, and no pattern in them."""
    return hashlib.shake_128(b"noise" + seed).digest(size)
