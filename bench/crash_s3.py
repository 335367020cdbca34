"""A small object store that speaks as much S3 as boto3 and delta-rs need for whole objects; in memory, in a process of its own.

moto takes 18 ms for a GET and a millisecond for every key that a listing looks at (this one 3 ms, client included, on the same busy machine):
a run of hundreds of commits would measure moto.  What S3 is like is moto's word all the same: the suites of store and catalog run there
(tests/adapters), and `--store moto` runs this benchmark there.
"""

import asyncio
import contextlib
import hashlib
import re
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.adapters.faultproxy import Message, _head, _with_body

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Stored:
    data: bytes
    etag: str
    at: datetime
    meta: dict[str, str]


@dataclass
class Shelf:
    """One bucket.  A request is answered in one go, so every decision is atomic."""

    objects: dict[str, Stored] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)  # sorted

    def answer(self, request: Message) -> Answer:
        method, target, _ = request.first.split(" ", 2)
        parts = urlsplit(target)
        key, query = unquote(parts.path).lstrip("/").partition("/")[2], parse_qs(parts.query, keep_blank_values=True)
        if method == "GET" and not key:
            return self._list({name: values[0] for name, values in query.items()})
        if query.keys() - {"x-id"} or method not in ("GET", "HEAD", "PUT", "DELETE"):
            return _error(501, "NotImplemented")
        if method == "PUT":
            return self._put(key, request)
        found = self.objects.get(key)
        if method == "DELETE":
            if found:
                del self.objects[key], self.keys[bisect_left(self.keys, key)]
            return 204, {}, b""
        return _error(404, "NoSuchKey") if found is None else _get(found, request.fields.get("range", ""))

    def _put(self, key: str, request: Message) -> Answer:
        there, fields = self.objects.get(key), request.fields
        if (there and fields.get("if-none-match") == "*") or ("if-match" in fields and (not there or there.etag != fields["if-match"])):
            return _error(412, "PreconditionFailed")
        if "aws-chunked" in fields.get("content-encoding", "") or "x-amz-copy-source" in fields:
            return _error(501, "NotImplemented")
        etag = f'"{hashlib.md5(request.body).hexdigest()}"'
        meta = {name: value for name, value in fields.items() if name.startswith("x-amz-meta-")}
        self.objects[key] = Stored(request.body, etag, datetime.now(UTC), meta)
        if there is None:
            insort(self.keys, key)
        return 200, {"ETag": etag}, b""

    def _list(self, query: dict[str, str]) -> Answer:
        """All in one page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = max(query.get("start-after", ""), query.get("continuation-token", ""))
        found, folders = [], set()
        for key in self.keys[bisect_left(self.keys, max(prefix, after)) :]:
            if not key.startswith(prefix):
                break
            inside = key[len(prefix) :]
            if delimiter and delimiter in inside:
                folders.add(prefix + inside.split(delimiter)[0] + delimiter)
            elif key > after:
                o = self.objects[key]
                at = o.at.strftime("%Y-%m-%dT%H:%M:%S.000Z")
                found.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{at}</LastModified>"
                    f"<ETag>{escape(o.etag)}</ETag><Size>{len(o.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders))
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found) + len(folders)}</KeyCount><MaxKeys>1000000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{''.join(found)}{common}</ListBucketResult>"
        )
        return 200, {"Content-Type": "application/xml"}, body.encode()


def _get(o: Stored, span: str) -> Answer:
    fields = {"ETag": o.etag, "Last-Modified": o.at.strftime("%a, %d %b %Y %H:%M:%S GMT"), "Accept-Ranges": "bytes"} | o.meta
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", span)
    if not asked:
        return 200, fields, o.data
    first, last = asked.groups()
    start = int(first) if first else max(0, len(o.data) - int(last))
    end = min(int(last) + 1 if first and last else len(o.data), len(o.data))
    if start >= len(o.data):
        return _error(416, "InvalidRange")
    return 206, fields | {"Content-Range": f"bytes {start}-{end - 1}/{len(o.data)}"}, o.data[start:end]


def _error(status: int, code: str) -> Answer:
    return status, {"Content-Type": "application/xml"}, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()


async def _client(shelf: Shelf, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            request = await _head(reader)
            if request.fields.get("expect", "").lower() == "100-continue":
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request = await _with_body(reader, request)
            status, fields, body = shelf.answer(request)
            lines = [f"HTTP/1.1 {status} So", *(f"{name}: {value}" for name, value in fields.items())]
            if status != 204:
                lines.append(f"Content-Length: {len(body)}")
            writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if request.first.startswith("HEAD ") else body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        return  # the client hung up
    finally:
        writer.close()


async def _run(pipe: Connection) -> None:
    shelf = Shelf()
    listener = await asyncio.start_server(lambda r, w: _client(shelf, r, w), "127.0.0.1", 0, limit=2**20)
    pipe.send(listener.sockets[0].getsockname()[:2])
    with contextlib.suppress(EOFError):  # our parent is gone: so are we
        await asyncio.to_thread(pipe.recv)


def _serve(pipe: Connection) -> None:
    asyncio.run(_run(pipe))


@contextlib.contextmanager
def serving(context: ForkServerContext) -> Iterator[tuple[str, int]]:
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs,), daemon=True)
    child.start()
    theirs.close()
    yield ours.recv()
    child.terminate()
    child.join()
