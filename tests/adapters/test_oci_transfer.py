"""Transfers that break off: killed, cut, refused, forgotten; they go on where they were, and what arrives is checked."""

import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from streamlearn.contract.errors import Corrupt, NotFound, Retryable
from streamlearn.contract.oci import digest_of
from tests.adapters.faultproxy import Fault, FaultProxy
from tests.adapters.oci import Choke, DockerRegistry, remote, require, settings
from tests.adapters.oci_server import OciServer, noise, one_manifest
from tests.conftest import REPO

MIB = 2**20
DATA = noise(10 * 2**16 + 77)  # ten chunks and a bit
BIG = 24 * MIB + 5


@pytest.fixture
def server():
    with OciServer() as served:
        yield served


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


def client(act, url, tmp_path, *more, **options):
    argv = [sys.executable, "-m", "tests.adapters.oci_client", act, url, str(tmp_path / "spool"), *map(str, more)]
    return subprocess.Popen(argv, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def address(host):
    return host.split(":")[0], int(host.split(":")[1])


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- killed ---


@pytest.mark.parametrize("kind", ["docker-registry", "one that keeps what came"])
def test_a_push_that_was_killed_goes_on(kind, server, request, tmp_path):
    """SIGKILL in the middle of a chunk.  Debian's forgets the upload then, and the blob is sent anew; others go on within the chunk."""
    host = server.host if kind != "docker-registry" else request.getfixturevalue("docker_registry").host
    (tmp_path / "file").write_bytes(noise(BIG))
    with Choke(address(host), up=13 * MIB) as wire:
        url = settings(wire.host).registry
        killed = client("push", url, tmp_path, tmp_path / "file")
        assert wire.choked.wait(120)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list((tmp_path / "spool").glob("*.upload"))) == 1
        wire.let_pass()
        again = client("push", url, tmp_path, tmp_path / "file")
        _, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
        own = remote(wire.host, tmp_path / "spool", registry=url)
        assert own.check_blob(digest_of(noise(BIG))) == BIG and list((tmp_path / "spool").glob("*.upload")) == []
    went_on = re.search(r"goes on at (\d+) of", err)
    assert (went_on is None) == (kind == "docker-registry")
    if went_on:
        assert int(went_on[1]) % (4 * MIB) and int(went_on[1]) > 12 * MIB  # not even the broken chunk was lost


def test_a_push_that_was_killed_between_chunks_goes_on_at_debians_registry_too(tmp_path):
    require("docker-registry")
    (tmp_path / "file").write_bytes(DATA)
    with DockerRegistry(tmp_path / "served") as served, FaultProxy(address(served.host)) as proxy:
        first = remote(f"127.0.0.1:{proxy.port}", tmp_path / "spool", attempts=1)
        proxy.faults = [Fault("reset_before", method="PATCH", times=99, path="never")]
        stop_after(proxy, 4)
        with pytest.raises(Retryable):
            first.put_file(tmp_path / "file", "a/b")
        proxy.faults = []
        served.stop(signal.SIGKILL)  # the registry too
        served.start()
        proxy.seen.clear()
        second = remote("x:1", tmp_path / "spool", registry=first.config.registry)
        done = second.put_file(tmp_path / "file", "a/b")
        assert len(proxy.requests("PATCH")) == 7 and proxy.requests("POST") == [] and second.check_blob(done.digest) == len(DATA)


def stop_after(proxy, chunks):
    """The next `chunks` PATCHes pass, the others are dropped."""
    proxy.faults = [Fault("delay", method="PATCH", times=chunks), Fault("reset_before", method="PATCH", times=999)]
    proxy.faults.append(Fault("reset_before", method="GET", times=999, path="uploads"))


