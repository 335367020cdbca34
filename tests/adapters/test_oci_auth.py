"""Who we are to a registry: htpasswd and tokens at Debian's docker-registry for real; secrets go where they belong and nowhere else."""

import base64
import json
import logging
import os
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from streamlearn.adapters.oci_auth import PASSWORD as VARIABLE
from streamlearn.adapters.oci_auth import Secret, find_secret
from streamlearn.contract.config import SnapshotsConfig
from streamlearn.contract.errors import ConfigError, Retryable
from tests.adapters.oci import PASSWORD, USER, DockerRegistry, docker_config, htpasswd_registry, remote, require
from tests.adapters.oci_server import OciServer, noise, one_manifest
from tests.adapters.serving import Serving
from tests.adapters.tls import authority_and_certificate

BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(autouse=True)
def nothing_of_the_machines_own(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker"))
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def password_file(tmp_path):
    (tmp_path / "password").write_text(PASSWORD + "\nanother line\n")
    return str(tmp_path / "password")


# --- basic ---


def test_htpasswd(tmp_path, password_file, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    with htpasswd_registry(tmp_path / "registry") as served:
        own = remote(served.host, tmp_path / "spool", username=USER, password_file=password_file)
        done = own.put_manifest(one_manifest(own, "1"), tag="v1")
        monkeypatch.setenv(VARIABLE, PASSWORD)
        url = own.config.registry
        assert remote("", tmp_path / "spool", registry=url, username=USER).find("v1").digest == done.digest
        file = str(docker_config(tmp_path / "config.json", served.host))
        assert remote("", tmp_path / "spool", registry=url, docker_config=file).names() == ["v1"]
        for wrong in ({}, {"username": "somebody"}):
            with pytest.raises(ConfigError, match=r"401 .*refuses us; set snapshots.username"):
                remote("", tmp_path / "spool", registry=url, **wrong).names()
    told = caplog.text + repr(own.wire.__dict__) + repr(own.wire._keys._secret)
    assert PASSWORD not in told and BASIC.split()[1] not in told


# --- tokens ---


class TokenServer(Serving):
    """Signs JSON web tokens as docker-registry wants them: a real server, asked by a real client, believed by a real registry."""

    def __init__(self, folder):
        super().__init__()
        folder.mkdir(parents=True)
        _, pem = authority_and_certificate()
        self.key = serialization.load_pem_private_key(pem, None)
        self.certificate = x509.load_pem_x509_certificate(pem[pem.index(b"-----BEGIN CERT") :])
        (folder / "bundle.pem").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        self.auth = f"auth: {{token: {{realm: 'http://{self.host}/token?account=x', service: tests, issuer: tests, rootcertbundle: {folder / 'bundle.pem'}}}}}\n"
        self.scopes, self.life_s, self.busy = [], 300, 0

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes):
        if self.busy:
            self.busy -= 1
            return 503, {"Retry-After": "0"}, b"busy"
        query = parse_qs(urlsplit(handler.path).query) | parse_qs(body.decode())
        known = handler.headers.get("Authorization") == BASIC or query.get("refresh_token") == ["an-identity"]
        if not known and handler.headers.get("Authorization"):
            return 401, {}, b""
        scopes = " ".join(query.get("scope", [])).split()
        self.scopes.append(scopes)
        granted = [s.split(":") for s in scopes]
        access = [{"type": k, "name": n, "actions": a.split(",") if known else ["pull"]} for k, n, a in granted]
        now = int(time.time())
        claims = {"iss": "tests", "sub": USER, "aud": "tests", "exp": now + 300, "nbf": now - 10, "iat": now, "jti": "1", "access": access}
        return 200, {}, json.dumps({"token": self.signed(claims), "expires_in": self.life_s}).encode()

    def signed(self, claims):
        chain = [base64.b64encode(self.certificate.public_bytes(serialization.Encoding.DER)).decode()]
        parts = [_b64(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ES256", "x5c": chain}, claims)]
        r, s = decode_dss_signature(self.key.sign(".".join(parts).encode(), ec.ECDSA(hashes.SHA256())))
        return ".".join([*parts, _b64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))])


def _b64(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.fixture
def tokens(tmp_path):
    require("docker-registry")
    with TokenServer(tmp_path / "tokens") as server, DockerRegistry(tmp_path / "registry", server.auth) as served:
        server.registry = served.host
        yield server


def test_tokens(tokens, tmp_path, password_file, caplog):
    caplog.set_level(logging.DEBUG)
    tokens.busy = 1
    own = remote(tokens.registry, tmp_path / "spool", username=USER, password_file=password_file)
    own.put_manifest(one_manifest(own, "1"), tag="v1")
    own.put_blob(noise(200_000), "a/b")
    assert own.names() == ["v1"]
    name = own.repository
    assert sorted(map(tuple, tokens.scopes)) == [(f"repository:{name}:pull",), (f"repository:{name}:pull,push",)]  # one each, and kept
    anyone = remote("", tmp_path / "spool", registry=own.config.registry)
    assert anyone.names() == ["v1"]
    with pytest.raises(ConfigError, match="401"):
        anyone.put_blob(b"2", "a/b")
    assert PASSWORD not in caplog.text and BASIC.split()[1] not in caplog.text and "eyJ" not in caplog.text


def test_a_token_that_expires_is_fetched_anew(tokens, tmp_path, password_file):
    tokens.life_s = 0.000001
    own = remote(tokens.registry, tmp_path / "spool", username=USER, password_file=password_file)
    own.put_blob(b"1", "a/b")
    assert own.has_blob(own.put_blob(b"2", "a/b").digest) and len(tokens.scopes) > 4


def test_an_identity_token_of_docker_is_changed_for_tokens(tokens, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"auths": {tokens.registry: {"identitytoken": "an-identity"}}}))
    own = remote(tokens.registry, tmp_path / "spool", docker_config=str(tmp_path / "config.json"))
    assert own.has_blob(own.put_blob(b"1", "a/b").digest)


