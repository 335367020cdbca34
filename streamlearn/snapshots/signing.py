"""Signatures over a snapshot's files, by OpenSSF Model Signing with an elliptic-curve key that never leaves this machine.

What is signed is the folder as `pull` makes it, so `model_signing verify key` of that folder understands the bundle as it is.  The bundle
is attached as an OCI referrer of type application/vnd.dev.sigstore.bundle.v0.3+json; attaching is the commit.  Several may sign.
Needs the extra: pip install 'streamlearn[sign]'.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamlearn.contract.errors import ConfigError, Corrupt, NotFound
from streamlearn.contract.oci import referring
from streamlearn.contract.registry import EMPTY, Descriptor, Registry
from streamlearn.snapshots.artifact import LINEAGE
from streamlearn.snapshots.pull import pull
from streamlearn.snapshots.pull import verify as verify_bytes

if TYPE_CHECKING:
    from types import ModuleType

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"


def sign(registry: Registry, reference: str, key: Path, *, by: str, password: str = "") -> Descriptor:
    """Sign with a PEM private key (P-256, P-384 or P-521) and attach the bundle.  Raises ConfigError of a key that cannot be used."""
    signing = _library("signing")
    verify_bytes(registry, reference)  # a snapshot's, and sound: before anyone puts a name to it
    subject, _ = registry.manifest(reference)
    with tempfile.TemporaryDirectory(prefix="streamlearn-sign-") as scratch:
        folder, bundle = Path(scratch) / "model", Path(scratch) / "model.sig"
        pull(registry, subject.digest, folder)
        try:
            signing.Config().use_elliptic_key_signer(private_key=_readable(key), password=password or None).sign(folder, bundle)
        except (ValueError, TypeError) as e:
            raise ConfigError(
                f"{key}: cannot sign with it: {e}; a PEM file with an elliptic-curve private key (P-256, P-384, P-521)"
            ) from e
        layer = registry.put_blob(bundle.read_bytes(), BUNDLE)
    return registry.put_manifest(referring(subject, BUNDLE, registry.put_blob(b"{}", EMPTY), layer, {LINEAGE + "by": by}))


def bundles(registry: Registry, reference: str) -> dict[str, bytes]:
    """Digest of each signature's manifest -> its bundle, those of other tools too.  Raises Corrupt."""
    found = {}
    for known in registry.referrers(registry.manifest(reference)[0].digest, BUNDLE):
        for layer in registry.manifest(known.digest)[1].get("layers") or []:
            found[known.digest] = registry.read_blob(layer["digest"])
    return found


def checked(registry: Registry, reference: str, public_key: Path) -> Callable[[Path], bytes]:
    """What says of a pulled folder whether one of the snapshot's signatures is this key's and covers every file; gives that bundle.

    It raises Corrupt where none does, NotFound where there is none at all.
    """
    verifying = _library("verifying")
    signed = bundles(registry, reference)

    def check(folder: Path) -> bytes:
        if not signed:
            raise NotFound(f"{reference} is not signed; `streamlearn snapshots sign {reference} --key FILE`")
        refusals = []
        for digest, bundle in signed.items():
            with tempfile.TemporaryDirectory(prefix="streamlearn-verify-") as scratch:
                path = Path(scratch) / "model.sig"
                path.write_bytes(bundle)
                problem = _problem(verifying, folder, path, public_key)
            if not problem:
                return bundle
            refusals.append(f"{digest[:19]}…: {problem}")
        raise Corrupt(f"{reference}: no signature of {public_key} covers these files: {'; '.join(refusals)}")

    return check


def verify(registry: Registry, reference: str, public_key: Path) -> bytes:
    """Read every byte and check it against the signatures; the bundle that holds.  Raises as `checked`."""
    check = checked(registry, reference, public_key)
    with tempfile.TemporaryDirectory(prefix="streamlearn-verify-") as scratch:
        pull(registry, reference, Path(scratch) / "model")
        return check(Path(scratch) / "model")


def _problem(verifying: Any, folder: Path, bundle: Path, public_key: Path) -> str:
    """Empty: it holds.  Raises ConfigError of a key that is none."""
    from cryptography.exceptions import InvalidSignature

    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=_readable(public_key))
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{public_key}: {e}; a PEM file with an elliptic-curve public key (P-256, P-384, P-521)") from e
    try:
        config.verify(folder, bundle)
    except InvalidSignature:
        return "signed with another key"
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as e:  # what the library raises of differing files and of bundles that are none
        return str(e) or type(e).__name__
    return ""


def _readable(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; it must be a PEM key")
    return path


def _library(name: str) -> "ModuleType":
    try:
        import OpenSSL  # noqa: F401  model-signing needs it and does not say so
        from model_signing import signing, verifying
    except ImportError as e:
        raise ConfigError(f"{e.name} is not installed: pip install 'streamlearn[sign]'") from e
    return {"signing": signing, "verifying": verifying}[name]
