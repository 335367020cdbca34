"""Bytes that are not what they were are never served as if they were; large files take no memory."""

import hashlib
import http.client
import os
import random
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from streamlearn.contract.errors import Corrupt, Retryable
from streamlearn.contract.oci import digest_of
from streamlearn.contract.registry import OciLayout
from streamlearn.serve import sending
from tests.adapters.oci import remote
from tests.conftest import REPO
from tests.serve.serving import DEADLINE_S, filled, serving

BIG = 2**29  # bytes


def flip(path, at):
    """One bit, and the times as they were: as a disk would do it."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("at", [0, 1_500_000, -1])
def test_a_flipped_bit_of_a_file_is_refused_to_every_client_and_counted(tmp_path, at):
    with serving(filled(tmp_path, steps=(1,))) as served:
        digest, path = served.blob("model.safetensors")
        blob = f"/v2/team/model/blobs/{digest}"
        assert served.ask(blob)[0] == 200
        flip(path, at)
        paths = (blob, "/team/model/resolve/main/model.safetensors")
        for asked in paths:
            for headers in ({}, {"Range": "bytes=100-200"}, {"Range": "bytes=5000-"}):
                status, _, body = served.ask(asked, **headers)
                assert status == 500 and b"damaged" in body and len(body) < 500
        assert served.counted("serve_corrupt_total") == 6
        far = remote(served.host, tmp_path / "spool", registry=f"oci://{served.host}/team/model", attempts=1)
        with pytest.raises((Corrupt, Retryable)):
            far.copy_blob(digest, tmp_path / "out")
        flip(path, at)  # restored from another copy
        assert served.ask(blob)[0] == 200 and served.ask(blob, Range="bytes=5-9")[0] == 206


@pytest.mark.slow
def test_huggingface_hub_gets_no_damaged_file_however_often_it_tries(tmp_path):
    with serving(filled(tmp_path, steps=(1,))) as served:
        flip(served.blob("model.safetensors")[1], 7)
        with pytest.raises((LocalEntryNotFoundError, HfHubHTTPError)) as e:  # the first if its HEAD was refused, the second if its GET
            huggingface_hub.hf_hub_download("team/model", "model.safetensors", endpoint=served.url, cache_dir=tmp_path / "hf", token=False)
        assert "500" in f"{e.value} {e.value.__cause__}"
        assert not list((tmp_path / "hf").rglob("model.safetensors"))


def test_a_flipped_bit_of_a_manifest_is_refused_by_tag_and_digest_and_the_page_says_so(tmp_path):
    with serving(filled(tmp_path, steps=(1,))) as served:
        digest = served.layout.find("candidate").digest
        flip(served.layout.path(digest), 40)
        for path in (
            "/v2/team/model/manifests/candidate",
            f"/v2/team/model/manifests/{digest}",
            "/api/models/team/model",
            "/snapshots/candidate",
        ):
            status, _, body = served.ask(path)
            assert status == 500 and b"damaged on the server" in body
        assert served.counted("serve_corrupt_total") == 4


@pytest.fixture
def large_is_small(monkeypatch):
    """So that a file of 3 MB goes the way of one that is too large to be read before it is sent."""
    monkeypatch.setattr(sending, "READ_FIRST", 2**20)


@pytest.mark.parametrize("at", [0, 1_500_000, -1])
def test_a_large_damaged_file_is_broken_off_before_its_end_and_then_refused(tmp_path, large_is_small, at):
    with serving(filled(tmp_path, steps=(1,))) as served:
        digest, path = served.blob("model.safetensors")
        flip(path, at)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)) as e:
            served.ask(f"/v2/team/model/blobs/{digest}")
        if isinstance(e.value, http.client.IncompleteRead):
            assert len(e.value.partial) < path.stat().st_size
        assert served.counted("serve_corrupt_total") == 1
        assert served.ask(f"/v2/team/model/blobs/{digest}", Range="bytes=-9")[0] == 500  # the rest, that a client asks for then
        assert served.ask(f"/v2/team/model/blobs/{digest}", "HEAD")[0] == 500


def test_no_part_of_a_large_damaged_file_is_sent_though_nobody_asked_for_the_whole(tmp_path, large_is_small):
    with serving(filled(tmp_path, steps=(1,))) as served:
        digest, path = served.blob("model.safetensors")
        flip(path, 1_500_000)
        assert served.ask(f"/v2/team/model/blobs/{digest}", Range="bytes=0-9")[0] == 500


def test_a_large_sound_file_is_sent_whole_and_in_parts(tmp_path, large_is_small):
    with serving(filled(tmp_path, steps=(1,))) as served:
        digest, path = served.blob("model.safetensors")
        blob = f"/v2/team/model/blobs/{digest}"
        data = path.read_bytes()
        assert served.ask(blob, Range="bytes=7-99")[2] == data[7:100]
        assert served.ask(blob)[2] == data and served.counted("serve_corrupt_total") == 0


def test_an_index_that_cannot_be_read_is_said_by_the_role_and_refused(tmp_path):
    with serving(filled(tmp_path, steps=(1,))) as served:
        kept = (served.layout.root / "index.json").read_bytes()
        (served.layout.root / "index.json").write_bytes(b"{")
        assert served.ask("/v2/team/model/tags/list")[0] == 500 and served.ask("/")[0] == 500
        (served.layout.root / "index.json").write_bytes(kept)
        assert served.ask("/v2/team/model/tags/list")[0] == 200


@pytest.mark.slow
def test_half_a_gigabyte_is_served_in_flat_memory_whole_in_parts_and_to_many(tmp_path):
    layout = OciLayout(tmp_path / "registry")
    source, piece = tmp_path / "source", random.Random(1).randbytes(2**20)
    with source.open("wb") as f:
        for i in range(BIG // 2**20):
            f.write(i.to_bytes(8, "big") + piece[8:])
    known = layout.put_file(source, "a/b")
    source.unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.big", str(layout.root)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        host = process.stdout.readline().strip()
        streams = []
        for headers in ({}, {}, {"Range": f"bytes={BIG // 2}-"}):
            connection = http.client.HTTPConnection(host, timeout=DEADLINE_S)
            connection.request("GET", f"/v2/team/model/blobs/{known.digest}", headers=headers)
            streams.append((connection, connection.getresponse(), hashlib.sha256()))
        first = streams[0]
        while piece := first[1].read(2**20):  # the others wait: what they are sent must not pile up meanwhile
            first[2].update(piece)
        assert "sha256:" + first[2].hexdigest() == known.digest
        assert sum(len(piece) for piece in iter(lambda: streams[2][1].read(2**20), b"")) == BIG // 2
        for connection, _, _ in streams:
            connection.close()
        before, after = map(int, process.communicate("\n", timeout=DEADLINE_S)[0].split())
    finally:
        process.kill()
        process.wait()
    print(f"{before} -> {after} MB")
    assert after - before < 40 and digest_of(b"") != known.digest
