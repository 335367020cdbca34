"""TLS with a CA of one's own, and what delta-rs must be told to reach the same bucket."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from botocore.credentials import RefreshableCredentials

from streamlearn.adapters.s3_store import S3Store, delta_options
from streamlearn.contract.errors import ConfigError
from tests.adapters.tls import authority_and_certificate
from tests.contract.test_catalog import advance, on_s3, row


@pytest.fixture
def https(bucket, tmp_path):
    """(a proxy that speaks TLS, the file of the CA that vouches for it)."""
    authority, server = authority_and_certificate()
    (tmp_path / "ca.pem").write_bytes(authority)
    (tmp_path / "server.pem").write_bytes(server)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "server.pem")
    with bucket.behind_faults(tls=tls) as proxy:
        yield proxy, tmp_path / "ca.pem"


def test_an_endpoint_is_trusted_by_its_own_ca_and_no_other(bucket, https):
    proxy, ca = https
    S3Store(bucket.config(endpoint_url=proxy.url, ca_bundle=str(ca))).put("k", b"1")
    assert S3Store(bucket.config()).get("k") == b"1"
    with pytest.raises(ConfigError, match=f"certificate of {proxy.url} is not trusted; set store.ca_bundle"):
        S3Store(bucket.config(endpoint_url=proxy.url, attempts=1)).get("k")


def test_delta_rs_takes_the_ca_from_the_environment(bucket, https, monkeypatch):
    proxy, ca = https
    config = bucket.config(endpoint_url=proxy.url, ca_bundle=str(ca))
    with pytest.raises(ConfigError, match="set SSL_CERT_FILE"):
        delta_options(config)
    monkeypatch.setenv("SSL_CERT_FILE", str(ca))
    catalog = on_s3(config).catalog()
    catalog.commit([row(0, 5)], [advance(0, 5)])
    assert len(catalog.rows()) == 1 and proxy.seen


def test_delta_rs_is_told_what_the_store_knows(bucket, monkeypatch):
    found = delta_options(bucket.config())
    assert (found["AWS_ENDPOINT_URL"], found["AWS_ALLOW_HTTP"], found["AWS_CONDITIONAL_PUT"]) == (bucket.url, "true", "etag")
    assert (found["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"], found["AWS_ACCESS_KEY_ID"]) == ("false", "testing")
    assert "AWS_SESSION_TOKEN" not in found and all(isinstance(value, str) for value in found.values())
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    hosted = delta_options(bucket.config(endpoint_url="https://objects.example:9000", path_style=False))
    assert (hosted["AWS_ENDPOINT_URL"], hosted["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"]) == (
        f"https://{bucket.name}.objects.example:9000",
        "true",
    )
    assert (hosted["AWS_ALLOW_HTTP"], hosted["AWS_SESSION_TOKEN"]) == ("false", "token")
    aws = delta_options(bucket.config(endpoint_url="", path_style=False, region="eu-north-1"))
    assert "AWS_ENDPOINT_URL" not in aws and (aws["AWS_REGION"], aws["AWS_VIRTUAL_HOSTED_STYLE_REQUEST"]) == ("eu-north-1", "true")


def test_keys_that_expire_are_left_to_delta_rs_to_renew(bucket, monkeypatch):
    later = datetime.now(UTC) + timedelta(hours=1)
    expiring = RefreshableCredentials("key", "secret", "token", later, lambda: {}, "iam-role")
    monkeypatch.setattr("boto3.session.Session.get_credentials", lambda _: expiring)
    assert not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} & delta_options(bucket.config()).keys()
