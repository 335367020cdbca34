"""Collection: what is tagged stays, and what refers to it; what a push has under way stays; killed at any step, nothing is torn."""

import os
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlearn.contract.errors import Corrupt, NotFound
from streamlearn.contract.oci import INDEX, Descriptor, canonical, digest_of, parts
from streamlearn.contract.registry import EMPTY, OciLayout
from streamlearn.contract.registry_gc import collect
from tests.adapters.oci_server import one_manifest

LATER = time.time() + 10 * 86_400  # when everything of today is old


@pytest.fixture
def registry(tmp_path):
    return OciLayout(tmp_path / "registry")


def files(registry):
    return {p.name for p in (registry.root / "blobs" / "sha256").iterdir()}


def audit(registry):
    """Every tag leads to a manifest with all its blobs."""
    for known in registry.tags().values():
        for digest in parts(registry.manifest(known.digest)[1]):
            registry.check_blob(digest)


def test_what_no_tag_leads_to_is_dropped_once_it_is_old(registry):
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    result = registry.attach(one, "application/probe", b"1", {})
    signature = registry.attach(result, "application/signature", b"of the result", {})
    two = registry.put_manifest(one_manifest(registry, "2"), tag="v2")
    lost = registry.attach(two, "application/probe", b"2", {})
    registry.untag("v2")
    registry.put_blob(b"of a push that never ended", EMPTY)
    (registry.root / "blobs" / "sha256" / ".half.tmp").write_bytes(b"of a killed one")
    before = files(registry)
    assert collect(registry).files == 0 and files(registry) == before  # all of it is young
    done = collect(registry, now=LATER)
    assert done.manifests == 2 and registry.names() == ["v1"]
    assert [r.digest for r in registry.referrers(one.digest)] == [result.digest]
    assert [r.digest for r in registry.referrers(result.digest)] == [signature.digest]
    assert before - files(registry) == {
        two.digest[7:],
        lost.digest[7:],
        *(digest_of(b)[7:] for b in (b"2", b"of a push that never ended")),
        ".half.tmp",
    }
    audit(registry)
    assert collect(registry, now=LATER).files == 0


def test_a_push_keeps_what_it_found_there(registry):
    """An old blob that nobody needs is found by a push, which does not send it again: from then on it is young."""
    blob = registry.put_blob(b"1", EMPTY)
    os.utime(registry.path(blob.digest), (0, 0))
    registry.put_blob(b"1", EMPTY)
    assert collect(registry).files == 0
    os.utime(registry.path(blob.digest), (0, 0))
    assert collect(registry).files == 1
    with pytest.raises(NotFound, match="push it first"):  # too slow a push is told so, and tags nothing
        registry.put_manifest({"schemaVersion": 2, "config": blob.to_json(), "layers": []}, tag="v1")


def test_a_nested_index_keeps_its_manifests_and_a_referrer_its_subject(registry):
    """As skopeo copies images for several platforms, and as a signature's own tag."""
    inner = registry.put_manifest(one_manifest(registry, "inner"))
    subject = registry.put_manifest(one_manifest(registry, "subject"))
    outer = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [inner.to_json(), {**inner.to_json(), "digest": "sha256:" + "7" * 64}]}
    registry.put_blob(canonical(outer), INDEX)
    known = Descriptor(INDEX, digest_of(canonical(outer)), len(canonical(outer)))
    registry.replace_index(registry.index().put(known.to_json() | {"annotations": {"org.opencontainers.image.ref.name": "all"}}))
    registry.put_manifest(one_manifest(registry, "signature", subject=subject.to_json()), tag="signature")
    collect(registry, now=LATER)
    for text in ("inner", "subject", "signature"):
        registry.check_blob(digest_of(text.encode()))


def test_a_manifest_that_cannot_be_read_stops_the_collection(registry):
    """What it needs is not known, so nothing is dropped."""
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    registry.put_blob(b"garbage", EMPTY)
    whole = registry.path(one.digest).read_bytes()
    for damage in (b"{}", None):
        registry.path(one.digest).unlink()
        if damage is not None:
            registry.path(one.digest).write_bytes(damage)
        with pytest.raises(Corrupt, match=one.digest[7:]):
            collect(registry, now=LATER)
        registry.path(one.digest).write_bytes(whole)
    assert digest_of(b"garbage")[7:] in files(registry)


# --- against a model ---

