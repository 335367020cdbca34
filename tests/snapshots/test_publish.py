"""Snapshots: reproducible, whole or absent, killed at every step, and open to tools that are not ours."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.contract.errors import ConfigError, Corrupt
from streamlearn.contract.export import Export
from streamlearn.contract.registry import OciLayout
from streamlearn.learn.backbones import build
from streamlearn.learn.backbones.regnet import REGNETY, anynet
from streamlearn.snapshots.promote import promote
from streamlearn.snapshots.publish import publish, record_result, results, versions
from streamlearn.snapshots.pull import list_snapshots, pull, show, verify


class Killed(BaseException): ...


class DyingLayout(OciLayout):
    """Dies before or after the n-th call of one kind."""

    step, when, left = None, "before", 1

    def _maybe(self, step, call):
        if step != self.step:
            return call()
        self.left -= 1
        if self.left == 0 and self.when == "before":
            raise Killed
        done = call()
        if self.left == 0:
            raise Killed
        return done

    def put_blob(self, data, media_type):
        return self._maybe("blob", lambda: OciLayout.put_blob(self, data, media_type))

    def put_manifest(self, manifest, *, tag="", expect="*"):
        return self._maybe("manifest", lambda: OciLayout.put_manifest(self, manifest, tag=tag, expect=expect))

    def tag(self, digest, tag, *, expect="*"):
        return self._maybe("tag", lambda: OciLayout.tag(self, digest, tag, expect=expect))


def export(step, seed=0, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = build("regnety-tiny", "cifar").state_dict()
    fields = dict(
        name="test", step=step, weights=weights, backbone="regnety-tiny", stem="cifar", width=368, size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
        metrics={"step": step, "images": 10}, cursor={"candidates/0": 7}, window=("2026-11-20T00:00:00Z", "2026-11-21T00:00:00Z"), generation="",
        config={"a": 1}, config_digest="c" * 64,
    )  # fmt: skip
    return Export(**fields | more)


@pytest.fixture
def registry(tmp_path):
    return OciLayout(tmp_path / "registry")


def test_the_same_export_has_the_same_digest_everywhere(registry, tmp_path):
    one = publish(registry, export(100))
    assert one == publish(OciLayout(tmp_path / "other"), export(100)) == publish(registry, export(100))
    assert one[0] == "0.100.0" and len(versions(registry)) == 1


STEPS = [("blob", n) for n in (1, 3, 5)] + [("manifest", 1), ("tag", 1)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("step", "nth"), STEPS)
def test_killed_at_any_step_nothing_torn_is_seen_and_the_next_try_completes_it(tmp_path, step, nth, when):
    root = tmp_path / "registry"
    _, before = publish(OciLayout(root), export(1))
    dying = DyingLayout(root)
    dying.step, dying.left, dying.when = step, nth, when
    with pytest.raises(Killed):
        publish(dying, export(2, seed=1))
    left = OciLayout(root)
    for listed in list_snapshots(left):
        verify(left, listed.digest)
    assert left.tags()["candidate"].digest == (before if (step, when) != ("tag", "after") else versions(left)[2].digest)
    tag, digest = publish(left, export(2, seed=1))
    assert OciLayout(root).tags()["candidate"].digest == digest == OciLayout(root).tags()[tag].digest
    assert [s.step for s in list_snapshots(left)] == [1, 2]
    clean = OciLayout(tmp_path / "clean")
    publish(clean, export(1))
    assert publish(clean, export(2, seed=1))[1] == digest


def test_a_version_is_never_replaced_and_candidate_never_goes_back(registry):
    _, first = publish(registry, export(5))
    assert publish(registry, export(5, seed=9)) == ("0.5.0", first)
    publish(registry, export(3))
    assert registry.tags()["candidate"].digest == first


def test_lineage_leads_from_each_snapshot_to_the_one_before(registry):
    _, first = publish(registry, export(1))
    publish(registry, export(2))
    told = show(registry, "0.2.0")
    assert told["lineage"]["parent.digest"] == first and json.loads(told["lineage"]["cursor"]) == {"candidates/0": 7}
    assert told["tags"] == ["0.2.0", "candidate"] and set(told["files"]) == {
        "model.safetensors",
        "config.json",
        "metrics.json",
        "README.md",
    }


def test_a_pulled_snapshot_opens_with_safetensors_in_a_bare_pycls_model(registry, tmp_path):
    """Strict load, equal output; and the model card's own lines run."""
    source = export(7)
    publish(registry, source)
    pull(registry, "candidate", tmp_path / "model")
    weights = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    bare = anynet(REGNETY["regnety-tiny"], "cifar")
    bare.head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    bare.load_state_dict(weights, strict=True)
    trunk = build("regnety-tiny", "cifar")
    trunk.load_state_dict(source.weights)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(bare.eval()(x), trunk.eval()(x), atol=1e-5, rtol=1e-5)
    card = (tmp_path / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(tmp_path / "model")))
    told = {}
    exec(code, told)
    assert told["features"].shape == (1, 368)