def test_a_pull_that_was_killed_at_any_byte_goes_on_and_is_checked(server, tmp_path):
    server.blobs[digest_of(noise(BIG))] = noise(BIG)
    part = tmp_path / "spool" / f"{digest_of(noise(BIG)).replace(':', '-')}.part"
    # within the header, after it, and further each time
    for more, kept in ((100, 0), (1000, 0), (5 * MIB + 3, 4 * MIB), (9 * MIB, 12 * MIB)):
        with Choke(address(server.host), down=more) as wire:
            killed = client("pull", f"oci://{wire.host}/x", tmp_path, tmp_path / "copy", digest_of(noise(BIG)))
            assert wire.choked.wait(120)
            wait_until(lambda kept=kept: part.exists() and part.stat().st_size >= kept)
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        assert not (tmp_path / "copy").exists()
    server.log.clear()
    own = remote(server.host, tmp_path / "spool")
    own.copy_blob(digest_of(noise(BIG)), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == noise(BIG)
    (asked,) = [headers["range"] for method, path, headers in server.log if method == "GET"]
    assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 12 * MIB


def test_what_a_killed_pull_left_is_not_trusted(server, tmp_path):
    """Power loss may leave anything in a part."""
    digest = digest_of(DATA)
    server.blobs[digest] = DATA
    own = remote(server.host, tmp_path / "spool")
    for left in (DATA[:1000], b"~" * 1000, DATA, b"~" * len(DATA), DATA + b"~", b""):
        (own.spool.folder / f"{digest.replace(':', '-')}.part").write_bytes(left)
        own.copy_blob(digest, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == DATA
    server.ranges = False
    (own.spool.folder / f"{digest.replace(':', '-')}.part").write_bytes(DATA[:1000])
    own.copy_blob(digest, tmp_path / "copy")  # the whole comes where the rest was asked for
    assert (tmp_path / "copy").read_bytes() == DATA


def test_two_who_transfer_the_same_blob_at_once_do_not_meet(server, file, tmp_path):
    own = [remote(server.host, tmp_path / "spool", registry=f"oci://{server.host}/x") for _ in range(6)]
    failed = []

    def both(i):
        try:
            done = own[i].put_file(file, "a/b")
            own[i].copy_blob(done.digest, tmp_path / f"copy{i}")
        except (Corrupt, NotFound, Retryable) as e:
            failed.append(e)

    threads = [threading.Thread(target=both, args=(i,)) for i in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert failed == [] and {(tmp_path / f"copy{i}").read_bytes() for i in range(6)} == {DATA}
    assert {p.suffix for p in (tmp_path / "spool").iterdir()} <= {".lock"}


# --- cut, refused, forgotten ---

PASSING = [
    Fault("reset_before", "POST"), Fault("reset_after", "POST"), Fault("answer", "POST"), Fault("reset_before", "PATCH"),
    Fault("reset_after", "PATCH"), Fault("answer", "PATCH", status=500), Fault("answer", "PATCH", status=404, code="BLOB_UPLOAD_UNKNOWN"),
    Fault("reset_before", "PUT"), Fault("reset_after", "PUT"), Fault("answer", "PUT", status=429), Fault("reset_before", "HEAD", times=2),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["docker-registry", "referrers API"])
@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f"{f.act} {f.method} {f.status}")
def test_one_fault_on_the_way_in_is_survived(fault, kind, server, file, request, tmp_path):
    host = server.host if kind != "docker-registry" else request.getfixturevalue("docker_registry").host
    with FaultProxy(address(host)) as proxy:
        own = remote(f"127.0.0.1:{proxy.port}", tmp_path / "spool")
        proxy.faults = [Fault(fault.act, fault.method, times=fault.times, status=fault.status, code=fault.code)]
        done = own.put_file(file, "a/b")
        assert proxy.faults[0].times == 0
        small = own.put_manifest(one_manifest(own, "1"), tag="v1")
        assert own.read_blob(done.digest) == DATA and own.find("v1").digest == small.digest


@pytest.mark.parametrize("act", ["truncate", "unframed", "reset_before", "reset_after", "answer", "whole"])
def test_one_fault_on_the_way_out_is_survived(act, server, tmp_path):
    server.blobs[digest_of(DATA)] = DATA
    with FaultProxy(address(server.host)) as proxy:
        own = remote(f"127.0.0.1:{proxy.port}", tmp_path / "spool")
        proxy.faults = [Fault(act, "GET", keep=100_000), Fault("truncate", "GET", keep=50_000)]
        own.copy_blob(digest_of(DATA), tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == DATA and own.read_blob(digest_of(DATA)) == DATA


def test_a_line_that_always_breaks_is_given_up_and_later_gone_on_with(server, file, tmp_path):
    with FaultProxy(address(server.host)) as proxy:
        own = remote(f"127.0.0.1:{proxy.port}", tmp_path / "spool")
        stop_after(proxy, 3)
        with pytest.raises(Retryable, match="failed"):
            own.put_file(file, "a/b")
        proxy.faults = []
        server.log.clear()
        own.put_file(file, "a/b")
        assert server.blobs[digest_of(DATA)] == DATA and len(server.asked("PATCH")) == 8 and server.asked("POST") == []


def test_an_upload_that_is_forgotten_after_each_chunk_is_given_up(server, file, tmp_path):
    def forget(method, path):
        if method == "PATCH" and len(server.asked("PATCH")) % 3 == 0:
            server.uploads.clear()

    server.before = forget
    with pytest.raises(Retryable, match="forgotten"):
        remote(server.host, tmp_path / "spool").put_file(file, "a/b")
    assert len(server.asked("POST")) == 3


def test_an_upload_that_gets_nowhere_is_given_up(server, file, tmp_path):
    server.before = lambda method, path: (202, {"Location": path, "Range": "0-0"}) if method == "PATCH" else None
    with pytest.raises(Retryable, match="forgotten"):
        remote(server.host, tmp_path / "spool").put_file(file, "a/b")


def test_bytes_that_change_on_their_way_in_are_refused(server, tmp_path):
    """The registry finds another digest: sent anew once, and then it is said."""
    (tmp_path / "changing").write_bytes(DATA)

    def change(method, path):
        if method == "PATCH":
            with (tmp_path / "changing").open("r+b") as f:
                f.write(b"~" * len(DATA))

    server.before = change
    with pytest.raises(Corrupt, match="DIGEST_INVALID"):
        remote(server.host, tmp_path / "spool").put_file(tmp_path / "changing", "a/b")
    assert server.blobs == {} and list((tmp_path / "spool").glob("*.upload")) == []


def test_a_file_that_shrinks_while_it_is_sent_is_found_out(server, tmp_path):
    (tmp_path / "shrinking").write_bytes(DATA)
    server.before = lambda method, path: (tmp_path / "shrinking").write_bytes(DATA[:100]) and None
    with pytest.raises(Corrupt, match="shrinking: ended .* while it was sent"):
        remote(server.host, tmp_path / "spool").put_file(tmp_path / "shrinking", "a/b")


def test_a_registry_that_takes_a_blob_and_has_it_not_is_found_out(server, tmp_path):
    server.before = lambda method, path: (201, {}) if method == "PUT" else None
    with pytest.raises(Corrupt, match="was taken, but is not there"):
        remote(server.host, tmp_path / "spool").put_blob(b"1", "a/b")


def test_what_is_there_is_not_sent_again(server, file, tmp_path):
    own = remote(server.host, tmp_path / "spool", registry=f"oci://{server.host}/x")
    own.put_file(file, "a/b")
    server.log.clear()
    own.put_file(file, "a/b")
    assert [method for method, _, _ in server.log] == ["HEAD"]


def test_what_another_repository_has_is_mounted(docker_registry, file, tmp_path):
    one = remote(docker_registry.host, tmp_path / "spool")
    done = one.put_file(file, "a/b")
    with FaultProxy(address(docker_registry.host)) as proxy:
        two = remote(f"127.0.0.1:{proxy.port}", tmp_path / "spool", mount_from=("tests/not-there", one.repository))
        assert two.put_file(file, "a/b") == done and two.read_blob(done.digest) == DATA
        assert proxy.requests("PATCH") == proxy.requests("PUT") == []


# --- memory ---


@pytest.mark.slow
def test_memory_does_not_grow_with_the_blob(docker_registry, tmp_path):
    """A quarter of a gigabyte, both ways."""
    with (tmp_path / "file").open("wb") as f:
        for i in range(16):
            f.write(noise(16 * MIB, b"%d" % i))
    url = settings(docker_registry.host).registry
    digest: list[str] = []
    for act, name in (("push", "file"), ("pull", "copy")):
        run = client(act, url, tmp_path, tmp_path / name, *digest)
        out, err = run.communicate(timeout=280)
        assert run.returncode == 0, err
        *digest, before, most = out.split()
        assert int(most) - int(before) < 30, out
    assert (tmp_path / "copy").stat().st_size == 256 * MIB
