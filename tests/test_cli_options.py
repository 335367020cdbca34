"""What several commands ask alike."""

import os
import pwd

import pytest
from click.testing import CliRunner

from streamlearn.cli.dataset_change import takedown
from streamlearn.cli.options import user
from streamlearn.contract.errors import ConfigError


def test_a_user_without_a_name_is_a_number(monkeypatch):
    """As in a container that runs as an arbitrary uid."""

    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert user() == pwd.getpwuid(os.getuid()).pw_name
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert user() == f"uid {os.getuid()}"
    with pytest.raises(ConfigError, match="no loop has run here"):  # refused for its home, not for its user
        CliRunner().invoke(takedown, ["--home", "nowhere"], catch_exceptions=False)
