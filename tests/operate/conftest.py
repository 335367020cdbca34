"""Fixtures of the room."""

from tests.ingest.dataset import made  # noqa: F401
from tests.operate.homes import home  # noqa: F401
