"""The remote registry where the suite of all registries does not look: races of tags, lists in pages, referrers without an API, bad answers."""

import json
import signal
import threading

import pytest

from streamlearn.adapters.oci_registry import OciRegistry
from streamlearn.contract.config import SnapshotsConfig
from streamlearn.contract.config_file import load
from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, NotFound, Retryable
from streamlearn.contract.oci import canonical
from tests.adapters.oci import DockerRegistry, remote, require
from tests.adapters.oci_server import OciServer, one_manifest


@pytest.fixture
def server():
    with OciServer() as served:
        yield served


@pytest.fixture
def own(server, tmp_path):
    return remote(server.host, tmp_path / "spool", registry=f"oci://{server.host}/x")


# --- tags ---


def test_who_is_overtaken_while_moving_a_tag_is_told(server, own):
    """Without preconditions: someone's PUT lands right after ours, before we look."""
    theirs = own.put_manifest(one_manifest(own, "theirs"))
    one = own.put_manifest(one_manifest(own, "1"), tag="v1")

    def overtake(method, path):
        if method == "HEAD" and path.endswith("/stable") and any(m == "PUT" and p.endswith("/stable") for m, p, _ in server.log):
            server.tags["stable"] = theirs.digest

    server.before = overtake
    with pytest.raises(Conflict, match=f"points to {theirs.digest}: someone else moved it at the same time"):
        own.tag(one.digest, "stable", expect="")


def test_a_registry_that_heeds_preconditions_is_used(server, own):
    """Moved between our look and our PUT: If-None-Match and If-Match find it."""
    server.heeds_preconditions = True
    one, two, theirs = (own.put_manifest(one_manifest(own, text)) for text in ("1", "2", "theirs"))

    def move_first(method, path):
        if method == "PUT":
            server.tags["stable"] = theirs.digest

    server.before = move_first
    with pytest.raises(Conflict, match="someone else moved it"):
        own.tag(one.digest, "stable", expect="")
    server.tags["stable"] = one.digest
    with pytest.raises(Conflict, match="someone else moved it"):
        own.tag(two.digest, "stable", expect=one.digest)
    assert server.tags["stable"] == theirs.digest


def test_tags_come_in_pages(server, own):
    server.page = 7
    for i in range(20):
        own.put_manifest(one_manifest(own, "1"), tag=f"v{i:02}")
    assert own.names() == [f"v{i:02}" for i in range(20)] and len(server.asked("GET", "tags/list")) == 3


def test_a_list_that_leads_round_and_round_ends(server, own):
    own.put_manifest(one_manifest(own, "1"), tag="v1")
    server.before = lambda method, path: (200, {"Link": f'<{path}>; rel="next"'}) if "tags/list" in path else None
    with pytest.raises(Corrupt, match="not a manifest"):  # its empty body is no list either
        own.names()


def test_a_tag_is_taken_away_alone_or_not_at_all(server, own, docker_registry, tmp_path):
    one = own.put_manifest(one_manifest(own, "1"), tag="v1")
    own.tag(one.digest, "stable")
    own.untag("stable")
    own.untag("stable")
    assert own.names() == ["v1"]
    debian = remote(docker_registry.host, tmp_path / "spool")
    one = debian.put_manifest(one_manifest(debian, "1"), tag="v1")
    debian.tag(one.digest, "stable")
    with pytest.raises(ConfigError, match="takes no tag away alone"):
        debian.untag("stable")
    assert debian.names() == ["stable", "v1"]


def test_a_retag_outlives_the_registry(tmp_path):
    require("docker-registry")
    with DockerRegistry(tmp_path / "served") as served:
        own = remote(served.host, tmp_path / "spool")
        one = own.put_manifest(one_manifest(own, "1"), tag="v1")
        own.tag(one.digest, "stable")
        served.stop(signal.SIGKILL)
        with pytest.raises(Retryable, match="failed"):
            own.find("stable")
        served.start()
        assert own.find("stable").digest == one.digest and own.names() == ["stable", "v1"]


# --- referrers ---


def test_referrers_without_an_api_lie_under_a_tag_of_their_own(server, own):
    server.referrers_api = False
    one = own.put_manifest(one_manifest(own, "1"), tag="v1")
    for i in range(3):
        own.attach(one, "application/probe", b"%d" % i, {"i": str(i)})
    assert [r.annotations["i"] for r in own.referrers(one.digest)] == ["0", "1", "2"] and own.names() == ["v1"]
    listed = json.loads(server.manifests[server.tags[one.digest.replace(":", "-")]][1])
    assert [m["artifactType"] for m in listed["manifests"]] == ["application/probe"] * 3
    gone = listed["manifests"][0]["digest"]
    del server.manifests[gone]  # a collection that did not know the list
    own.attach(one, "application/probe", b"3", {"i": "3"})
    assert [r.annotations["i"] for r in own.referrers(one.digest)] == ["1", "2", "3"]