def test_a_wrong_password_at_the_token_server_is_said(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "wrong-one")
    with pytest.raises(ConfigError, match="refuses user trainer") as e:
        remote(tokens.registry, tmp_path / "spool", username=USER).names()
    assert "wrong-one" not in str(e.value)
    tokens.busy = 99
    with pytest.raises(Retryable, match="503"):
        remote(tokens.registry, tmp_path / "spool", username=USER).names()


# --- where secrets go ---


@pytest.fixture
def server():
    with OciServer() as served:
        yield served


def test_a_redirect_to_another_host_gets_no_secret(server, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, PASSWORD)
    with OciServer() as store:
        own = remote(server.host, tmp_path / "spool", username=USER)
        challenge = {"WWW-Authenticate": 'Basic realm="tests"'}
        server.before = lambda method, path: None if server.log[-1][2].get("authorization") == BASIC else (401, challenge)
        store.blobs = server.blobs
        server.elsewhere = f"http://{store.host}"
        done = own.put_blob(noise(100_000), "a/b")  # HEAD is redirected too, and not followed
        assert own.read_blob(done.digest) == noise(100_000) and own.has_blob(done.digest)
        assert store.asked("GET") and not any("authorization" in headers for _, _, headers in store.log)
        assert store.asked("HEAD") == []
        store.before = lambda method, path: (401, challenge)
        with pytest.raises(ConfigError, match="401") as e:  # who asks there gets none either
            own.read_blob(done.digest)
        assert not any("authorization" in headers for _, _, headers in store.log) and "of-the-store" not in str(e.value)


def test_an_upload_on_another_host_gets_no_secret(server, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, PASSWORD)
    with OciServer() as store:
        store.blobs = server.blobs
        store.uploads["abc"] = b""

        def before(method, path):
            if server.log[-1][2].get("authorization") != BASIC:
                return 401, {"WWW-Authenticate": 'Basic realm="tests"'}
            return (202, {"Location": f"http://{store.host}/v2/x/blobs/uploads/abc"}) if method == "POST" else None

        server.before = before
        own = remote(server.host, tmp_path / "spool", username=USER)
        assert own.read_blob(own.put_blob(noise(300_000), "a/b").digest) == noise(300_000)
        assert store.asked("PATCH") and not any("authorization" in headers for _, _, headers in store.log)


def test_plain_http_is_only_spoken_when_asked_for(server, tmp_path):
    with pytest.raises(Retryable, match="SSL|https"):
        remote(server.host, tmp_path / "spool", plain_http=False, attempts=1).names()
    assert server.log == []


@pytest.fixture
def secured(tmp_path):
    require("docker-registry")
    authority, pem = authority_and_certificate()
    (tmp_path / "ca.pem").write_bytes(authority)
    (tmp_path / "server.pem").write_bytes(pem)
    with DockerRegistry(tmp_path / "registry", tls=(tmp_path / "server.pem", tmp_path / "server.pem")) as served:
        yield served


def test_tls_is_verified(secured, tmp_path):
    own = remote(secured.host, tmp_path / "spool", plain_http=False, ca_bundle=str(tmp_path / "ca.pem"))
    assert own.read_blob(own.put_blob(noise(200_000), "a/b").digest) == noise(200_000)
    with pytest.raises(ConfigError, match=r"not trusted; set snapshots.ca_bundle"):
        remote(secured.host, tmp_path / "spool", plain_http=False).names()
    with pytest.raises(ConfigError, match="no such file"):
        remote(secured.host, tmp_path / "spool", plain_http=False, ca_bundle="nowhere.pem")


