"""Fixtures shared by all rooms."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.adapters.oci import docker_registry  # noqa: F401  likewise
from tests.adapters.s3 import bucket, s3_environment, s3_server  # noqa: F401  fixtures of all rooms: here, so that a session has one server

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: idle threads must not spin while roles run beside the tests
settings.register_profile("streamlearn", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # busy machines are no bug
settings.register_profile("thorough", settings.get_profile("streamlearn"), max_examples=20_000)  # pytest --hypothesis-profile=thorough
settings.load_profile("streamlearn")
REPO = Path(__file__).resolve().parent.parent


def missing(what: str) -> None:
    """Skip with the reason; in CI a skip is a failure."""
    if os.environ.get("STREAMLEARN_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what}, and STREAMLEARN_REQUIRE_SERVICES=1")
    pytest.skip(what)


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """The folder, made as a file system of its own of so many bytes, such as "64k"."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        missing(f"cannot mount a small tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real images: cifar10-{train,test}.parquet and imagenet-sample-1000.tar."""
    folder = Path(os.environ.get("STREAMLEARN_TEST_DATA", REPO.parent / "shared" / "data"))
    if not (folder / "cifar10-test.parquet").exists():
        missing(f"no real images in {folder}: set STREAMLEARN_TEST_DATA")
    return folder
