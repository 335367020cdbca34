"""The embedded registry as a folder: what damage it names, what other tools write there, thousands of snapshots."""

import json
import subprocess
import sys
import time

import pytest

from streamlearn.contract.errors import Corrupt, NotFound, StoreFull
from streamlearn.contract.oci import INDEX, MANIFEST, canonical, digest_of
from streamlearn.contract.oci_index import REF_NAME, SUBJECT
from streamlearn.contract.registry import OciLayout
from tests.adapters.oci_server import one_manifest
from tests.contract.test_durable import tiny_disk  # noqa: F401  a fixture


@pytest.fixture
def registry(tmp_path):
    return OciLayout(tmp_path / "registry")


def entries(root):
    return json.loads((root / "index.json").read_bytes())["manifests"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("index.json", "{", "index.json: not an OCI index"),
        ("index.json", '{"manifests":[3]}', "index.json: not an OCI index"),
        ("index.json", '{"manifests":{}}', "index.json: not an OCI index"),
        ("oci-layout", "{}", "oci-layout: not an OCI layout"),
        ("oci-layout", '{"imageLayoutVersion":"9"}', "'9'"),
    ],
)
def test_a_damaged_layout_is_named(registry, tmp_path, name, content, complaint):
    (registry.root / name).write_text(content)
    with pytest.raises(Corrupt, match=complaint):
        OciLayout(tmp_path / "registry").tags()


def test_a_tag_that_leaves_a_snapshot_leaves_it_listed(registry):
    """Who is pulling it, or wants it back, has the collection's grace."""
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    two = registry.put_manifest(one_manifest(registry, "2"), tag="v1")
    assert [(e["digest"], e["annotations"].get(REF_NAME)) for e in entries(registry.root)] == [(two.digest, "v1"), (one.digest, None)]
    registry.untag("v1")
    registry.untag("v1")
    assert registry.names() == [] and {e["digest"] for e in entries(registry.root)} == {one.digest, two.digest}


def test_an_index_that_another_tool_wrote_is_kept_as_it_is(registry):
    """Unknown fields, platforms, nested indexes, referrers without our mark."""
    known = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    subject = known.to_json()
    data = canonical(one_manifest(registry, "signature", subject=subject, annotations={"k": "v"}))
    foreign = [
        {"mediaType": INDEX, "digest": "sha256:" + "5" * 64, "size": 3, "platform": {"os": "linux"}, "annotations": {REF_NAME: "all"}},
        {"mediaType": MANIFEST, "digest": registry.put_blob(data, MANIFEST).digest, "size": len(data), "annotations": None},
    ]
    raw = json.loads((registry.root / "index.json").read_bytes()) | {"annotations": {"by": "them"}}
    raw["manifests"] += foreign
    (registry.root / "index.json").write_text(json.dumps(raw, indent=2))
    registry.tag(known.digest, "stable")
    after = json.loads((registry.root / "index.json").read_bytes())
    assert [e for e in after["manifests"] if e in foreign] == foreign and after["annotations"] == {"by": "them"}
    (found,) = OciLayout(registry.root).referrers(known.digest)
    assert found.digest == digest_of(data) and found.annotations == {"k": "v"} and found.artifact_type == "x/y"
    registry.untag("stable")
    assert [r.digest for r in registry.referrers(known.digest)] == [found.digest]


def test_a_snapshot_that_has_lost_a_blob_cannot_be_tagged(registry):
    """So no tag ever points at what is not whole."""
    done = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    registry.path(digest_of(b"1")).unlink()
    with pytest.raises(NotFound, match="push it first"):
        registry.tag(done.digest, "stable")
    assert registry.names() == ["v1"]


def test_a_full_disk_leaves_the_tags_as_they_were(tiny_disk, tmp_path):  # noqa: F811
    registry = OciLayout(tiny_disk / "registry")
    (tmp_path / "big").write_bytes(b"x" * 64 * 2**20)
    one = registry.put_manifest(one_manifest(registry, "1"), tag="v1")
    for put in (lambda: registry.put_file(tmp_path / "big", "a/b"), lambda: registry.put_blob((tmp_path / "big").read_bytes(), "a/b")):
        with pytest.raises(StoreFull):
            put()
    assert not [p.name for p in (registry.root / "blobs" / "sha256").iterdir() if p.name.startswith(".")]
    assert OciLayout(registry.root).find("v1").digest == registry.find("v1").digest == one.digest


