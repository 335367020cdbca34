"""The suite every registry passes: the OCI image layout, Debian's docker-registry, and one with the referrers API."""

import threading
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pytest

from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, NotFound, Retryable
from streamlearn.contract.oci import canonical, digest_of
from streamlearn.contract.registry import ANY, EMPTY, MANIFEST, Descriptor, OciLayout, Registry
from tests.adapters.oci import remote, settings
from tests.adapters.oci_server import OciServer, noise, one_manifest

KINDS = ["embedded", "docker-registry", "referrers API"]
NOWHERE = "sha256:" + "0" * 64


@dataclass
class Kind:
    """One registry: calling it opens it, as another process would."""

    open: Callable[[], Registry]
    damage: Callable[[str], AbstractContextManager]  # of a blob's first byte, until the block ends

    def __call__(self):
        return self.open()


@contextmanager
def damaged_file(path):
    whole = path.read_bytes()
    path.write_bytes(b"~" + whole[1:])
    yield
    path.write_bytes(whole)


@contextmanager
def damaged_on_the_wire(server):
    server.serves = lambda data: b"~" + data[1:]
    yield
    server.serves = lambda data: data


@pytest.fixture(params=KINDS)
def again(request, tmp_path):
    if request.param == "embedded":
        yield Kind(lambda: OciLayout(tmp_path / "registry"), lambda digest: damaged_file(OciLayout(tmp_path / "registry").path(digest)))
    elif request.param == "docker-registry":
        served = request.getfixturevalue("docker_registry")
        url = f"oci://{served.host}/suite/{uuid.uuid4().hex}"
        yield Kind(lambda: remote(served.host, tmp_path / "spool", registry=url), lambda digest: damaged_file(served.blob(digest)))
    else:
        with OciServer() as server:
            server.heeds_preconditions = True
            url = f"oci://{server.host}/suite/x"
            yield Kind(lambda: remote(server.host, tmp_path / "spool", registry=url), lambda digest: damaged_on_the_wire(server))


@pytest.fixture
def registry(again):
    return again()


