"""Other people's clients, unchanged, pull from the embedded registry; every digest as it was."""

import json
import subprocess
import threading
from pathlib import Path

import huggingface_hub
import oras.client
import pytest
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from streamlearn.contract.errors import ConfigError, NotFound, Retryable
from streamlearn.contract.oci import digest_of
from streamlearn.contract.registry import OciLayout
from streamlearn.snapshots.copy import copy
from streamlearn.snapshots.pull import list_snapshots, pull, show
from tests.adapters.oci import Choke, docker_config, remote, require
from tests.serve.serving import TOKEN, filled, serving

NAMES = ["README.md", "config.json", "metrics.json", "model.safetensors"]


@pytest.fixture(params=["public", "private"])
def served(request):
    """(server, whether it asks for a token)"""
    return request.getfixturevalue(request.param), request.param == "private"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub's own choices, for one server and with a cache of its own: `hub(served, token)` gives its arguments."""
    return lambda served, token=None: {"endpoint": served.url, "cache_dir": tmp_path / "hf", "token": token or False}


def contents(layout, reference):
    return {name: layout.read_blob(file["digest"]) for name, file in show(layout, reference)["files"].items()}


def skopeo(*argv):
    require("skopeo")
    return subprocess.run(["skopeo", *argv], capture_output=True, text=True, check=False, timeout=120)


def test_skopeo_lists_inspects_and_copies(served, tmp_path):
    server, private = served
    at = f"docker://{server.host}/team/model"
    creds = ["--creds", f"anyone:{TOKEN}"] if private else []
    done = skopeo("list-tags", "--tls-verify=false", *creds, at)
    assert json.loads(done.stdout)["Tags"] == server.layout.names(), done.stderr
    raw = skopeo("inspect", "--raw", "--tls-verify=false", *creds, f"{at}:candidate").stdout
    assert digest_of(raw.encode()) == server.layout.find("candidate").digest
    from_creds = ["--src-creds", f"anyone:{TOKEN}"] if private else []
    for reference in (":0.100.0", f"@{server.layout.find('0.100.0').digest}"):
        out = f"oci:{tmp_path / 'copy'}{len(reference)}:there"
        done = skopeo("copy", "--preserve-digests", "--src-tls-verify=false", *from_creds, at + reference, out)
        assert done.returncode == 0, done.stderr
        digest = digest_of(skopeo("inspect", "--raw", out).stdout.encode())
        assert digest == server.layout.find("0.100.0").digest


def test_logged_in_once_skopeo_needs_no_token_on_the_line(private, tmp_path):
    login = skopeo("login", "--tls-verify=false", "--authfile", str(tmp_path / "auth.json"), "-u", "me", "-p", TOKEN, private.host)
    assert login.returncode == 0, login.stderr
    at = f"docker://{private.host}/team/model:stable"
    done = skopeo("inspect", "--raw", "--tls-verify=false", "--authfile", str(tmp_path / "auth.json"), at)
    assert digest_of(done.stdout.encode()) == private.layout.find("stable").digest
    wrong = skopeo("login", "--tls-verify=false", "--authfile", str(tmp_path / "b.json"), "-u", "me", "-p", "x" * 30, private.host)
    without = skopeo("inspect", "--raw", "--tls-verify=false", "--authfile", str(tmp_path / "none.json"), at)
    assert wrong.returncode and without.returncode and "invalid username/password" in wrong.stderr + without.stderr


def test_oras_pulls_every_file(served, tmp_path):
    server, private = served
    client = oras.client.OrasClient(hostname=server.host, insecure=True, auth_backend="basic")
    if private:
        client.auth.set_basic_auth("anyone", TOKEN)
    client.pull(f"{server.host}/team/model:candidate", outdir=str(tmp_path))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == contents(server.layout, "candidate")
    assert client.get_tags(f"{server.host}/team/model") == server.layout.names()


def test_huggingface_hub_takes_a_tag_main_a_commit_and_some_of_the_files(served, hub, tmp_path):
    server, private = served
    settings = hub(server, TOKEN if private else None)
    for revision, ours in (("candidate", "candidate"), ("0.200.0", "0.200.0"), (None, "stable"), ("main", "stable")):
        folder = huggingface_hub.snapshot_download("team/model", revision=revision, **settings)
        digest = server.layout.find(ours).digest
        assert folder.endswith(digest[7:47])
        assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == contents(server.layout, ours)
        assert huggingface_hub.snapshot_download("team/model", revision=digest[7:47], **settings) == folder
    few = huggingface_hub.snapshot_download(
        "team/model", revision="0.100.0", allow_patterns=["*.json"], local_dir=tmp_path / "few", **settings
    )
    assert sorted(p.name for p in (tmp_path / "few").iterdir() if p.is_file()) == ["config.json", "metrics.json"] and few
    one = huggingface_hub.hf_hub_download("team/model", "config.json", revision="stable", **settings)
    assert Path(one).read_bytes() == contents(server.layout, "stable")["config.json"]


