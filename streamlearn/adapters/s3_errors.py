"""What S3 and its SDK can answer, in the house's own errors.

* NotFound      the key is not there
* ConfigError   the bucket, the credentials, the region, the certificate or the store itself: trying again cannot help
* StoreFull     a quota or a disk behind an S3-compatible store
* Retryable     the store is busy, unreachable or answered half; the SDK's own tries are used up
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConfigParseError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from botocore.parsers import ResponseParserError

from streamlearn.contract.errors import ConfigError, NotFound, Retryable, StoreFull, StreamlearnError

BACK_OFF_S = 5.0  # the SDK has tried for some seconds already
_FULL = {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "EntityQuotaExceeded"}  # Ceph, MinIO
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired", "InvalidSecurity"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "307"}
# 4xx that speak of this transfer, not of the set-up: bytes damaged or late on the way, an upload that ended elsewhere
_PASSING = {
    "BadDigest",
    "IncompleteBody",
    "NoSuchUpload",
    "RequestTimeout",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
_UNREACHABLE = (
    ConnectionError,  # botocore's own
    HTTPClientError,
    IncompleteReadError,
    ResponseParserError,  # half an answer, or a proxy's page of HTML
    CredentialRetrievalError,  # the machine's role could not be asked
    MetadataRetrievalError,
)
_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile (AWS_PROFILE) or an instance role"


@dataclass(frozen=True)
class Place:
    """What every message names."""

    bucket: str
    prefix: str
    endpoint: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def no_bucket(self) -> ConfigError:
        return ConfigError(f"{self}: no bucket {self.bucket} at {self.endpoint}; create it, or set store.bucket and store.endpoint_url")


@contextmanager
def translated(place: Place, operation: str, key: str) -> Iterator[None]:
    """Nothing of botocore's leaves this block.  Raises NotFound, ConfigError, StoreFull, Retryable."""
    try:
        yield
    except ClientError as e:
        raise _of_answer(e, place, operation, key) from e
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound, ConfigParseError) as e:
        raise ConfigError(f"{place}: no credentials for {place.endpoint} ({e}); {_KEYS}") from e
    except SSLError as e:
        if "CERTIFICATE_VERIFY_FAILED" in str(e):
            raise ConfigError(f"{place}: the certificate of {place.endpoint} is not trusted; set store.ca_bundle to its CA's file") from e
        raise unreachable(place, operation, key, e) from e
    except _UNREACHABLE as e:
        raise unreachable(place, operation, key, e) from e
    except BotoCoreError as e:  # the SDK refuses to send it: a bucket or region that cannot be
        raise ConfigError(f"{place}: {operation} {key}: {e}; check store.bucket, store.region and store.endpoint_url") from e


def unreachable(place: Place, operation: str, key: str, why: object) -> Retryable:
    return Retryable(f"{place}: {operation} of {key} at {place.endpoint} failed: {why}", after_s=BACK_OFF_S, on="store")


def status_of(e: ClientError) -> int:
    return int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _of_answer(e: ClientError, place: Place, operation: str, key: str) -> StreamlearnError:
    code, status = str(e.response.get("Error", {}).get("Code", "")), status_of(e)
    what = f"{place}: {operation} of {key} at {place.endpoint}: {code} ({status})"
    if code in _FULL or status == 507:
        return StoreFull(f"{what}; free some space or raise the quota, the work goes on by itself", after_s=BACK_OFF_S, on="store")
    if code == "NoSuchBucket":
        return place.no_bucket()
    if code in _PASSING or (status >= 500 and status != 501) or status in (409, 412, 429):
        return Retryable(what, after_s=_retry_after_s(e), on="store")
    if status == 404:
        return NotFound(f"{place}: no object {key}")
    if code in _CREDENTIALS or status == 401:
        return ConfigError(f"{what}: {place.endpoint} refuses the credentials; {_KEYS}")
    if code == "RequestTimeTooSkewed":
        return ConfigError(f"{what}: this machine's clock is wrong; set it")
    if code in _REGION:
        return ConfigError(f"{what}: bucket {place.bucket} lies in another region; set store.region")
    if status == 403:
        allow = "s3:ListBucket on the bucket, s3:GetObject, s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload on its objects"
        return ConfigError(f"{what}: not allowed in bucket {place.bucket}; allow {allow}")
    return ConfigError(f"{what}: {e.response.get('Error', {}).get('Message', '')}; the store refuses what S3 offers, see its documentation")


def _retry_after_s(e: ClientError) -> float:
    said = str(e.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", ""))
    return float(said) if said.isdigit() else BACK_OFF_S
