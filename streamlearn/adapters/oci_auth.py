"""Who we are to a registry: basic, or bearer tokens from the realm that its 401 names (distribution's token flow).

Where the secret comes from, first that is there: `snapshots.username` with a password file or STREAMLEARN_REGISTRY_PASSWORD; docker's
config.json (`auths`, else the helper that `credHelpers` or `credsStore` names); nobody, for registries that are open.

Secrets live in this file's objects alone.  They are in no repr, no message and no log, and go only to the registry's own host and to the
realm that it names, over TLS unless `snapshots.plain_http` is set.
"""

import base64
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from streamlearn.contract.config_snapshots import SnapshotsConfig
from streamlearn.contract.errors import ConfigError, Retryable

PASSWORD = "STREAMLEARN_REGISTRY_PASSWORD"
HUB = {"docker.io", "index.docker.io", "registry-1.docker.io"}
HUB_KEY = "https://index.docker.io/v1/"  # under which docker keeps its own registry
HELPER_S = 60.0  # for a credential helper to answer
LIFE_S = 60.0  # of a token that does not say
BY_TOKEN = "<token>"  # a helper's user name, where the secret is an identity token
CHALLENGE = re.compile(r'(?i)\b(basic|bearer)\b((?:\s*,?\s*[a-z_]+\s*=\s*(?:"[^"]*"|[^\s,"]+))*)')
PARAMETER = re.compile(r'(?i)([a-z_]+)\s*=\s*(?:"([^"]*)"|([^\s,"]+))')