def test_a_pull_is_complete_or_no_folder(registry, tmp_path):
    publish(registry, export(1))
    _, manifest = registry.manifest("candidate")
    blob = registry.root / "blobs" / "sha256" / manifest["layers"][0]["digest"][7:]
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(bytes(data))
    with pytest.raises(Corrupt, match="damaged"):
        pull(registry, "candidate", tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["registry"]
    with pytest.raises(Corrupt):
        verify(registry, "candidate")
    with pytest.raises(ConfigError, match="exists already"):
        pull(registry, "candidate", tmp_path)


def test_a_result_is_recorded_once_for_each_bank_and_protocol(registry):
    _, digest = publish(registry, export(1))
    result = {"bank": "b", "bank_digest": "sha256:b", "protocol": "p/1", "knn": 0.5, "step": 1}
    record_result(registry, digest, result)
    record_result(registry, digest, result | {"knn": 0.6})
    record_result(registry, digest, result | {"protocol": "p/2"})
    assert [r["knn"] for r in results(registry, digest)] == [0.5, 0.5]
    assert len(list_snapshots(registry)[0].results) == 2


def test_the_commands_show_what_there_is(registry, tmp_path):
    publish(registry, export(3))
    home = ["--home", str(tmp_path)]
    assert "0.3.0" in CliRunner().invoke(cli, ["snapshots", "list", *home]).output
    assert json.loads(CliRunner().invoke(cli, ["snapshots", "list", "--json", *home]).output)[0]["step"] == 3
    assert json.loads(CliRunner().invoke(cli, ["snapshots", "show", "candidate", *home]).output)["metrics"]["images"] == 10
    assert CliRunner().invoke(cli, ["snapshots", "verify", "0.3.0", *home]).output.count("ok ") == 5
    assert CliRunner().invoke(cli, ["snapshots", "pull", "0.3.0", str(tmp_path / "m"), *home]).exit_code == 0
    assert isinstance(CliRunner().invoke(cli, ["snapshots", "list", "--home", "nowhere"]).exception, ConfigError)
    assert dataclasses.is_dataclass(list_snapshots(registry)[0])


def test_on_a_narrow_terminal_no_tag_and_no_digest_is_cut(registry, tmp_path, monkeypatch):
    """They are what the next command is given."""
    _, digest = publish(registry, export(3))
    result = {"bank": "pets", "bank_digest": "sha256:b", "protocol": "p/1", "knn": 0.5, "random_knn": 0.1, "raw_knn": 0.2, "ridge": 0.3}
    record_result(registry, digest, result | {"step": 3})
    promote(registry, "stable", "candidate", by="ann", why="a reason that is longer than any terminal is wide " * 3)
    monkeypatch.setenv("COLUMNS", "80")
    words = CliRunner().invoke(cli, ["snapshots", "list", "--home", str(tmp_path)]).output.split()
    assert {"candidate", "stable", "0.3.0", digest[7:19], "0.500", "0.100", "0.200", "0.300"} <= set(words)
    said = CliRunner().invoke(cli, ["snapshots", "history", "--home", str(tmp_path)]).output.splitlines()
    assert (
        len(said) == 2
        and f"stable: promote 0.3.0 {digest[7:19]} (before: nothing), by ann" in said[0]
        and said[1].strip().endswith("is wide")
    )
