"""The wire: ranges, pages of tags, referrers, and hostile requests, which get a refusal and never anything else."""

import json
import os
import socket

import pytest

from streamlearn.contract.oci import digest_of
from streamlearn.contract.registry import OciLayout
from tests.serve.serving import DEADLINE_S, filled, serving

ZEROS = "sha256:" + "0" * 64


def test_tags_come_in_pages_that_lead_on(public):
    found, path = [], "/v2/team/model/tags/list?n=2"
    while path:
        status, headers, body = public.ask(path)
        assert status == 200 and json.loads(body)["name"] == "team/model"
        found.append(json.loads(body)["tags"])
        path = headers.get("link", "").partition(">")[0].removeprefix("<")
    assert [tag for some in found for tag in some] == public.layout.names() and [len(f) for f in found] == [2, 2, 1]
    assert json.loads(public.ask("/v2/team/model/tags/list?n=0")[2])["tags"] == []
    assert json.loads(public.ask("/v2/team/model/tags/list?last=candidate")[2])["tags"] == ["stable"]


def test_a_manifest_is_the_same_by_tag_and_digest_and_head_says_what_get_does(public):
    digest = public.layout.find("candidate").digest
    answers = [public.ask(f"/v2/team/model/manifests/{ref}", method) for ref in ("candidate", digest) for method in ("GET", "HEAD")]
    for status, headers, body in answers:
        assert status == 200 and headers["docker-content-digest"] == digest and headers["etag"] == f'"{digest}"'
        assert headers["content-type"] == "application/vnd.oci.image.manifest.v1+json" and headers["content-length"] == str(
            len(answers[0][2])
        )
        assert not body or digest_of(body) == digest
    assert answers[1][2] == b"" and public.ask(f"/v2/team/model/manifests/{digest}", If_None_Match=f'"{digest}"')[0] == 304


@pytest.mark.parametrize(("asked", "status", "part"), [
    ("bytes=0-0", 206, (0, 1)), ("bytes=5-", 206, (5, None)), ("bytes=-7", 206, (-7, None)), ("bytes=3-99999999999", 206, (3, None)),
    ("bytes=-99999999999", 206, (0, None)), ("bytes=1048570-1048590", 206, (1048570, 1048591)),
    ("bytes=99999999999-", 416, None), ("bytes=-0", 416, None),
    ("bytes=9-3", 200, None), ("bytes=a-b", 200, None), ("bytes=0-1,3-4", 200, None), ("bytes=-", 200, None), ("items=0-1", 200, None),
    ("bytes=" + "9" * 5000 + "-", 200, None), ("bytes=１-２".encode().decode("latin-1"), 200, None),
])  # fmt: skip
@pytest.mark.parametrize("path", ["/v2/team/model/blobs/{digest}", "/team/model/resolve/candidate/model.safetensors"])
def test_ranges(public, path, asked, status, part):
    digest, file = public.blob("model.safetensors")
    data = file.read_bytes()
    got = public.ask(path.format(digest=digest), Range=asked)
    assert got[0] == status
    if status == 206:
        want = data[part[0] : part[1]]
        at = data.index(want)
        assert got[2] == want and got[1]["content-range"] == f"bytes {at}-{at + len(want) - 1}/{len(data)}"
    elif status == 416:
        assert got[1]["content-range"] == f"bytes */{len(data)}"
    else:
        assert got[2] == data and "content-range" not in got[1]


def test_a_part_is_only_sent_of_what_the_client_has_the_rest_of(public):
    digest, _ = public.blob("model.safetensors")
    path = f"/v2/team/model/blobs/{digest}"
    assert public.ask(path, Range="bytes=0-9", If_Range=f'"{digest}"')[0] == 206
    assert public.ask(path, Range="bytes=0-9", If_Range='"another"')[0] == 200
    assert public.ask(path, Range="bytes=0-9", If_Range="Sat, 21 Nov 2026 00:00:00 GMT")[0] == 200
    status, headers, body = public.ask(path, "HEAD", Range="bytes=0-9")
    assert (status, body, headers["accept-ranges"], headers["etag"]) == (200, b"", "bytes", f'"{digest}"')
    assert public.ask(path, If_None_Match=f'"{digest}"')[0] == 304


def test_referrers_are_listed_and_filtered_and_no_one_s_are_an_empty_list(public):
    digest = public.layout.find("candidate").digest
    kind = public.layout.referrers(digest)[0].artifact_type
    for query, count in (("", 1), (f"?artifactType={kind.replace('+', '%2B')}", 1), ("?artifactType=other", 0)):
        status, headers, body = public.ask(f"/v2/team/model/referrers/{digest}{query}")
        found = json.loads(body)
        assert status == 200 and len(found["manifests"]) == count and headers["content-type"] == found["mediaType"]
        assert headers.get("oci-filters-applied") == ("artifactType" if query else None)
    assert json.loads(public.ask(f"/v2/team/model/referrers/{ZEROS}")[2])["manifests"] == []