def test_a_registry_that_leads_from_https_to_http_is_not_followed(tmp_path, server):
    authority, pem = authority_and_certificate()
    (tmp_path / "ca.pem").write_bytes(authority)
    (tmp_path / "server.pem").write_bytes(pem)

    class Leading(Serving):
        def answer(self, handler, body):
            return 307, {"Location": f"http://{server.host}{handler.path}"}, b""

    with Leading(tmp_path / "server.pem") as leading:
        own = remote(leading.host, tmp_path / "spool", plain_http=False, ca_bundle=str(tmp_path / "ca.pem"))
        with pytest.raises(ConfigError, match="not https"):
            own.read_blob("sha256:" + "0" * 64)
    assert server.log == []


# --- waiting ---


def test_a_registry_that_says_when_is_asked_then(server, tmp_path):
    busy = [(429, {"Retry-After": "3"}), (503, {"Retry-After": "1"})]
    server.before = lambda method, path: busy.pop() if busy else None
    slept = []
    own = remote(server.host, tmp_path / "spool", max_pause_s=10.0)
    own.wire._sleep = slept.append
    assert own.names() == [] and slept == [1.0, 3.0]
    busy += [(429, {"Retry-After": "600"})]
    with pytest.raises(Retryable, match="429") as e:
        own.names()
    assert e.value.after_s == 600 and slept == [1.0, 3.0]  # so long a wait is the role's, not ours
    later = datetime.fromtimestamp(time.time() + 500, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    busy += [(503, {"Retry-After": later})]
    with pytest.raises(Retryable) as e:
        own.names()
    assert 400 < e.value.after_s < 600
    for nonsense in ("soon", "-5"):
        busy += [(503, {"Retry-After": nonsense})] * 3
        with pytest.raises(Retryable) as e:
            own.names()
        assert e.value.after_s == 5.0


# --- where secrets come from ---


def config(**more):
    return SnapshotsConfig(registry="oci://registry.example.org/team/model", **more)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"auths": {"registry.example.org": {"auth": base64.b64encode(b"a:b:c").decode()}}}, Secret("a", "b:c")),
        ({"auths": {"https://registry.example.org/v1/": {"auth": base64.b64encode(b"a:b").decode()}}}, Secret("a", "b")),
        (
            {"auths": {"registry.example.org/team": {"auth": base64.b64encode(b"t:b").decode()}, "registry.example.org": {}}},
            Secret("t", "b"),
        ),
        ({"auths": {"registry.example.org": {"registrytoken": "r"}}}, Secret(token="r")),
        ({"auths": {"other.example.org": {"auth": "eDp5"}}}, Secret()),
        ({"auths": {"registry.example.org": {}}, "credsStore": "of-test"}, Secret("h", "p of registry.example.org")),
        ({"credHelpers": {"registry.example.org": "of-test", "x": "y"}}, Secret("h", "p of registry.example.org")),
        ({"credsStore": "empty"}, Secret()),
        ({}, Secret()),
    ],
)
def test_dockers_config_is_read(known, found, tmp_path, monkeypatch):
    helper = tmp_path / "docker-credential-of-test"
    helper.write_text('#!/bin/sh\nread host\necho "{\\"Username\\":\\"h\\",\\"Secret\\":\\"p of $host\\"}"\n')
    (tmp_path / "docker-credential-empty").write_text("#!/bin/sh\necho credentials not found\nexit 1\n")
    for script in tmp_path.glob("docker-credential-*"):
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert find_secret(config(), "registry.example.org", "team/model", {"DOCKER_CONFIG": str(tmp_path)}) == found
    assert find_secret(config(docker_config=str(tmp_path / "config.json")), "registry.example.org", "team/model", {}) == found


def test_a_secret_that_is_named_and_not_there_is_said(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "torn").write_text('{"auths": {"registry.example.org": {"auth": "%%%')
    (tmp_path / "strange").write_text('{"auths": 3, "credsStore": "x/../y"}')
    for settings, complaint in (
        ({"username": "u"}, "has no password; set snapshots.password_file, or"),
        ({"username": "u", "password_file": "nowhere"}, "'nowhere': FileNotFoundError"),
        ({"username": "u", "password_file": str(tmp_path / "empty")}, "first line is empty"),
        ({"docker_config": "nowhere"}, "no such file; `docker login`"),
        ({"docker_config": str(tmp_path / "torn")}, "not docker's config.json"),
        ({"docker_config": str(tmp_path / "strange")}, "not docker's config.json"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            find_secret(config(**settings), "registry.example.org", "team/model", {})
    assert "p" * 9 not in repr(Secret("u", "p" * 9, "p" * 9, "p" * 9))
