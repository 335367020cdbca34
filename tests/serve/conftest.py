import pytest

from tests.serve.serving import filled, serving, tokens


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Three snapshots, for everybody on this machine."""
    with serving(filled(tmp_path_factory.mktemp("public"))) as served:
        yield served


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    with serving(filled(folder), tokens_file=tokens(folder)) as served:
        yield served
