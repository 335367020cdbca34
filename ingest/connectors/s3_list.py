"""The images of a bucket, by listing a prefix again and again.

Listing goes in passes, from the first key to the last.  A pass tells what was changed after the last pass's `until` and not after its own,
which is the store's own clock at its first page, less `settle_s`.  So every version of an object falls into exactly one pass, wherever
its key sorts: none is missed because it came before the marker, and none is told by two passes.  One that is changed is announced again, with
its new ETag.  LastModified has whole seconds, and a multipart upload carries the time at which it was begun: `settle_s` covers both.

The cursor: the pass's `since` and `until`, the last key told of it, and when the next pass begins: under 4 KiB.

A candidate's URL is public: the endpoint's, or `public_url`.  Presigned URLs are not made: they differ with every listing, so the same object
would be announced again and again, and they expire before a full queue has been fetched.
"""

import logging
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import boto3
from botocore import UNSIGNED
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import Field

from ingest.connectors.base import BATCH, Cursor, Found
from ingest.connectors.offer import IMAGE_EXTENSIONS, offer, refuse
from ingest.fetch.guard import complaint
from streamlearn.contract.config import Section
from streamlearn.contract.errors import ConfigError, Retryable

logger = logging.getLogger(__name__)
LOOK_S = 5.0  # of one `discover`: the next one goes on behind its last key


class S3Options(Section):
    bucket: str = Field(min_length=1)  # whose objects are public, or made so by public_url
    prefix: str = ""  # of the keys that are listed
    endpoint_url: str = ""  # empty: AWS
    region: str = "us-east-1"  # of the bucket
    path_style: bool = False  # bucket in the path, not in the host's name: most stores but AWS
    anonymous: bool = False  # list without credentials; else they come from where the AWS SDK looks for them
    suffixes: tuple[str, ...] = IMAGE_EXTENSIONS  # of keys, in lower case; none: every key
    public_url: str = ""  # template with {key}, such as https://cdn.example.org/{key}; empty: the endpoint's own address of the object
    rescan_s: float = Field(default=300.0, ge=0)  # from one pass's begin to the next one's; 0: one pass, and no more
    settle_s: float = Field(default=60.0, ge=1)  # what is younger waits for the next pass; over the longest multipart upload
    timeout_s: float = Field(default=5.0, gt=0, le=60)  # for a connection, and for each read


class S3Connector:
    Options = S3Options

    def __init__(self, name: str, options: S3Options):
        self.name, self.options = name, options
        self._client: Any = None

    def check(self) -> None:
        if self.options.endpoint_url and (why := complaint(self.options.endpoint_url)):
            raise ConfigError(
                f"connector {self.name}: endpoint_url = {self.options.endpoint_url!r}: {why}; name an http or https URL, or leave it empty"
            )
        template = self.options.public_url
        if template and (template.count("{key}") != 1 or (complaint(template))):
            raise ConfigError(f"connector {self.name}: public_url = {template!r}: an http or https URL with one {{key}} in it is needed")
        bad = next((s for s in self.options.suffixes if s != s.lower() or not s), None)
        if bad is not None:
            raise ConfigError(f"connector {self.name}: suffixes = {bad!r}: write it in lower case; both are found")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def discover(self, cursor: Cursor | None) -> Iterator[Found]:
        state = dict(cursor or {"since": None, "until": None, "after": "", "next": 0.0})
        if state["until"] is None and state["since"] is not None:  # between two passes
            wait_s = min(state["next"] - time.time(), self.options.rescan_s)  # whatever a wrong clock has recorded
            if wait_s > 0 or not self.options.rescan_s:
                return
        begun = time.monotonic()
        while time.monotonic() - begun < LOOK_S:
            page, date = self._page(state["after"])
            if state["until"] is None:
                state |= {"until": date - self.options.settle_s, "next": time.time() + self.options.rescan_s}
            objects = page.get("Contents", [])
            for start in range(0, len(objects), BATCH):
                found = Found()
                for entry in objects[start : start + BATCH]:
                    self._take(entry, state, found)
                    state["after"] = entry["Key"]
                found.cursor = dict(state)
                if len(found):
                    yield found
            if not page.get("IsTruncated") or not objects:
                ends = {
                    "since": state["until"],
                    "until": None,
                    "after": "",
                    "next": state["next"] if self.options.rescan_s else float(2**53),
                }
                yield Found(cursor=ends)
                return
        yield Found(cursor=dict(state))  # pages without an image are not listed again either

    def _take(self, entry: dict[str, Any], state: dict[str, Any], found: Found) -> None:
        key, changed = str(entry["Key"]), entry["LastModified"].timestamp()
        if changed > state["until"] or (state["since"] is not None and changed <= state["since"]):
            return None
        if key.endswith("/") or (self.options.suffixes and not key.lower().endswith(self.options.suffixes)):
            return None
        if any(part in (".", "..") for part in key.split("/")):  # every client would take such a path for another one
            return refuse(found, key, key, "a key with . or .. between slashes has no URL")
        return offer(found, self.name, self._url(key), key, etag=str(entry.get("ETag", ""))[:100] or None)

    def _url(self, key: str) -> str:
        quoted = quote(key, safe="/~")
        if self.options.public_url:
            return self.options.public_url.replace("{key}", quoted)
        endpoint = (self.options.endpoint_url or f"https://s3.{self.options.region}.amazonaws.com").rstrip("/")
        if self.options.path_style:
            return f"{endpoint}/{self.options.bucket}/{quoted}"
        scheme, _, host = endpoint.partition("://")
        return f"{scheme}://{self.options.bucket}.{host}/{quoted}"

    def _page(self, after: str) -> tuple[dict[str, Any], float]:
        """A thousand keys behind `after`, and the store's clock (unix seconds).  Raises Retryable."""
        more = {"StartAfter": after} if after else {}
        try:
            page = self._connected().list_objects_v2(Bucket=self.options.bucket, Prefix=self.options.prefix, **more)
            date = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        except (BotoCoreError, ClientError) as e:
            raise Retryable(f"bucket {self.options.bucket}: cannot be listed: {e}", after_s=10.0) from e
        except (KeyError, TypeError, ValueError) as e:
            raise Retryable(f"bucket {self.options.bucket}: the answer has no date: {e!r}", after_s=10.0) from e
        return page, date.timestamp()

    def _connected(self) -> Any:
        if self._client is None:
            timeout = self.options.timeout_s
            self._client = boto3.session.Session().client(  # a session of our own: the default one is not safe to share between threads
                "s3",
                endpoint_url=self.options.endpoint_url or None,
                region_name=self.options.region,
                config=BotoConfig(
                    connect_timeout=timeout,
                    read_timeout=timeout,
                    retries={"total_max_attempts": 1},
                    s3={"addressing_style": "path" if self.options.path_style else "virtual"},
                    **({"signature_version": UNSIGNED} if self.options.anonymous else {}),
                ),
            )
        return self._client