TAGS, TEXTS = ["a", "b", "c"], ["0", "1", "2"]
STEPS = st.one_of(
    st.tuples(st.just("push"), st.sampled_from(TEXTS), st.sampled_from([*TAGS, ""])),
    st.tuples(st.just("untag"), st.sampled_from(TAGS)),
    st.tuples(st.just("move"), st.sampled_from(TAGS), st.sampled_from(TAGS)),
    st.tuples(st.just("attach"), st.sampled_from(TAGS), st.sampled_from(TEXTS)),
    st.tuples(st.just("chain"), st.sampled_from(TAGS), st.sampled_from(TEXTS)),
    st.tuples(st.just("blob"), st.sampled_from(TEXTS)),
    st.tuples(st.just("gc")),
)


@given(steps=st.lists(STEPS, max_size=25))
def test_whatever_was_done_the_collection_keeps_what_a_model_keeps(steps, tmp_path_factory):
    registry = OciLayout(tmp_path_factory.mktemp("registry"))
    tags: dict[str, str] = {}
    refers: dict[str, str] = {}  # referrer -> subject
    for name, *args in [*steps, ("gc",)]:
        if name == "push":
            digest = registry.put_manifest(one_manifest(registry, args[0]), tag=args[1]).digest
            tags |= {args[1]: digest} if args[1] else {}
        elif name == "untag":
            registry.untag(args[0])
            tags.pop(args[0], None)
        elif name == "move" and args[0] in tags:
            registry.tag(tags[args[0]], args[1])
            tags[args[1]] = tags[args[0]]
        elif name in ("attach", "chain") and args[0] in tags:
            subject = registry.find(args[0])
            if name == "chain":  # what refers to a referrer
                subject = next(iter(registry.referrers(subject.digest)), subject)
            refers[registry.attach(subject, "application/probe", args[1].encode(), {"of": subject.digest}).digest] = subject.digest
        elif name == "blob":
            registry.put_blob(b"loose " + args[0].encode(), EMPTY)
        elif name == "gc":
            collect(registry, now=LATER)
            live = set(tags.values())
            while new := {r for r, s in refers.items() if s in live} - live:
                live |= new
            refers = {r: s for r, s in refers.items() if r in live}
            needed = {digest for m in live for digest in parts(registry.manifest(m)[1])}
            assert {"sha256:" + name for name in files(registry)} == live | needed
            assert {e.digest for e in registry.index().rows.values()} == live
    assert {tag: known.digest for tag, known in registry.tags().items()} == tags
    for subject in set(refers.values()):
        assert {r.digest for r in registry.referrers(subject)} == {r for r, s in refers.items() if s == subject}


# --- kill -9 ---


def push(registry):
    known = registry.put_manifest(one_manifest(registry, "new"), tag="new")
    registry.attach(known, "application/probe", b"new", {})


def move(registry):
    registry.tag(registry.find("v2").digest, "stable", expect=registry.find("stable").digest)


def untag(registry):
    registry.untag("v2")


def gc(registry):
    collect(registry, now=LATER)


CALLS = ["replace", "link", "unlink", "fsync", "utime", "chmod"]  # between any two of them a process may die


def killed_at(act, root, nth):
    """Run in a child that dies by SIGKILL before its nth call that changes the disk.  False: it did not come so far."""
    child = os.fork()
    if child == 0:
        left = nth

        def dying(call):
            def maybe(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **kwargs)

            return maybe

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            act(OciLayout(root))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("act", [push, move, untag, gc], ids=lambda a: a.__name__)
def test_killed_at_any_step_nothing_is_torn_and_the_next_try_completes_it(act, tmp_path):
    ends = set()
    for nth in range(200):
        root = tmp_path / str(nth)
        registry = OciLayout(root)
        one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
        registry.attach(one, "application/probe", b"1", {})
        registry.tag(one.digest, "stable")
        registry.put_manifest(one_manifest(registry, "2"), tag="v2")
        registry.attach(registry.put_manifest(one_manifest(registry, "old")), "application/probe", b"old", {})
        registry.put_blob(b"garbage", EMPTY)
        died = killed_at(act, root, nth)
        left = OciLayout(root)
        audit(left)
        assert {"v1", "stable"} <= set(left.names()) and len(left.referrers(one.digest)) == 1
        ends.add(str(sorted((name, known.digest) for name, known in left.tags().items())))
        act(left)
        audit(left)
        collect(left, now=LATER)
        audit(left)
        assert not [name for name in files(left) if name.startswith(".")] and len(left.referrers(one.digest)) == 1
        if not died:
            break
    assert not died and nth >= 4 and len(ends) <= 2  # the tags are as before, or as after
