"""Snapshots in registries behind a network, and in other people's tools: published, listed, pulled, copied, with every digest as it was."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, Retryable
from streamlearn.contract.registry import OciLayout
from streamlearn.snapshots.copy import copy
from streamlearn.snapshots.publish import publish, record_result, results, versions
from streamlearn.snapshots.pull import list_snapshots, pull, show, verify
from tests.adapters.oci import remote, require
from tests.adapters.oci_server import OciServer
from tests.snapshots.test_publish import export

RESULT = {"bank": "b", "bank_digest": "sha256:b", "protocol": "p/1", "knn": 0.5, "step": 1}


@pytest.fixture
def far(docker_registry, tmp_path):
    return remote(docker_registry.host, tmp_path / "spool")


@pytest.fixture
def near(tmp_path):
    return OciLayout(tmp_path / "registry")


def test_a_snapshot_is_the_same_wherever_it_is_published(near, far, tmp_path):
    for step in (1, 2):
        assert publish(near, export(step)) == publish(far, export(step))
    digest = far.find("candidate").digest
    for registry in (near, far):
        record_result(registry, digest, RESULT)
        record_result(registry, digest, RESULT)
    assert list_snapshots(near) == list_snapshots(far) and show(near, "candidate") == show(far, "candidate")
    assert verify(near, "0.1.0") == verify(far, "0.1.0") and versions(far).keys() == {1, 2}
    assert results(far, digest) == [RESULT]
    pulled = [{p.name: p.read_bytes() for p in pull(r, "0.2.0", tmp_path / name)} for r, name in ((near, "a"), (far, "b"))]
    assert pulled[0] == pulled[1] and set(pulled[0]) == {"README.md", "config.json", "metrics.json", "model.safetensors"}


@pytest.mark.slow
def test_cut_off_at_any_request_a_snapshot_is_whole_or_not_there_and_the_next_try_completes_it(tmp_path):
    """As `killed at any step` has it, over the wire: the nth request and all after it fail."""
    made = export(1)
    clean = publish(OciLayout(tmp_path / "clean"), made)
    for nth in range(200):
        with OciServer() as server:
            own = remote(server.host, tmp_path / "spool", attempts=1, chunk_bytes=2**20)
            server.before = lambda method, path, server=server, nth=nth: (503, {}) if len(server.log) > nth else None
            try:
                done = publish(own, made)
            except Retryable:
                done = None
            server.before = lambda method, path: None
            for name in own.names():
                verify(own, name)
            assert done in (None, clean) and publish(own, made) == clean
            assert own.names() == ["0.1.0", "candidate"] and verify(own, "candidate")
        if done:
            break
    assert nth > 15


def test_a_copy_brings_what_was_measured_and_sends_nothing_twice(near, far, tmp_path):
    _, digest = publish(near, export(1))
    record_result(near, digest, RESULT)
    near.attach(near.referrers(digest)[0], "application/signature", b"of the result", {})
    sent = []
    assert copy(near, far, "candidate", "stable", told=sent.append).digest == digest
    assert far.find("stable").digest == digest and results(far, digest) == [RESULT] and len(sent) == 8
    assert len(far.referrers(far.referrers(digest)[0].digest)) == 1
    copy(near, far, digest, "again", told=sent.append)
    back = OciLayout(tmp_path / "back")
    copy(far, back, "stable", "stable")
    assert len(sent) == 8 and show(back, "stable")["results"] == [RESULT] and back.find("stable").digest == digest
    publish(near, export(2))
    with pytest.raises(Conflict):
        copy(near, far, "0.2.0", "stable", expect="")
    assert far.find("stable").digest == digest


def test_skopeo_copies_both_ways_and_no_digest_changes(near, far, docker_registry, tmp_path):
    require("skopeo")
    _, digest = publish(near, export(1))
    at = f"docker://{docker_registry.host}/{far.repository}"
    skopeo("copy", "--preserve-digests", "--dest-tls-verify=false", f"oci:{near.root}:candidate", f"{at}:from-skopeo")
    assert far.find("from-skopeo").digest == digest and verify(far, "from-skopeo") == verify(near, "candidate")
    far.tag(digest, "ours")
    skopeo("copy", "--preserve-digests", "--src-tls-verify=false", f"{at}:ours", f"oci:{tmp_path / 'layout'}:back")
    assert OciLayout(tmp_path / "layout").find("back").digest == digest and verify(OciLayout(tmp_path / "layout"), "back")
    assert json.loads(skopeo("list-tags", "--tls-verify=false", at))["Tags"] == ["from-skopeo", "ours"]
    assert json.loads(skopeo("inspect", "--raw", "--tls-verify=false", f"{at}:ours")) == near.manifest(digest)[1]
    # into our layout, beside what is there, and out of it again
    skopeo("copy", "--preserve-digests", "--src-tls-verify=false", f"{at}:ours", f"oci:{near.root}:theirs")
    record_result(near, digest, RESULT)
    near.tag(digest, "stable")
    assert {name: d.digest for name, d in near.tags().items()} == dict.fromkeys(["0.1.0", "candidate", "stable", "theirs"], digest)
    assert results(OciLayout(near.root), digest) == [RESULT]
    skopeo("copy", "--preserve-digests", f"oci:{near.root}:stable", f"oci:{tmp_path / 'copy'}:v1")
    assert OciLayout(tmp_path / "copy").find("v1").digest == digest


def skopeo(*arguments):
    done = subprocess.run(["skopeo", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_the_commands_work_on_either(near, far, tmp_path, monkeypatch):
    """One word more: --registry."""
    monkeypatch.setenv("STREAMLEARN__SNAPSHOTS__PLAIN_HTTP", "true")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    publish(near, export(3))
    home, there = ["--home", str(tmp_path)], ["--registry", far.config.registry]

    def run(*arguments):
        done = CliRunner().invoke(cli, ["snapshots", *arguments, *home], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    digest = near.find("candidate").digest
    assert run("copy", "0.3.0", far.config.registry).count("sent ") == 5
    assert run("copy", "candidate", far.config.registry, "--as", "stable") == f"stable\t{digest}\n"
    assert run("tags", *there) == f"0.3.0\t{digest}\nstable\t{digest}\n" and "candidate" in run("tags")
    assert json.loads(run("list", "--json", *there))[0]["tags"] == ["0.3.0", "stable"]
    assert json.loads(run("show", "stable", *there))["metrics"]["images"] == 10
    assert run("verify", "stable", *there).count("ok ") == 5
    assert "model.safetensors" in run("pull", "stable", str(tmp_path / "model"), *there)
    assert run("copy", "stable", str(tmp_path / "layout"), *there).endswith(f"stable\t{digest}\n")
    assert verify(OciLayout(tmp_path / "layout"), "stable")
    near.put_blob(b"garbage", "a/b")
    assert run("gc") == "dropped 0 manifests, 0 files, 0.0 MB\n"
    with pytest.raises(ConfigError, match="needs a tag there"):
        run("copy", digest, far.config.registry)
    monkeypatch.setenv("STREAMLEARN__SNAPSHOTS__REGISTRY", json.dumps(far.config.registry))
    assert "stable" in run("tags")
    with pytest.raises(ConfigError, match="collects its own garbage"):
        run("gc")


def test_a_flipped_bit_in_a_pull_leaves_no_folder(far, docker_registry, tmp_path):
    publish(far, export(4))
    layer = far.manifest("candidate")[1]["layers"][0]["digest"]
    path = docker_registry.blob(layer)
    whole = path.read_bytes()
    try:
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(Corrupt, match=layer[7:]):
                pull(far, "candidate", tmp_path / "model")
            assert not [p for p in tmp_path.iterdir() if "model" in p.name]
    finally:
        path.write_bytes(whole)


def test_a_flipped_bit_in_the_loops_own_registry_is_not_copied(near, far):
    publish(near, export(4))
    for layer in near.manifest("candidate")[1]["layers"]:
        path = near.path(layer["digest"])
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(Corrupt, match=layer["digest"][7:26]):
                copy(near, far, "candidate", "candidate")
            assert far.names() == []
        path.write_bytes(whole)
    assert copy(near, far, "candidate", "candidate") == near.find("candidate")


def test_who_only_looks_at_snapshots_or_copies_them_does_not_wait_for_torch():
    program = "import sys, streamlearn.cli.snapshots; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