HOSTILE = [
    *(f"/v2/team/model/{kind}/{ref}" for kind in ("blobs", "manifests", "referrers") for ref in (
        "..", "../index.json", "..%2f..%2findex.json", "%2e%2e%2findex.json", "sha256:..%2f..%2f..%2findex.json", "sha256:" + "G" * 64, "sha256:" + "A" * 64,
        "sha256:" + "0" * 63, "sha512:" + "0" * 128, "sha256%3A" + "0" * 63 + "%00", "%00", "%ff%fe", "x" * 5000, "a%0d%0aX-Evil:%201", "é", "sha256:", "-", "'",
    )),
    *("/v2/team/model/tags/list?n=" + n for n in ("-1", "x", "9" * 5000, "1e3", "%00", "１")),
    "/v2/../../etc/passwd", "/v2/%2e%2e/%2e%2e/etc/passwd/tags/list", "/v2//tags/list", "/v2/team/model/", "/v2/" + "a/" * 2000 + "tags/list",
    "/v2/team/model/blobs/uploads/", "/v2/other/manifests/candidate", "/v2/team/model/tags/list?last=%ff%00",
    *(f"/team/model/resolve/{rest}" for rest in (
        "main/../../../index.json", "main/..%2f..%2findex.json", "main/%2fetc%2fpasswd", "..%2f../config.json", "main/.", "main/config.json/", "main/config.json%00",
        "0" * 40 + "/config.json", "refs%2fpr%2f1/config.json", "main/" + "a/" * 1000, "main%0d%0aX-Evil:1/config.json",
    )),
    *(f"/api/models/{rest}" for rest in ("team/model/revision/..%2f..", "team/model/tree/main/../..", "team/model/tree/%00", "..%2f../revision/main", "x", "a/b/c/d")),
    "/snapshots/..%2f..%2findex.json", "/snapshots/<script>alert(1)</script>", "/snapshots/%3Cscript%3E", "/snapshots/sha256:" + "0" * 64, "/snapshots/" + "x" * 5000,
    "/?page=0", "/?page=-1", "/?page=x", "/?page=999999", "/?page=" + "9" * 5000, "//etc/passwd", "/index.json", "/blobs", "/%", "/%zz", "*", "http://evil.example/v2/",
]  # fmt: skip


def raw(server, data):
    """What comes back for these bytes."""
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), DEADLINE_S) as s:
        s.sendall(data)
        found = b""
        while piece := s.recv(2**16):
            found += piece
    return found


@pytest.mark.parametrize("path", HOSTILE, ids=lambda p: p[:60])
def test_a_hostile_path_is_refused_and_leads_nowhere(public, path):
    found = raw(public, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = found.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    fine = path.startswith(("/v2/team/model/tags/list?last", "http://evil"))  # a question well asked; this server all the same
    assert 400 <= status < 500 or (fine and status == 200), head
    assert b"\nX-Evil" not in head and b"imageLayoutVersion" not in found and b"root:" not in found and b"<script" not in body
    if path.startswith("/v2/") and status != 400:
        assert status == 200 or json.loads(body)["errors"][0]["code"]


@pytest.mark.parametrize("head", [
    "X-Big: " + "x" * 100_000, "\r\n".join(f"X-{i}: {'y' * 900}" for i in range(200)), "Range: bytes=" + "0-0," * 2000, "Authorization: " + "Basic " * 1000,
    "Content-Length: -1", "Content-Length: 99999999999999999999999", "Transfer-Encoding: chunked\r\nContent-Length: 3", "Bad Header", "Host: a\r\nHost: b",
    "If-None-Match: " + '"x",' * 1500, "If-Range: \x7f", "Accept-Encoding: gzip", "Expect: 100-continue", "Expect: something", "Upgrade: websocket",
])  # fmt: skip
def test_hostile_headers_never_break_it(public, head):
    found = raw(public, f"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n{head}\r\nConnection: close\r\n\r\n".encode())
    assert int(found.split(b" ")[1]) < 500
    assert public.ask("/v2/")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize(
    "path", ["/v2/team/model/blobs/uploads/", "/v2/team/model/manifests/candidate", "/", "/team/model/resolve/main/config.json"]
)
def test_it_is_only_read(public, method, path):
    status, headers, body = public.ask(path, method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    if path.startswith("/v2"):
        assert json.loads(body)["errors"][0]["code"] == "UNSUPPORTED"


def test_what_others_left_in_the_folder_is_not_handed_out(tmp_path):
    """Links out of it, names that lead out of it, manifests that are none."""
    layout = filled(tmp_path, steps=(1,))
    (tmp_path / "secret").write_bytes(b"secret")
    outside = digest_of(b"secret")
    layout.path(outside).symlink_to(tmp_path / "secret")
    pipe = digest_of(b"pipe")
    os.mkfifo(layout.path(pipe))
    blob = layout.put_blob(b"x", "a/b")
    layers = [
        blob.to_json() | {"annotations": {"org.opencontainers.image.title": name}}
        for name in ("../../secret", "/etc/passwd", "a/../b", "good.txt", "x\r\ny", ".hidden")
    ]
    odd = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": layout.put_blob(b"{}", "a/b").to_json(),
        "layers": layers,
    }
    layout.put_manifest(odd, tag="odd")
    deep = layout.put_blob(b"[" * 100_000, "a/b").digest
    bad = layout.put_blob(b'{"schemaVersion":2,"mediaType":"a\\r\\nX-Evil: 1"}', "a/b").digest
    with serving(layout) as served:
        for digest in (outside, pipe):
            assert served.ask(f"/v2/team/model/blobs/{digest}")[0] == 404
        for digest in (outside, blob.digest, deep, bad, served.blob("model.safetensors", "0.1.0")[0]):
            assert served.ask(f"/v2/team/model/manifests/{digest}")[0] == 404
        assert [f["path"] for f in json.loads(served.ask("/api/models/team/model/tree/odd")[2])] == ["good.txt"]
        assert served.ask("/team/model/resolve/odd/good.txt")[2] == b"x" and served.ask("/snapshots/odd")[0] == 200


def test_an_empty_registry_says_so(tmp_path):
    with serving(OciLayout(tmp_path / "registry")) as served:
        assert b"None has been published yet" in served.ask("/")[2]
        assert json.loads(served.ask("/v2/team/model/tags/list")[2])["tags"] == []
        assert served.ask("/api/models/team/model")[1]["x-error-code"] == "RevisionNotFound"
        assert served.ask("/snapshots/main")[0] == 404