def test_a_referrer_that_another_overwrote_is_listed_again(server, own):
    """Someone's list lands right after ours and has not got ours."""
    server.referrers_api = False
    one = own.put_manifest(one_manifest(own, "1"), tag="v1")
    fallback = one.digest.replace(":", "-")
    overwritten = []

    def overwrite(method, path):
        if method == "GET" and path.endswith(fallback) and fallback in server.tags and not overwritten:
            overwritten.append(server.tags.pop(fallback))

    server.before = overwrite
    own.attach(one, "application/probe", b"1", {})
    assert overwritten and len(own.referrers(one.digest)) == 1


def test_many_who_attach_at_once_through_one_process_or_api_lose_nothing(server, own):
    one = own.put_manifest(one_manifest(own, "1"), tag="v1")
    threads = [threading.Thread(target=own.attach, args=(one, "application/probe", b"%d" % i, {})) for i in range(12)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(own.referrers(one.digest)) == 12


# --- bad answers ---


def test_a_manifest_that_was_changed_is_refused(server, own):
    done = own.put_manifest(one_manifest(own, "1"), tag="v1")
    server.serves = lambda data: data.replace(b"text/plain", b"text/other")
    for reference in ("v1", done.digest):
        with pytest.raises(Corrupt, match="another digest"):
            own.manifest(reference)


@pytest.mark.parametrize(
    ("answer", "error", "complaint"),
    [
        ((403, {}), ConfigError, "not allowed"),
        ((413, {}), ConfigError, "lower snapshots.chunk_bytes"),
        ((405, {}), ConfigError, "does not do"),
        ((507, {}), Retryable, "free some space"),
        ((502, {}), Retryable, "502"),
        ((302, {"Location": "/v2/round"}), ConfigError, "redirected"),
        ((307, {}), ConfigError, "redirected"),
        ((307, {"Location": "ftp://elsewhere/x"}), ConfigError, "not https"),
    ],
)
def test_what_a_registry_refuses_is_said_with_a_remedy(server, own, answer, error, complaint):
    server.before = lambda method, path: answer
    with pytest.raises(error, match=complaint):
        own.manifest("v1")


def test_an_answer_without_end_is_cut_off(server, own):
    done = own.put_manifest(one_manifest(own, "1"), tag="v1")
    server.serves = lambda data: b" " * (17 * 2**20)
    with pytest.raises(Corrupt, match="more than"):
        own.manifest(done.digest)


def test_what_is_no_manifest_is_said(server, own):
    own.put_manifest(one_manifest(own, "1"), tag="v1")
    for bad in (b"[]", b"{", b"\xff"):
        server.manifests["sha256:" + "0" * 64] = ("a/b", bad)
        server.tags["bad"] = "sha256:" + "0" * 64
        with pytest.raises(Corrupt):
            own.manifest("bad")


# --- the configuration ---


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("https://h/x", "write oci://"), ("oci://h", "write oci://"), ("oci:///x", "write oci://"), ("oci://u:p@h/x", "no user or password"),
        ("oci://h/X", "no repository's name"), ("oci://h/x:v1", "no repository's name"), ("oci://h/../x", "no repository's name"),
        ("oci://h/x?y=1", "nothing behind it"), ("oci://h:port/x", "port could not"),
    ],
)  # fmt: skip
def test_a_bad_address_is_refused_by_name(value, complaint):
    with pytest.raises(ConfigError, match=f"snapshots.registry = .*{complaint}") as e:
        load(None, env={}, overrides={"snapshots.registry": json.dumps(value)})
    assert "u:p" not in str(e.value)


def test_a_bad_mount_or_a_password_without_a_user_is_refused():
    for key, value in (("mount_from", '["A"]'), ("password_file", '"x"')):
        with pytest.raises(ConfigError, match="snapshots"):
            load(None, env={}, overrides={f"snapshots.{key}": value})


def test_a_name_may_be_deep(tmp_path):
    assert OciRegistry(SnapshotsConfig(registry="oci://h:5000/a/b_c/d-e.f/g"), tmp_path).api == "https://h:5000/v2/a/b_c/d-e.f/g"


def test_not_found_names_what_there_is(server, own):
    own.put_manifest(canonical(one_manifest(own, "1")), tag="v1")
    with pytest.raises(NotFound, match="tags here: v1"):
        own.manifest("v2")
