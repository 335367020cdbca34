"""Signatures: over what a pull gives, checked by our commands and by model_signing's own; one flipped byte, and they do not hold."""

import importlib.util
import subprocess
import sys

import pytest
from click.testing import CliRunner

from streamlearn.__main__ import cli
from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.registry import OciLayout
from streamlearn.snapshots.copy import copy
from streamlearn.snapshots.publish import publish
from streamlearn.snapshots.pull import pull
from streamlearn.snapshots.signing import BUNDLE, bundles, checked, sign, verify
from tests.adapters.oci import remote
from tests.conftest import missing
from tests.snapshots.test_publish import export


@pytest.fixture(autouse=True)
def installed():
    for name in ("model_signing", "OpenSSL"):
        if importlib.util.find_spec(name) is None:
            missing(f"{name} is not installed: pip install -c constraints.txt model-signing pyopenssl")


def key_pair(folder, name="key"):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    private, paths = ec.generate_private_key(ec.SECP256R1()), (folder / f"{name}.pem", folder / f"{name}.pub")
    paths[0].write_bytes(private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    paths[1].write_bytes(private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return paths


@pytest.fixture
def registry(tmp_path):
    own = OciLayout(tmp_path / "home" / "registry")
    publish(own, export(1))
    return own


def model_signing_verify(folder, bundle, public):
    argv = [sys.executable, "-m", "model_signing", "verify", "key", str(folder), "--signature", str(bundle), "--public_key", str(public)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)


def test_a_pulled_folder_passes_model_signing_s_own_command_and_one_changed_byte_does_not(registry, tmp_path):
    private, public = key_pair(tmp_path)
    home = ["--home", str(tmp_path / "home")]
    run = CliRunner()
    assert (
        run.invoke(cli, ["snapshots", "sign", "candidate", "--key", str(private), "--by", "ann", *home], catch_exceptions=False).exit_code
        == 0
    )
    done = run.invoke(cli, ["snapshots", "verify", "0.1.0", "--public-key", str(public), "--bundle", str(tmp_path / "model.sig"), *home])
    assert done.exit_code == 0 and "ok signed with the key" in done.output
    assert run.invoke(cli, ["snapshots", "pull", "candidate", str(tmp_path / "model"), "--public-key", str(public), *home]).exit_code == 0
    (known,) = registry.referrers(registry.find("candidate").digest, BUNDLE)
    assert known.annotations["org.streamlearn.by"] == "ann" and list(bundles(registry, "0.1.0").values()) == [
        (tmp_path / "model.sig").read_bytes()
    ]
    assert model_signing_verify(tmp_path / "model", tmp_path / "model.sig", public).returncode == 0
    for name in ("model.safetensors", "README.md"):
        whole = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert model_signing_verify(tmp_path / "model", tmp_path / "model.sig", public).returncode != 0
        with pytest.raises(Corrupt, match=f"no signature of .*{name}"):
            checked(registry, "candidate", public)(tmp_path / "model")
        (tmp_path / "model" / name).write_bytes(whole)
    (tmp_path / "model" / "more.py").write_bytes(b"")  # a file that nobody signed
    with pytest.raises(Corrupt, match=r"more\.py"):
        checked(registry, "candidate", public)(tmp_path / "model")


def test_what_is_not_signed_or_by_another_or_for_another_snapshot_is_not_pulled(registry, tmp_path):
    private, public = key_pair(tmp_path)
    other, other_public = key_pair(tmp_path, "other")
    target = tmp_path / "model"
    with pytest.raises(NotFound, match="not signed"):
        pull(registry, "candidate", target, checked(registry, "candidate", public))
    sign(registry, "candidate", other, by="eve")
    with pytest.raises(Corrupt, match="no signature of"):
        pull(registry, "candidate", target, checked(registry, "candidate", public))
    publish(registry, export(2, seed=2))
    (bundle,) = bundles(registry, "0.1.0").values()
    registry.attach(registry.find("0.2.0"), BUNDLE, bundle, {})  # of another snapshot, laid beside this one
    with pytest.raises(Corrupt, match="mismatch"):
        verify(registry, "0.2.0", other_public)
    registry.attach(registry.find("0.1.0"), BUNDLE, b'{"mediaType": "nonsense"}', {})
    assert not target.exists()
    sign(registry, "0.1.0", private, by="ann")
    assert pull(registry, "0.1.0", target, checked(registry, "0.1.0", public)) and verify(registry, "0.1.0", other_public)


def test_a_flipped_byte_in_the_registry_is_refused_before_anyone_signs(registry, tmp_path):
    private, public = key_pair(tmp_path)
    sign(registry, "0.1.0", private, by="ann")
    path = registry.path(registry.manifest("0.1.0")[1]["layers"][0]["digest"])
    whole = path.read_bytes()
    path.write_bytes(b"~" + whole[1:])
    for act in (lambda: sign(registry, "0.1.0", private, by="ann"), lambda: verify(registry, "0.1.0", public)):
        with pytest.raises(Corrupt, match="damaged"):
            act()
    path.write_bytes(whole)
    (known,) = registry.referrers(registry.find("0.1.0").digest, BUNDLE)
    path = registry.path(registry.manifest(known.digest)[1]["layers"][0]["digest"])
    path.write_bytes(b"~" + path.read_bytes()[1:])
    with pytest.raises(Corrupt, match="damaged"):
        verify(registry, "0.1.0", public)


def test_a_signature_goes_along_with_a_copy(registry, docker_registry, tmp_path):
    private, public = key_pair(tmp_path)
    sign(registry, "candidate", private, by="ann")
    far = remote(docker_registry.host, tmp_path / "spool")
    copy(registry, far, "candidate", "stable")
    assert verify(far, "stable", public) == verify(registry, "candidate", public)
    pull(far, "stable", tmp_path / "model", checked(far, "stable", public))


def test_keys_that_are_none_are_named(registry, tmp_path):
    private, public = key_pair(tmp_path)
    (tmp_path / "text").write_text("no key")
    sign(registry, "candidate", private, by="ann")
    for path in (tmp_path / "text", public):
        with pytest.raises(ConfigError, match=f"{path}: cannot sign with it"):
            sign(registry, "candidate", path, by="ann")
    with pytest.raises(ConfigError, match="no such file"):
        sign(registry, "candidate", tmp_path / "nowhere", by="ann")
    with pytest.raises(ConfigError, match="text: "):
        verify(registry, "candidate", tmp_path / "text")


def test_without_the_extra_its_name_is_said(registry, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "OpenSSL", None)
    with pytest.raises(ConfigError, match=r"OpenSSL is not installed: pip install 'streamlearn\[sign\]'"):
        sign(registry, "candidate", tmp_path / "key.pem", by="ann")