PUSHES = """
import sys
from pathlib import Path
from streamlearn.contract.registry import OciLayout
from tests.adapters.oci_server import one_manifest
registry, who = OciLayout(Path(sys.argv[1])), sys.argv[2]
for i in range(40):
    done = registry.put_manifest(one_manifest(registry, f"{who} {i}"), tag=f"{who}-{i}", expect="")
    registry.attach(done, "application/probe", f"{who} {i}".encode(), {"k": who})
    registry.tag(done.digest, f"newest-{who}")
"""
COLLECTS = """
import sys, time
from pathlib import Path
from streamlearn.contract.registry import OciLayout
from streamlearn.contract.registry_gc import collect
while not Path(sys.argv[2]).exists():
    collect(OciLayout(Path(sys.argv[1])), grace_s=3600.0)
    time.sleep(0.05)  # locks are not fair: one who never lets go would have them all the time
"""


def test_two_processes_that_push_while_a_third_collects_lose_nothing(registry, tmp_path):
    collector = subprocess.Popen([sys.executable, "-c", COLLECTS, str(registry.root), str(tmp_path / "done")])
    pushers = [subprocess.Popen([sys.executable, "-c", PUSHES, str(registry.root), who]) for who in "ab"]
    assert [p.wait(120) for p in pushers] == [0, 0]
    (tmp_path / "done").touch()
    assert collector.wait(120) == 0
    tags = registry.tags()
    assert len(tags) == 82
    for known in tags.values():
        _, manifest = registry.manifest(known.digest)
        assert [registry.check_blob(layer["digest"]) for layer in manifest["layers"]]
        assert len(registry.referrers(known.digest, "application/probe")) == 1


# --- thousands ---


def filled(root, count):
    """A layout of `count` snapshots with a measurement each, as many pushes would have made it."""
    registry = OciLayout(root)
    listed = []

    def blob(data):
        registry.path(digest_of(data)).write_bytes(data)
        return {"mediaType": "a/b", "digest": digest_of(data), "size": len(data)}

    for i in range(count):
        fields = {"schemaVersion": 2, "mediaType": MANIFEST, "config": blob(b"{}"), "layers": [blob(b"layer %d" % i)]}
        known = blob(canonical(fields)) | {"mediaType": MANIFEST}
        listed.append(known | {"artifactType": "x/y", "annotations": {REF_NAME: f"0.{i}.0", SUBJECT: ""}})
        result = blob(canonical(fields | {"subject": known})) | {"mediaType": MANIFEST}
        listed.append(result | {"artifactType": "application/probe", "annotations": {"bank": "b", SUBJECT: known["digest"]}})
    (root / "index.json").write_bytes(canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}))
    return OciLayout(root)


def median_cpu_s(call, times=15):
    """Of this thread: what others do on the machine is not in it."""
    spent = []
    for i in range(times):
        began = time.thread_time()
        call(i)
        spent.append(time.thread_time() - began)
    return sorted(spent)[times // 2]


@pytest.mark.slow
def test_thousands_of_snapshots_stay_fast(tmp_path):
    """Ratios of work at 5,000 snapshots to work at 100, fifty times as many: what looks one up does not grow at all."""
    few, many = filled(tmp_path / "few", 100), filled(tmp_path / "many", 5000)
    few.names(), many.names()
    blob = [(r, r.put_blob(b"{}", "a/b").to_json()) for r in (few, many)]
    digest = [r.find("0.7.0").digest for r in (few, many)]

    def growth(call):
        costs = [median_cpu_s(lambda i, at=at: call(at, i)) for at in (0, 1)]
        return costs[1] / max(costs[0], 20e-6)

    def push(at, i):
        registry, config = blob[at]
        registry.put_manifest({"schemaVersion": 2, "config": config, "layers": [], "annotations": {"i": str(i)}}, tag=f"9.{i}.0", expect="")

    found = {
        "resolve": growth(lambda at, i: blob[at][0].manifest(f"0.{i}.0")),
        "find": growth(lambda at, i: blob[at][0].find(f"0.{i}.0")),
        "referrers": growth(lambda at, i: blob[at][0].referrers(digest[at])),
        "names, each": growth(lambda at, i: blob[at][0].names()) / 50,
        "push": growth(push),
        "move": growth(lambda at, i: blob[at][0].tag(digest[at], f"stable-{i % 2}")),
    }
    limits = {"resolve": 4, "find": 4, "referrers": 4, "names, each": 4, "push": 15, "move": 15}
    assert {name: ratio for name, ratio in found.items() if ratio > limits[name]} == {}, found
    print(found)