def test_what_was_put_is_there_byte_for_byte(registry, tmp_path):
    data = noise(300_000)  # several chunks
    (tmp_path / "file").write_bytes(data)
    one, two = registry.put_blob(data, "a/b"), registry.put_file(tmp_path / "file", "a/b")
    assert one == two == Descriptor("a/b", digest_of(data), len(data)) and registry.has_blob(one.digest)
    registry.copy_blob(one.digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data == registry.read_blob(one.digest) and registry.check_blob(one.digest) == len(data)
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("size", [0, 1, 2**16 - 1, 2**16, 2**16 + 1, 2**17])
def test_blobs_of_any_size_go_in_and_out(registry, tmp_path, size):
    (tmp_path / "file").write_bytes(noise(size, b"file"))
    assert registry.read_blob(registry.put_blob(noise(size), "a/b").digest) == noise(size)
    registry.copy_blob(registry.put_file(tmp_path / "file", "a/b").digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == noise(size, b"file")


def test_a_blob_that_is_not_there_is_not_found(registry, tmp_path):
    assert not registry.has_blob(NOWHERE)
    for call in (registry.read_blob, registry.check_blob, lambda digest: registry.copy_blob(digest, tmp_path / "copy")):
        with pytest.raises(NotFound, match=f"no blob {NOWHERE}"):
            call(NOWHERE)
        with pytest.raises(NotFound, match="not a sha256 digest"):
            call("sha256:../../etc/passwd")
    assert not (tmp_path / "copy").exists()


def test_an_empty_repository_has_no_tags(registry):
    assert registry.names() == [] and registry.tags() == {} and registry.find("v1") is None


def test_a_tag_moves_and_what_it_pointed_to_stays(registry, again):
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    two = registry.put_manifest(one_manifest(registry, "2"), tag="v2")
    registry.tag(one.digest, "stable")
    registry.tag(two.digest, "stable", expect=one.digest)
    assert {t: d.digest for t, d in again().tags().items()} == {"v1": one.digest, "v2": two.digest, "stable": two.digest}
    assert again().names() == ["stable", "v1", "v2"] and again().find("stable").digest == two.digest
    assert again().manifest("v1")[0].digest == one.digest == again().manifest(one.digest)[0].digest


def test_moving_a_tag_where_it_is_changes_nothing(registry):
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    for expect in (ANY, one.digest):
        assert registry.put_manifest(one_manifest(registry, "1"), tag="v1", expect=expect) == one
        registry.tag(one.digest, "v1", expect=expect)
    assert registry.find("v1").digest == one.digest and registry.find("v1").size == one.size


def test_a_manifest_in_bytes_keeps_its_digest(registry):
    """As another tool wrote it, with blanks."""
    data = canonical(one_manifest(registry, "1")).replace(b",", b" ,\n")
    done = registry.put_manifest(data, tag="v1")
    assert done.digest == digest_of(data) and registry.read_manifest("v1") == (done, data)


def test_an_untagged_manifest_is_there_by_its_digest(registry):
    done = registry.put_manifest(one_manifest(registry, "1"))
    assert registry.manifest(done.digest)[0] == done and registry.names() == []


def test_a_lost_compare_and_set_names_the_holder(registry):
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    with pytest.raises(Conflict, match=f"tag v1 points to {one.digest}, not nothing"):
        registry.put_manifest(one_manifest(registry, "2"), tag="v1", expect="")
    with pytest.raises(Conflict, match="points to nothing, not sha256:"):
        registry.tag(one.digest, "new", expect=one.digest)
    assert {t: d.digest for t, d in registry.tags().items()} == {"v1": one.digest}


def test_of_many_who_claim_a_tag_one_gets_it(again, request):
    """Where compare-and-set is.  docker-registry has none, and the adapter says so."""
    won, lost = [], []

    def claim(i):
        mine = again()
        try:
            won.append(mine.put_manifest(one_manifest(mine, str(i)), tag="v1", expect="").digest)
        except Conflict:
            lost.append(i)

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(won) + len(lost) == 8 and again().find("v1").digest in won
    if "docker-registry" not in request.node.name:
        assert len(won) == 1


def test_a_manifest_whose_blobs_are_not_there_is_refused(registry):
    lacking = one_manifest(registry, "1")
    lacking["layers"].append({"mediaType": "a/b", "digest": NOWHERE, "size": 3})
    for tag in ("v1", ""):
        with pytest.raises(NotFound, match=f"names blob {NOWHERE}, which is not there; push it first"):
            registry.put_manifest(lacking, tag=tag)
    assert registry.tags() == {}


@pytest.mark.parametrize("tag", ["", "-x", "a b", "a/b", "x" * 129, "v1\n"])
def test_a_bad_tag_is_refused(registry, tag):
    done = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    with pytest.raises(ConfigError, match="letters, digits"):
        registry.tag(done.digest, tag)
    assert registry.find(tag) is None


def test_an_unknown_tag_is_named_with_those_there_are(registry):
    registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    with pytest.raises(NotFound, match="no tag 'v2'; tags here: v1"):
        registry.manifest("v2")
    with pytest.raises(NotFound, match="0000"):
        registry.manifest(NOWHERE)


def test_results_hang_on_their_subject_once(registry, again):
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    for _ in range(2):
        registry.attach(one, "application/probe", b'{"a":1}', {"bank": "b"})
    registry.attach(one, "application/probe", b'{"a":2}', {"bank": "c"})
    registry.attach(one, "application/signature", b"{}", {})
    found = again().referrers(one.digest, "application/probe")
    assert sorted(r.annotations["bank"] for r in found) == ["b", "c"] and {r.artifact_type for r in found} == {"application/probe"}
    assert again().referrers(one.digest, "other") == again().referrers(NOWHERE) == []
    layer = registry.manifest(found[0].digest)[1]["layers"][0]
    assert registry.read_blob(layer["digest"]) in (b'{"a":1}', b'{"a":2}')
    registry.tag(one.digest, "stable")
    assert len(again().referrers(one.digest)) == 3 and again().names() == ["stable", "v1"]


def test_a_referrer_may_come_before_its_subject(registry):
    """As a copy may bring them; and with a tag of its own it is the same referrer."""
    later = canonical(one_manifest(registry, "later"))
    subject = Descriptor(MANIFEST, digest_of(later), len(later))
    early = registry.put_manifest(one_manifest(registry, "early", subject=subject.to_json(), annotations={"k": "v"}), tag="signature")
    assert registry.put_manifest(later, tag="v1").digest == subject.digest
    (found,) = registry.referrers(subject.digest)
    assert (found.digest, found.artifact_type, dict(found.annotations)) == (early.digest, "x/y", {"k": "v"})


def test_a_flipped_bit_is_refused_with_its_digest(registry, again, tmp_path):
    blob = registry.put_blob(noise(100_000), EMPTY)
    with again.damage(blob.digest):
        for read in (registry.read_blob, registry.check_blob, lambda digest: registry.copy_blob(digest, tmp_path / "copy")):
            with pytest.raises(Corrupt, match=f"{blob.digest[7:]}.*damaged"):
                read(blob.digest)
    assert not (tmp_path / "copy").exists()
    registry.copy_blob(blob.digest, tmp_path / "copy")  # nothing of the damage has stayed
    assert (tmp_path / "copy").read_bytes() == noise(100_000)


def test_a_flipped_bit_in_a_manifest_is_refused(registry, again):
    done = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    with again.damage(done.digest):
        for reference in ("v1", done.digest):
            with pytest.raises((Corrupt, Retryable), match="damaged|another digest|status 500"):  # docker-registry finds it itself
                registry.manifest(reference)


def test_two_at_once_lose_nothing(again):
    """Blobs, tags and, where the registry keeps them, referrers."""
    subject = again().put_manifest(one_manifest(again(), "subject"), tag="subject")

    def push(who):
        mine = again()
        for i in range(10):
            mine.put_manifest(one_manifest(mine, f"{who} {i}"), tag=f"{who}-{i}", expect="")

    threads = [threading.Thread(target=push, args=(who,)) for who in "ab"]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert again().names() == sorted([f"{who}-{i}" for who in "ab" for i in range(10)] + ["subject"])
    assert again().find("subject").digest == subject.digest


def test_the_settings_of_a_test_say_what_they_are():
    """Plain http is asked for, never assumed."""
    assert settings("127.0.0.1:1").plain_http and not type(settings("h:1"))().plain_http
