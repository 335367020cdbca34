"""Who may pull: a file with a name and its token on each line.

The file is looked at again whenever it changes, so a token that is taken out of it opens nothing from the next request on, without a
restart.  A file that cannot be read then opens to nobody.
"""

import base64
import binascii
import hashlib
import hmac
import logging
from pathlib import Path

from streamlearn.contract.errors import ConfigError

SHORTEST = 16  # characters of a token: what can be guessed is none
LONGEST = 4096  # of what is compared
logger = logging.getLogger(__name__)


class Tokens:
    """Raises ConfigError where the file is not one of tokens; its content is in no message."""

    def __init__(self, path: Path):
        self.path = path
        self._mark, self._hashes = _mark(path), _read(path)

    def name_of(self, authorization: str) -> str:
        """Whose token the request's Authorization has; '' for nobody's.  Every token is compared, whichever it is."""
        given = hashlib.sha256(_given(authorization).encode()).digest()
        found = ""
        for name, known in self._current().items():
            if hmac.compare_digest(given, known):
                found = name
        return found

    def _current(self) -> dict[str, bytes]:
        try:
            mark = _mark(self.path)
            if mark != self._mark:
                self._hashes = _read(self.path)
                self._mark = mark
        except ConfigError as e:
            if self._hashes:
                logger.error("%s; nobody is let in until it is mended", e)
            self._hashes, self._mark = {}, (0, 0, 0)
        return self._hashes


def _given(authorization: str) -> str:
    """The token of `Bearer TOKEN`, or the password of `Basic …`, whoever the user is; '' where there is none."""
    kind, _, value = authorization[:LONGEST].partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _mark(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError as e:
        raise ConfigError(f"serve.tokens_file = {str(path)!r}: {e.strerror}; it has a name and its token on each line") from e
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> dict[str, bytes]:
    """Name -> sha256 of its token."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"serve.tokens_file = {str(path)!r}: cannot be read ({type(e).__name__})") from e
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) < SHORTEST or words[0] in found:
            raise ConfigError(
                f"{path}:{number}: write a name of its own and a token of at least {SHORTEST} characters, with a space between; "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one"
            )
        found[words[0]] = hashlib.sha256(words[1].encode()).digest()
    if not found:
        raise ConfigError(f"serve.tokens_file = {str(path)!r}: no token in it; without tokens nobody could pull")
    return found
