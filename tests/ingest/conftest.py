"""Fixtures shared by the tests of ingest."""

from tests.ingest.dataset import made, place  # noqa: F401  fixtures