def test_huggingface_hub_is_told_what_is_not_there_by_its_own_exceptions(public, private, hub):
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.snapshot_download("team/model", revision="0.7.0", **hub(public))
    with pytest.raises(RevisionNotFoundError):
        huggingface_hub.hf_hub_download("team/model", "config.json", revision="f" * 40, **hub(public))
    with pytest.raises(RepositoryNotFoundError):
        huggingface_hub.snapshot_download("team/other", **hub(public))
    with pytest.raises(RemoteEntryNotFoundError):
        huggingface_hub.hf_hub_download("team/model", "pytorch_model.bin", **hub(public))
    with pytest.raises(RepositoryNotFoundError, match="authenticated"):
        huggingface_hub.snapshot_download("team/model", **hub(private))
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        huggingface_hub.snapshot_download("team/model", **hub(private, "hf_of_somebody_else"))


def test_huggingface_hub_s_other_questions_are_answered(public):
    api = huggingface_hub.HfApi(endpoint=public.url, token=False)
    info = api.model_info("team/model", revision="candidate", files_metadata=True)
    assert info.sha == public.layout.find("candidate").digest[7:47] and info.library_name == "streamlearn"
    assert {s.rfilename: s.size for s in info.siblings} == {n: f["size"] for n, f in show(public.layout, "candidate")["files"].items()}
    assert sorted(api.list_repo_files("team/model")) == NAMES
    refs = api.list_repo_refs("team/model")
    assert [r.name for r in refs.tags] == public.layout.names() and refs.branches[0].target_commit == public.layout.find("stable").digest[
        7:47
    ]
    assert api.file_exists("team/model", "config.json") and not api.file_exists("team/model", "x.json")
    assert api.get_safetensors_metadata("team/model").parameter_count  # by ranges


def test_our_own_adapter_pulls_and_finds_measurements_by_the_referrers_api(served, tmp_path):
    server, private = served
    config = str(docker_config(tmp_path / "config.json", server.host, "anyone", TOKEN)) if private else ""
    far = remote(server.host, tmp_path / "spool", registry=f"oci://{server.host}/team/model", docker_config=config)
    assert list_snapshots(far) == list_snapshots(server.layout)
    files = pull(far, "candidate", tmp_path / "model")
    assert {p.name: p.read_bytes() for p in files} == contents(server.layout, "candidate")
    asked = server.layout.find("candidate").digest
    assert [r.digest for r in far.referrers(asked)] == [r.digest for r in server.layout.referrers(asked)]
    assert far.referrers(asked, "application/other") == [] and far.referrers("sha256:" + "0" * 64) == []
    near = OciLayout(tmp_path / "near")
    assert copy(far, near, "stable", "stable").digest == server.layout.find("stable").digest
    assert show(near, "stable")["results"] == show(server.layout, "stable")["results"]


def test_our_own_adapter_says_that_a_served_registry_is_only_read(public, tmp_path):
    far = remote(public.host, tmp_path / "spool", registry=f"oci://{public.host}/team/model", attempts=1)
    with pytest.raises((ConfigError, Retryable)):
        far.put_blob(b"new", "a/b")
    with pytest.raises(NotFound):
        far.manifest("no-such-tag")


@pytest.mark.parametrize("killed_after", [0, 1, 200_000, 3_000_000])
def test_a_pull_cut_off_in_a_body_goes_on_and_is_whole(public, tmp_path, killed_after):
    digest, path = public.blob("model.safetensors")
    host, port = public.host.split(":")
    with Choke((host, int(port)), down=killed_after) as wire:
        far = remote(wire.host, tmp_path / "spool", registry=f"oci://{wire.host}/team/model")
        thread = threading.Thread(target=lambda: (wire.choked.wait(60), wire.let_pass()))
        thread.start()
        far.copy_blob(digest, tmp_path / "out")
        thread.join(60)
    assert (tmp_path / "out").read_bytes() == path.read_bytes()


def test_what_is_pulled_is_counted_by_the_name_it_was_asked_by(tmp_path, hub):
    with serving(filled(tmp_path, steps=(1, 2))) as served:
        far = remote(served.host, tmp_path / "spool", registry=f"oci://{served.host}/team/model")
        layout = served.layout
        for reference in ("candidate", "candidate", "0.1.0", layout.find("stable").digest):
            far.manifest(reference)
        far.manifest(layout.referrers(layout.find("stable").digest)[0].digest)  # a measurement is no snapshot
        huggingface_hub.snapshot_download("team/model", **hub(served))
        huggingface_hub.hf_hub_download(
            "team/model", "model.safetensors", revision="candidate", **hub(served) | {"cache_dir": tmp_path / "new"}
        )
        pulls = {
            (p, t): served.counted("serve_pulls_total", protocol=p, tag=t)
            for p in ("oci", "hf")
            for t in ("candidate", "stable", "version", "digest")
        }
        assert pulls == {
            ("oci", "candidate"): 2, ("oci", "stable"): 0, ("oci", "version"): 1, ("oci", "digest"): 1,
            ("hf", "candidate"): 1, ("hf", "stable"): 1, ("hf", "version"): 0, ("hf", "digest"): 0,
        }  # fmt: skip
        size = served.blob("model.safetensors")[1].stat().st_size
        assert served.counted("serve_sent_bytes_total", protocol="hf") > 2 * size
        assert served.counted("serve_snapshots") == 2
        assert served.counted("serve_requests_total", protocol="oci", code="2xx") >= 5
        assert served.counted("serve_requests_total", protocol="hf", code="5xx") == 0
        assert served.counted("serve_request_duration_seconds_count", protocol="hf") >= 4
