"""Fixtures shared by the tests of ingest."""

from tests.ingest.dataset import made, place  # noqa: F401  fixtures
from tests.ingest.life import storage  # noqa: F401  fixture
