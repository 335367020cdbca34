"""The object store on S3, or on a store that speaks its language.

  call            commit point                      a reply that is lost              a kill half-way leaves
  put             the PUT                           the SDK sends the same bytes      nothing
  put_if_absent   the PUT with If-None-Match: *     HEAD: whose nonce stands there?   nothing
  put_file        the PUT; of a large file,         HEAD: whose nonce stands there?   parts that no one lists
                  CompleteMultipartUpload
  get_file        the rename of the whole copy      read anew                         a hidden file beside the copy

The SDK sends a request again when its reply is lost.  A conditional PUT that had landed is then told 412, "the key is taken", by its own
success: so the writer leaves a nonce in the object's metadata, and after any unclear answer looks whose it is.

A multipart upload is invisible until it is completed, and aborted when it fails.  One whose process was killed stays invisible but is
billed: let a lifecycle rule of the bucket abort incomplete uploads after a day.

A slow first PUT may land after the second of the same key: plain `put` is for keys that name their content, or have one writer.
"""

import base64
import hashlib
import io
import ipaddress
import logging
import os
import uuid
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

import boto3
from botocore.config import Config as SdkConfig
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from urllib3.exceptions import HTTPError

from streamlearn.adapters.s3_errors import Place, status_of, translated, unreachable
from streamlearn.contract import durable
from streamlearn.contract.config import StoreConfig
from streamlearn.contract.errors import ConfigError, NotFound, Retryable, StreamlearnError
from streamlearn.contract.object_store import check_key, is_key

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, GetObjectOutputTypeDef, HeadObjectOutputTypeDef

MAX_PARTS = 10_000  # of one upload, S3's limit
MAX_CONNECTIONS = 64  # kept open by one store; the fetcher's packers and the loader's readers share it
CHUNK_BYTES = 2**20
UNCLEAR = 3  # rounds of "unclear answer, and nobody's object there" before put_if_absent gives up
logger = logging.getLogger("streamlearn")