@dataclass(frozen=True)
class Secret:
    """At most one of a password, an identity token (to be changed for tokens), a token as it is."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode() if self.username else ""


def find_secret(config: SnapshotsConfig, host: str, repository: str, env: Mapping[str, str] = os.environ) -> Secret:
    """Raises ConfigError where a secret is named and cannot be had."""
    if config.username:
        return Secret(config.username, _password(config, env))
    path = Path(config.docker_config) if config.docker_config else _docker_home(env) / "config.json"
    try:
        known = json.loads(path.read_bytes())
        if not isinstance(known, dict):
            raise TypeError("it holds no object")
        return _of_docker(known, host, repository, str(path))
    except FileNotFoundError:
        if config.docker_config:
            raise ConfigError(f"snapshots.docker_config = {config.docker_config!r}: no such file; `docker login` writes one") from None
        return Secret()
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise ConfigError(f"{path}: not docker's config.json ({type(e).__name__}); log in anew, or set snapshots.username") from None


def _password(config: SnapshotsConfig, env: Mapping[str, str]) -> str:
    if config.password_file:
        try:
            lines = Path(config.password_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"snapshots.password_file = {config.password_file!r}: {type(e).__name__}; name a readable text file"
            ) from None
        if not lines or not lines[0]:
            raise ConfigError(f"snapshots.password_file = {config.password_file!r}: its first line is empty; write the password there")
        return lines[0]
    if not env.get(PASSWORD):
        raise ConfigError(f"snapshots.username = {config.username!r} has no password; set snapshots.password_file, or {PASSWORD}")
    return env[PASSWORD]


def _docker_home(env: Mapping[str, str]) -> Path:
    return Path(env["DOCKER_CONFIG"]) if env.get("DOCKER_CONFIG") else Path.home() / ".docker"


def _of_docker(known: Mapping[str, Any], host: str, repository: str, where: str) -> Secret:
    parts = repository.split("/")
    names = ["/".join([host, *parts[:n]]) for n in range(len(parts), 0, -1)]  # podman's file: the longest that fits
    names += [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/", *([HUB_KEY] if host in HUB else [])]
    auths = known.get("auths") or {}
    for name in names:
        entry = auths.get(name) or {}
        if entry.get("identitytoken") or entry.get("registrytoken"):
            return Secret(identity=entry.get("identitytoken", ""), token=entry.get("registrytoken", ""))
        if entry.get("auth"):
            username, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            return Secret(username, password.rstrip("\0"))
    server = HUB_KEY if host in HUB else host
    helper = (known.get("credHelpers") or {}).get(server) or known.get("credsStore")
    return _of_helper(helper, server, where) if helper else Secret()


def _of_helper(name: str, server: str, where: str) -> Secret:
    """docker-credential-NAME, as docker asks it.  One that has nothing for this server leaves us nobody."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ConfigError(f"{where}: credential helper {name!r}: not a name")
    command = f"docker-credential-{name}"
    try:
        done = subprocess.run([command, "get"], input=server.encode(), capture_output=True, timeout=HELPER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ConfigError(f"{where}: {command} cannot be asked ({type(e).__name__}); install it, or set snapshots.username") from None
    if done.returncode:
        return Secret()
    told = json.loads(done.stdout)
    username, secret = str(told["Username"]), str(told["Secret"])
    return Secret(identity=secret) if username == BY_TOKEN else Secret(username, secret)


# --- what to say to whom ---

Ask = Callable[[str, str, Mapping[str, str], bytes | None], tuple[int, bytes]]  # method, url, headers, body -> status, body


class Keys:
    """The Authorization header of each request; learns from 401s which kind a registry wants.  Not for other hosts than the registry's."""

    def __init__(self, secret: Secret, ask: Ask, place: str, *, clock: Callable[[], float] = time.monotonic):
        self._secret, self._ask, self._place, self._clock = secret, ask, place, clock
        self._bearer: dict[str, str] | None = None  # its challenge, once it came
        self._basic = False
        self._tokens: dict[frozenset[str], tuple[str, float]] = {}  # by scopes; with the moment from which it is not used

    def header(self, scopes: frozenset[str]) -> str:
        """'' for none.  Raises ConfigError, Retryable where a token is to be fetched and cannot be had."""
        if self._secret.token:
            return f"Bearer {self._secret.token}"
        if self._basic:
            return self._secret.basic()
        if self._bearer is None:
            return ""
        token, until = self._tokens.get(scopes, ("", 0.0))
        if self._clock() >= until:
            token, life_s = self._fetch(self._bearer, scopes)
            self._tokens[scopes] = (token, self._clock() + life_s - min(10.0, life_s / 5))
        return f"Bearer {token}"

    def challenged(self, header: str, scopes: frozenset[str]) -> bool:
        """A request with what `header()` gave was answered 401.  True: a new answer may do better, once."""
        found = {kind.lower(): {k.lower(): a or b for k, a, b in PARAMETER.findall(rest)} for kind, rest in CHALLENGE.findall(header)}
        if "bearer" in found and found["bearer"].get("realm"):
            self._bearer, self._basic = found["bearer"], False
            return self._tokens.pop(scopes, None) is not None or not self._secret.token
        if "basic" in found and self._secret.basic():
            known, self._basic = self._basic, True
            return not known
        return False

    def _fetch(self, challenge: Mapping[str, str], scopes: frozenset[str]) -> tuple[str, float]:
        realm = challenge["realm"]
        query = [("service", challenge["service"])] if challenge.get("service") else []
        if self._secret.identity:
            form = [*query, ("client_id", "streamlearn"), ("grant_type", "refresh_token"), ("scope", " ".join(sorted(scopes)))]
            body = urlencode([*form, ("refresh_token", self._secret.identity)]).encode()
            status, answer = self._ask("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, body)
        else:
            url = realm + ("&" if "?" in realm else "?") + urlencode([*query, *(("scope", scope) for scope in sorted(scopes))])
            basic = self._secret.basic()
            status, answer = self._ask("GET", url, {"Authorization": basic} if basic else {}, None)
        return self._token(status, answer, realm.split("?")[0])

    def _token(self, status: int, answer: bytes, realm: str) -> tuple[str, float]:
        if status != 200:
            who = f"user {self._secret.username}" if self._secret.username else "nobody" if not self._secret.identity else "our token"
            raise ConfigError(
                f"{self._place}: its token server {realm} refuses {who} (status {status}); "
                "set snapshots.username and snapshots.password_file, or log in with docker"
            )
        try:
            told = json.loads(answer)
            return str(told.get("token") or told["access_token"]), float(told.get("expires_in") or LIFE_S)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise Retryable(f"{self._place}: its token server {realm} answers no token ({type(e).__name__})", after_s=5.0) from None
