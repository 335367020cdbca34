"""The suite every registry passes; the embedded one is an OCI image layout."""

import json
import shutil
import subprocess
import threading

import pytest

from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, NotFound
from streamlearn.contract.registry import EMPTY, MANIFEST, OciLayout
from tests.conftest import missing


@pytest.fixture
def registry(tmp_path):
    return OciLayout(tmp_path / "registry")


def manifest(registry, text):
    config, layer = registry.put_blob(b"{}", EMPTY), registry.put_blob(text.encode(), "text/plain")
    return {"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "x/y", "config": config.to_json(), "layers": [layer.to_json()]}


def test_a_tag_moves_and_what_it_pointed_to_stays(registry, tmp_path):
    one = registry.put_manifest(manifest(registry, "1"), tag="v1")
    two = registry.put_manifest(manifest(registry, "2"), tag="v2")
    registry.tag(one.digest, "stable")
    registry.tag(two.digest, "stable", expect=one.digest)
    again = OciLayout(tmp_path / "registry")
    assert {t: d.digest for t, d in again.tags().items()} == {"v1": one.digest, "v2": two.digest, "stable": two.digest}
    assert again.manifest("v1")[0].digest == one.digest == again.manifest(one.digest)[0].digest


def test_a_lost_compare_and_set_names_the_holder(registry):
    one = registry.put_manifest(manifest(registry, "1"), tag="v1")
    with pytest.raises(Conflict, match=f"tag v1 points to {one.digest}, not nothing"):
        registry.put_manifest(manifest(registry, "2"), tag="v1", expect="")
    with pytest.raises(Conflict, match="points to nothing, not sha256:"):
        registry.tag(one.digest, "new", expect=one.digest)


def test_of_many_who_claim_a_tag_one_gets_it(registry, tmp_path):
    won, lost = [], []

    def claim(i):
        mine = OciLayout(tmp_path / "registry")
        try:
            won.append(mine.put_manifest(manifest(mine, str(i)), tag="v1", expect="").digest)
        except Conflict:
            lost.append(i)

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(won) == 1 and len(lost) == 7 and OciLayout(tmp_path / "registry").tags()["v1"].digest == won[0]


def test_a_manifest_whose_blobs_are_not_there_is_refused(registry):
    m = manifest(registry, "1")
    (registry.root / "blobs" / "sha256" / m["layers"][0]["digest"][7:]).unlink()
    with pytest.raises(NotFound, match="names blob sha256:.* not there; push it first"):
        registry.put_manifest(m, tag="v1")
    assert registry.tags() == {}


@pytest.mark.parametrize("tag", ["", "-x", "a b", "a/b", "x" * 129])
def test_a_bad_tag_is_refused(registry, tag):
    done = registry.put_manifest(manifest(registry, "1"), tag="v1")
    with pytest.raises(ConfigError, match="letters, digits"):
        registry.tag(done.digest, tag)


def test_results_hang_on_their_subject_once(registry):
    one = registry.put_manifest(manifest(registry, "1"), tag="v1")
    for _ in range(2):
        registry.attach(one, "application/probe", b'{"a":1}', {"bank": "b"})
    found = registry.referrers(one.digest, "application/probe")
    assert len(found) == 1 and found[0].annotations["bank"] == "b" and registry.referrers(one.digest, "other") == []
    registry.tag(one.digest, "stable")
    assert len(registry.referrers(one.digest)) == 1


def test_an_unknown_tag_is_named_with_those_there_are(registry):
    registry.put_manifest(manifest(registry, "1"), tag="v1")
    with pytest.raises(NotFound, match="no tag 'v2'; tags here: v1"):
        registry.manifest("v2")


def test_a_flipped_bit_is_refused_with_file_and_digest(registry):
    done = registry.put_manifest(manifest(registry, "1"), tag="v1")
    path = registry.root / "blobs" / "sha256" / done.digest[7:]
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(Corrupt, match=f"{done.digest[7:]}.*damaged"):
        registry.manifest("v1")
    with pytest.raises(Corrupt):
        registry.copy_blob(done.digest, registry.root / "copy")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("index.json", "{", "index.json: not an OCI index"),
        ("oci-layout", "{}", "oci-layout: not an OCI layout"),
        ("oci-layout", '{"imageLayoutVersion":"9"}', "'9'"),
    ],
)
def test_a_damaged_layout_is_named(registry, tmp_path, name, content, complaint):
    (registry.root / name).write_text(content)
    with pytest.raises(Corrupt, match=complaint):
        OciLayout(tmp_path / "registry").tags()


def test_skopeo_reads_it_as_it_is(registry, tmp_path):
    if shutil.which("skopeo") is None:
        missing("skopeo is not installed")
    done = registry.put_manifest(manifest(registry, "1"), tag="v1")
    raw = subprocess.run(["skopeo", "inspect", "--raw", f"oci:{registry.root}:v1"], capture_output=True, check=True).stdout
    assert json.loads(raw) == registry.manifest(done.digest)[1]
    copy = tmp_path / "copy"
    subprocess.run(
        ["skopeo", "copy", "-q", "--preserve-digests", f"oci:{registry.root}:v1", f"oci:{copy}:v1"], check=True, capture_output=True
    )
    assert OciLayout(copy).tags()["v1"].digest == done.digest