class S3Store:
    """A bucket, or a folder of one.  Credentials come from boto3's own chain, never from the config.  One store serves many threads."""

    def __init__(self, config: StoreConfig):
        self.config = config
        self.place = _place(config)
        self._root = f"{config.prefix}/" if config.prefix else ""
        self._client = _connect(config, self.place)

    def uri(self, key: str) -> str:
        return f"s3://{self.config.bucket}/{self._key(key)}"

    def put(self, key: str, data: bytes) -> None:
        with self._errors("put", key):
            self._client.put_object(Bucket=self.config.bucket, Key=self._key(key), Body=data, ChecksumSHA256=_sha256(data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Raises Retryable where it cannot be known whether `data` was stored."""
        writer, unclear = uuid.uuid4().hex, unreachable(self.place, "put_if_absent", key, "the answers are unclear")
        put = partial(self._client.put_object, Bucket=self.config.bucket, Key=self._key(key), Body=data, ChecksumSHA256=_sha256(data))
        for _ in range(UNCLEAR):
            try:
                with self._errors("put_if_absent", key):
                    put(IfNoneMatch="*", Metadata={"writer": writer})
                return True
            except Retryable as e:  # 412 and 409 too: the key is taken, perhaps by our own PUT whose reply was lost
                unclear = e
            found = self._writer(key)
            if found is not None:  # else it has not landed, or was deleted since
                return found == writer
        raise unclear

    def put_file(self, key: str, path: Path) -> None:
        size = path.stat().st_size
        if size >= 2 * self.config.part_bytes:
            self._put_parts(key, path, size)
            return
        with path.open("rb") as f:
            checksum = base64.b64encode(hashlib.file_digest(f, "sha256").digest()).decode()
            f.seek(0)
            with self._errors("put_file", key):
                self._client.put_object(Bucket=self.config.bucket, Key=self._key(key), Body=f, ChecksumSHA256=checksum)

    def get(self, key: str) -> bytes:
        data = io.BytesIO()
        self._download("get", key, data)
        return data.getvalue()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if start < 0 or length < 0:
            raise ValueError(f"get_range of {key}: start = {start}, length = {length}: neither may be negative")
        if length == 0:  # HTTP has no empty range
            self.size(key)
            return b""
        data = io.BytesIO()
        try:
            self._download("get_range", key, data, span=f"bytes={start}-{start + length - 1}")
        except _BeyondTheEnd:
            return b""
        return data.getvalue()

    def get_file(self, key: str, path: Path) -> None:
        staged = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        try:
            try:
                with staged.open("wb") as f:
                    self._download("get_file", key, f)
                durable.publish(staged, path)
            finally:
                staged.unlink(missing_ok=True)
        except OSError as e:
            raise durable.translate(e, path) from e

    def size(self, key: str) -> int:
        return self._head("size", key)["ContentLength"]

    def modified(self, key: str) -> float:
        return self._head("modified", key)["LastModified"].timestamp()

    def list(self, prefix: str) -> list[str]:
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.config.bucket, Prefix=self._root + prefix)
            found = [entry["Key"].removeprefix(self._root) for page in pages for entry in page.get("Contents", ())]
        return sorted(key for key in found if is_key(key))  # consoles leave "folder/" objects; no store of ours could have put them

    def delete(self, key: str) -> None:
        with suppress(NotFound), self._errors("delete", key):
            self._client.delete_object(Bucket=self.config.bucket, Key=self._key(key))

    def _key(self, key: str) -> str:
        check_key(key)
        return self._root + key

    def _errors(self, operation: str, key: str) -> AbstractContextManager[None]:
        return translated(self.place, operation, key)

    def _head(self, operation: str, key: str) -> "HeadObjectOutputTypeDef":
        try:
            with self._errors(operation, key):
                return self._client.head_object(Bucket=self.config.bucket, Key=self._key(key))
        except NotFound:
            self._look_for_bucket()
            raise

    def _writer(self, key: str) -> str | None:
        """The nonce of whoever wrote the object; empty where `put` did, None where there is no object."""
        with suppress(NotFound), self._errors("head", key):
            return self._client.head_object(Bucket=self.config.bucket, Key=self._key(key))["Metadata"].get("writer", "")
        return None

    def _look_for_bucket(self) -> None:
        """A HEAD's 404 has no body to say what is missing."""
        try:
            with self._errors("head_bucket", ""):
                self._client.head_bucket(Bucket=self.config.bucket)
        except NotFound:
            raise self.place.no_bucket() from None

    def _put_parts(self, key: str, path: Path, size: int) -> None:
        writer = uuid.uuid4().hex
        with self._errors("put_file", key):
            upload = self._client.create_multipart_upload(
                Bucket=self.config.bucket, Key=self._key(key), ChecksumAlgorithm="SHA256", Metadata={"writer": writer}
            )["UploadId"]
        with ExitStack() as failed:
            failed.callback(self._abort, key, upload)
            part_bytes = max(self.config.part_bytes, -(-size // MAX_PARTS))
            parts: list[CompletedPartTypeDef] = []
            with path.open("rb") as f:
                while len(parts) * part_bytes < size:  # no name for the bytes: only one part may be in memory at a time
                    parts.append(self._put_part(key, upload, len(parts) + 1, f.read(part_bytes)))
            try:
                with self._errors("put_file", key):
                    self._client.complete_multipart_upload(
                        Bucket=self.config.bucket, Key=self._key(key), UploadId=upload, MultipartUpload={"Parts": parts}
                    )
            except Retryable:  # NoSuchUpload too: what a second try is told after the first one's reply was lost
                if self._writer(key) != writer:
                    raise
            failed.pop_all()

    def _put_part(self, key: str, upload: str, number: int, data: bytes) -> "CompletedPartTypeDef":
        checksum = _sha256(data)
        with self._errors("put_file", key):
            answer = self._client.upload_part(
                Bucket=self.config.bucket, Key=self._key(key), UploadId=upload, PartNumber=number, Body=data, ChecksumSHA256=checksum
            )
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

    def _abort(self, key: str, upload: str) -> None:
        try:
            with self._errors("abort", key):
                self._client.abort_multipart_upload(Bucket=self.config.bucket, Key=self._key(key), UploadId=upload)
        except StreamlearnError as e:  # the failure that brought us here is the one to raise
            logger.warning("parts of an upload stay behind, invisible, until a lifecycle rule of the bucket removes them: %s", e)

    def _download(self, operation: str, key: str, into: BinaryIO, *, span: str = "") -> None:
        """Write the object, or `span` of it, into `into`: all of it, or raises Retryable.  The SDK's own tries end with the header."""
        get = partial(self._client.get_object, Bucket=self.config.bucket, Key=self._key(key))
        why: _Cut | None = None
        for _ in range(self.config.attempts):
            with self._errors(operation, key):
                try:
                    answer = get(Range=span) if span else get()
                except ClientError as e:
                    if status_of(e) == 416:
                        raise _BeyondTheEnd from e
                    raise
            if span and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise ConfigError(f"{self.place}: {self.place.endpoint} sends whole objects when asked for a range; it is no S3 store")
            try:
                return _copy(answer, into)
            except _Cut as e:
                why = e
                into.seek(0)
                into.truncate()
        raise unreachable(self.place, operation, key, why) from why


class _Cut(Exception):
    """The body ended before its announced length."""


class _BeyondTheEnd(Exception):
    """The range starts where the object has ended."""


def _copy(answer: "GetObjectOutputTypeDef", into: BinaryIO) -> None:
    received, announced = 0, answer.get("ContentLength")
    with closing(answer["Body"]) as body:
        try:
            while chunk := body.read(CHUNK_BYTES):
                into.write(chunk)
                received += len(chunk)
        except (BotoCoreError, HTTPError) as e:
            raise _Cut(f"the answer broke off after {received} of {announced} bytes: {e}") from e
    if received != announced:  # S3 always announces; without it (a proxy in between) a cut would look like the end
        raise _Cut(f"{received} bytes came, {announced} were announced")


def _sha256(data: bytes) -> str:
    """As S3 wants it, base64."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _connect(config: StoreConfig, place: Place) -> "S3Client":
    if config.ca_bundle and not Path(config.ca_bundle).is_file():
        raise ConfigError(f"store.ca_bundle = {config.ca_bundle!r}: no such file; name a PEM file of CA certificates")
    options = SdkConfig(
        connect_timeout=config.connect_timeout_s,
        read_timeout=config.read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": config.attempts},
        max_pool_connections=MAX_CONNECTIONS,
        s3={"addressing_style": "path" if config.path_style else "auto"},
        # the default, when_supported, adds a CRC as a trailer that many S3-compatible stores refuse; our SHA-256 says more
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.session.Session().client(  # a session of our own: the default one is not safe to share between threads
            "s3",
            endpoint_url=config.endpoint_url or None,
            region_name=config.region,
            verify=config.ca_bundle or None,
            config=options,
        )
    except (ValueError, BotoCoreError) as e:
        raise ConfigError(f"{place}: {e}; check store.endpoint_url and store.region, and the AWS profile") from e


def delta_options(config: StoreConfig) -> dict[str, str]:
    """What delta-rs must be told to keep a table in the same bucket.  Holds secrets: not for logs.  Raises ConfigError.

    delta-rs reads the environment and instance roles by itself, and must where keys expire; what lies in files it does not know
    the way boto3 does, so fixed keys are handed over.
    """
    if config.ca_bundle and not (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
        raise ConfigError(
            f"store.ca_bundle = {config.ca_bundle!r}: the catalog's library takes CAs from the environment only; set SSL_CERT_FILE to "
            "a file that holds these and the system's (the fetcher reads it too)"
        )
    url = urlsplit(config.endpoint_url)
    virtual = not config.path_style and "." not in config.bucket and not _is_address(url.hostname)
    options = {
        "AWS_REGION": config.region,
        "AWS_CONDITIONAL_PUT": "etag",  # the log's entries are created with If-None-Match; no lock table is needed
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": str(virtual).lower(),
        "connect_timeout": f"{config.connect_timeout_s}s",
        "max_retries": str(config.attempts - 1),
    }
    if url.hostname:
        # for delta-rs, unlike the SDK, the endpoint of a virtual host has the bucket in its name
        options["AWS_ENDPOINT_URL"] = url._replace(netloc=f"{config.bucket}.{url.netloc}").geturl() if virtual else config.endpoint_url
        options["AWS_ALLOW_HTTP"] = str(url.scheme == "http").lower()
    return options | _fixed_credentials(_place(config))


def _fixed_credentials(place: Place) -> dict[str, str]:
    with translated(place, "credentials", ""):
        found = boto3.session.Session().get_credentials()
        if found is None:
            raise NoCredentialsError
        if isinstance(found, RefreshableCredentials):
            return {}
        keys = found.get_frozen_credentials()
    named = {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key, "AWS_SESSION_TOKEN": keys.token}
    return {name: value for name, value in named.items() if value}


def _place(config: StoreConfig) -> Place:
    return Place(config.bucket, config.prefix, config.endpoint_url or f"AWS {config.region}")


def _is_address(host: str | None) -> bool:
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True
