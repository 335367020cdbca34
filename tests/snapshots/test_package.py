"""The artifact, line by line against the reference, and the same bytes whoever makes it, wherever and whenever."""

import json
import os
import subprocess
import sys

import pytest
import torch

from streamlearn.contract.registry import OciLayout, canonical, digest_of
from streamlearn.learn.backbones import build
from streamlearn.snapshots.package import described, files, scaled
from streamlearn.snapshots.publish import publish
from tests.conftest import REPO
from tests.snapshots.others import Timm, seeded
from tests.snapshots.test_publish import export

EVERYTHING = dict(
    revision="a" * 40, source="https://example.org/code", license="MIT", generation="2026Q4", notes={"init": "seer.torch (sha256:0, vissl: trunk)"}
)  # fmt: skip


def large(step=120_000, **more):
    """One that timm has."""
    fields = dict(weights=seeded(build("regnety-200mf")).state_dict(), backbone="regnety-200mf", stem="imagenet", size=224)
    return export(step, **fields | more)


def digest(bytes_):
    assert bytes_.startswith("sha256:") and len(bytes_) == 71
    return bytes_


def test_the_manifest_is_the_reference_s_line_by_line(tmp_path):
    registry = OciLayout(tmp_path)
    _, parent = publish(registry, large(1))
    tag, at = publish(registry, large(**EVERYTHING))
    assert tag == "0.120000.0" == f"0.{120_000}.0"
    data = registry.read_blob(at)
    manifest = json.loads(data)
    assert data == canonical(manifest) and at == digest_of(data)
    assert list(manifest) == ["annotations", "artifactType", "config", "layers", "mediaType", "schemaVersion"]  # sorted: canonical
    assert manifest["schemaVersion"] == 2 and manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    config = manifest["config"]
    assert set(config) == {"mediaType", "digest", "size"} and config["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert config["size"] == len(registry.read_blob(digest(config["digest"])))
    kinds = {"model.safetensors": "weight", "config.json": "weight.config", "metrics.json": "doc", "README.md": "doc"}
    for layer, (name, kind) in zip(manifest["layers"], kinds.items(), strict=True):
        assert (
            set(layer) == {"mediaType", "digest", "size", "annotations"}
            and layer["mediaType"] == f"application/vnd.cncf.model.{kind}.v1.raw"
        )
        assert layer["size"] == len(registry.read_blob(digest(layer["digest"])))
        marks = layer["annotations"]
        assert marks["org.opencontainers.image.title"] == marks["org.cncf.model.filepath"] == name
        assert set(marks) == {"org.opencontainers.image.title", "org.cncf.model.filepath", "org.cncf.model.file.metadata+json"}
        meta = {"name": name, "mode": 420, "uid": 0, "gid": 0, "size": layer["size"], "mtime": "2026-11-21T00:00:00Z", "typeflag": 0}
        assert json.loads(marks["org.cncf.model.file.metadata+json"]) == meta
    assert manifest["annotations"] == {
        "org.opencontainers.image.created": "2026-11-21T00:00:00Z",
        "org.opencontainers.image.version": "0.120000.0",
        "org.opencontainers.image.revision": "a" * 40,
        "org.opencontainers.image.source": "https://example.org/code",
        "org.opencontainers.image.licenses": "MIT",
        "org.streamlearn.name": "test",
        "org.streamlearn.step": "120000",
        "org.streamlearn.cursor": '{"candidates/0":7}',
        "org.streamlearn.window": "2026-11-20T00:00:00Z/2026-11-21T00:00:00Z",
        "org.streamlearn.generation": "2026Q4",
        "org.streamlearn.parent.digest": parent,
        "org.streamlearn.config.digest": "c" * 64,
        "org.streamlearn.init": "seer.torch (sha256:0, vissl: trunk)",
    }


# schema/config-schema.json of model-spec: closed at every level
SCHEMA = {
    "descriptor": {"createdAt", "authors", "family", "name", "docURL", "sourceURL", "datasetsURL", "version", "revision", "vendor", "licenses", "title", "description"},
    "config": {"architecture", "format", "paramSize", "precision", "quantization", "capabilities"},
    "modelfs": {"type", "diffIds"},
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, EVERYTHING, {"window": ("", "")}], ids=["plain", "everything", "nothing learnt"])
def test_the_config_is_what_modelpack_s_closed_schema_allows(more):
    told = described(large(**more), ["sha256:1", "sha256:2"])
    assert set(told) == set(SCHEMA)
    for part, allowed in SCHEMA.items():
        assert set(told[part]) <= allowed and all(told[part].values())
    assert told["modelfs"] == {"type": "layers", "diffIds": ["sha256:1", "sha256:2"]}
    assert (
        told["config"]["architecture"] == "regnety_002"
        and told["config"]["format"] == "safetensors"
        and told["config"]["precision"] == "float32"
    )
    assert told["config"]["paramSize"] == "2.8M" == scaled(2_793_996)  # the published count
    assert told["config"]["capabilities"].items() >= {"inputTypes": ["image"], "outputTypes": ["embedding"]}.items()
    assert ("knowledgeCutoff" in told["config"]["capabilities"]) == bool(large(**more).window[1])
    assert [scaled(n) for n in (9, 23_000, 86_676_336, 1_272_156_138)] == ["0.0K", "23.0K", "86.7M", "1.3B"]


MAKE = """
import sys
from tests.snapshots.test_package import EVERYTHING, large
from streamlearn.contract.registry import OciLayout
from streamlearn.snapshots.publish import publish
registry = OciLayout(__import__("pathlib").Path(sys.argv[1]))
publish(registry, large(1))
print(publish(registry, large(**EVERYTHING))[1])
"""
WORLDS = [
    {"PYTHONHASHSEED": "1", "TZ": "Asia/Kathmandu", "LC_ALL": "C", "UMASK": "077", "OMP_NUM_THREADS": "1"},
    {"PYTHONHASHSEED": "2", "TZ": "America/Chatham", "LC_ALL": "tr_TR.UTF-8", "UMASK": "000", "OMP_NUM_THREADS": "2", "PYTHONUTF8": "1"},
]


def test_two_processes_with_other_locales_umasks_zones_and_hash_seeds_make_the_same_digest_and_the_same_blobs(tmp_path):
    made = []
    for i, world in enumerate(WORLDS):
        env = {**os.environ, **world, "PYTHONPATH": str(REPO)}
        argv = ["bash", "-c", f'umask {world["UMASK"]}; sleep {i}.1; exec "$0" "$@"', sys.executable, "-c", MAKE, str(tmp_path / str(i))]
        done = subprocess.run(argv, env=env, cwd=REPO, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        blobs = sorted((tmp_path / str(i) / "blobs" / "sha256").iterdir())
        assert {oct(b.stat().st_mode & 0o777) for b in blobs} == {"0o644"}
        made.append((done.stdout, {b.name: b.read_bytes() for b in blobs}))
    assert made[0] == made[1] and made[0][0].startswith("sha256:")


def test_the_weights_have_timm_s_names_where_timm_has_the_model_and_no_architecture_of_timm_s_elsewhere():
    """A network with another stride under timm's name would load without a word, and be another."""
    weights, settings = (files(large(), "")[name] for name in ("model.safetensors", "config.json"))
    import safetensors.torch

    assert set(safetensors.torch.load(weights)) == set(Timm("regnety-200mf").state_dict())
    told = json.loads(settings)
    assert told["architecture"] == "regnety_002" and told["streamlearn"]["keys"] == "timm" and "model_args" not in told
    assert told["pretrained_cfg"]["crop_pct"] == 0.875 and told["num_classes"] == 0 and told["num_features"] == 368
    for backbone, stem in [("regnety-tiny", "cifar"), ("regnety-tiny", "imagenet"), ("regnety-200mf", "cifar")]:
        other = export(1, weights=seeded(build(backbone, stem)).state_dict(), backbone=backbone, stem=stem)
        told = json.loads(files(other, "")["config.json"])
        assert told["streamlearn"]["keys"] == "pycls" and "regnety_" not in told["architecture"]
        assert "stem.conv.weight" in safetensors.torch.load(files(other, "")["model.safetensors"])


def test_the_card_says_what_is_known_and_what_is_not():
    config = {
        "connectors": [{"name": "photos", "class": "folder"}],
        "fetch": {"robots": True, "respect_noindex": False},
        "objective": {"kind": "swav", "prototypes": 3000},
        "train": {"batch": 64},
        "stream": {"crops": [{"count": 2, "size": 224}, {"count": 4, "size": 96}]},
    }
    metrics = {"step": 120_000, "images": 1000, "fresh": 600, "learning_rate": 0.15, "halvings": 1, "code_entropy": 0.9}
    card = files(large(**EVERYTHING | {"config": config, "metrics": metrics}), "sha256:parent")["README.md"].decode()
    head = card.split("---")[1]
    assert "library_name: timm" in head and "license: mit" in head
    for line in [
        "| sources | photos (folder) |", "| opt-outs | over HTTP, noai and TDM headers, robots.txt were heeded |", "| images learnt | 1000, of which 600 for the first time |",
        "| began as | seer.torch (sha256:0, vissl: trunk) |", "| snapshot before | sha256:parent |", "| steps | 120000 of 64 images |",
        "| views of each image | 2 x 224 px + 4 x 96 px |", "| learning rate | 0.15 after 1 halvings |", "given under MIT. They began as seer.torch, whose own terms hold too.", "Not known when this card was written",
    ]:  # fmt: skip
        assert line in card, line
    assert "k-NN" not in card  # nothing was measured yet
    plain = files(export(1), "")["README.md"].decode()
    assert "| began as | random weights |" in plain and "library_name: streamlearn" in plain and "timm has no such model" in plain


def test_statistics_are_no_parameters_and_half_precision_is_said():
    odd = {
        "stem.conv.weight": torch.zeros(1000),
        "stem.bn.running_mean": torch.zeros(9000),
        "stem.bn.num_batches_tracked": torch.zeros((), dtype=torch.long),
    }
    assert described(large(weights=odd), [])["config"]["paramSize"] == "1.0K"
    assert (
        described(large(weights={n: t.half() if t.is_floating_point() else t for n, t in large().weights.items()}), [])["config"][
            "precision"
        ]
        == "float16"
    )
    assert large().weights["stem.conv.weight"].dtype == torch.float32
