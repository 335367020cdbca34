"""Any registry that speaks OCI Distribution (v1.1), as the seam wants it.

  call            commit point                     a reply that is lost              a kill half-way leaves
  put_blob/file   the PUT with the digest          HEAD: is it there?                an upload no one sees, and a note to go on from
  put_manifest    the PUT of the manifest          the same PUT again                nothing; with a subject and no referrers API,
                                                                                     a referrer not listed until it is put again
  tag             the PUT under the tag            the same PUT again                nothing
  copy_blob       the rename of the whole copy     a Range from where it broke off   a part in the spool that the next pull goes on from

Whatever is read is checked against its digest before anyone sees it; whatever is written is checked by the registry against the digest that
we name, and looked for afterwards.

What the protocol cannot do: compare-and-set.  `expect` is looked at before the tag is put, the PUT carries If-Match or If-None-Match for
the registries that heed them (few do: distribution and most others move the tag all the same), and the tag is looked at again afterwards.
So of two writers who move one tag within the same moment both may be told that they did, and the later one's stands.  Tags that many
processes move want one mover, or a registry that makes version tags immutable by its own rules.

Referrers: by the registry's API (OCI 1.1); where it has none, by the index under the tag sha256-<hex of the subject> (referrers tag schema),
which has no compare-and-set either: it is read, put, and read again until ours is in it, but two who add at once can lose one's entry;
putting the same manifest again lists it again.  Those tags are not among `names`.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

from streamlearn.adapters.oci_auth import find_secret
from streamlearn.adapters.oci_download import Download
from streamlearn.adapters.oci_spool import Spool
from streamlearn.adapters.oci_upload import Upload
from streamlearn.adapters.oci_wire import REDIRECTS, Reply, Wire
from streamlearn.contract.config_snapshots import SnapshotsConfig, split
from streamlearn.contract.errors import ConfigError, Conflict, Corrupt, NotFound, Retryable
from streamlearn.contract.oci import (
    DIGEST,
    EMPTY,
    INDEX,
    MANIFEST,
    TAG,
    Descriptor,
    canonical,
    check_tag,
    describe,
    digest_of,
    known_tags,
    parse_manifest,
    parts,
    referring,
)
from streamlearn.contract.registry import ANY

ACCEPT = (
    f"{MANIFEST}, {INDEX}, application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json"
)
FALLBACK = re.compile(r"sha256-[0-9a-f]{64}")  # the referrers tag schema's
NEXT = re.compile(r'<([^>]+)>\s*;.*?rel="?next"?', re.IGNORECASE)
LISTING_ROUNDS = 5  # in which our referrer must have come into the fallback index


class OciRegistry:
    """One repository of a registry.  `spool`: a folder for what is under way."""

    def __init__(self, config: SnapshotsConfig, spool: Path, *, wire: Wire | None = None):
        host, self.repository = split(config.registry)
        self.config, self.spool = config, Spool(spool)
        self.wire = wire or Wire(config, host, find_secret(config, host, self.repository))
        self.api = f"{self.wire.origin}/v2/{self.repository}"
        self._pull = frozenset({f"repository:{self.repository}:pull"})
        self._push = frozenset({f"repository:{self.repository}:pull,push"})
        self._referrers_api = True  # until it says it has none

    # --- blobs ---

    def put_blob(self, data: bytes, media_type: str) -> Descriptor:
        self._put(digest_of(data), len(data), data)
        return Descriptor(media_type, digest_of(data), len(data))

    def put_file(self, path: Path, media_type: str) -> Descriptor:
        with path.open("rb") as f:
            digest = "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()
            size = f.tell()
        self._put(digest, size, path)
        return Descriptor(media_type, digest, size)

    def has_blob(self, digest: str) -> bool:
        try:
            self._head(self._blob(digest))
        except NotFound:
            return False
        return True

    def read_blob(self, digest: str) -> bytes:
        data = io.BytesIO()
        self._download(digest).into(data)
        return data.getvalue()

    def check_blob(self, digest: str) -> int:
        with Path("/dev/null").open("wb") as nowhere:
            return self._download(digest).into(nowhere)

    def copy_blob(self, digest: str, path: Path) -> None:
        self._download(digest).to_file(path, self.spool)

    def may_push(self) -> None:
        """Begins an upload and cancels it; nothing stays.  Raises ConfigError where it is not allowed."""
        begun = self.wire.ask("POST", f"{self.api}/blobs/uploads/", self._push, body=b"", good=(202,))
        with suppress(NotFound, ConfigError):  # a registry that cannot cancel forgets it after a while
            self.wire.ask("DELETE", begun.location(), self._push, good=(200, 202, 204))

    # --- manifests and tags ---

    def put_manifest(self, manifest: Mapping[str, Any] | bytes, *, tag: str = "", expect: str = ANY) -> Descriptor:
        data = manifest if isinstance(manifest, bytes) else canonical(manifest)
        known, parsed = describe(data, f"{self.api}: the manifest to put")
        subject = (parsed.get("subject") or {}).get("digest", "")
        if subject or not tag:
            reply = self._put_manifest(known.digest, known, data)
            if subject and reply.headers.get("OCI-Subject") != subject:
                self._list_referrer(subject, known)
        if tag:
            self._move(tag, known, data, expect)
        return known

    def tag(self, digest: str, tag: str, *, expect: str = ANY) -> None:
        check_tag(tag)
        known, data = self.read_manifest(digest)
        self._move(tag, known, data, expect)

    def untag(self, tag: str, *, expect: str = ANY) -> None:
        check_tag(tag)
        held = self._expected(tag, expect)
        if not held:
            return
        scopes = frozenset({f"repository:{self.repository}:delete,pull"})
        try:
            self.wire.ask("DELETE", f"{self.api}/manifests/{tag}", scopes, good=(202, 200, 204))
        except NotFound:
            return
        except (ConfigError, Corrupt) as e:  # by the digest it would take all the other tags of the snapshot with it
            raise ConfigError(f"{e}; this registry takes no tag away alone: leave it, or let the registry's own retention do it") from e

    def names(self) -> list[str]:
        found: list[str] = []
        for reply in self._pages(f"{self.api}/tags/list?n=1000"):
            found += parse_manifest(reply.body, reply.url).get("tags") or []
        return sorted(name for name in set(found) if not FALLBACK.fullmatch(name))

    def find(self, tag: str) -> Descriptor | None:
        if not TAG.fullmatch(tag):
            return None
        try:
            reply = self._head(f"{self.api}/manifests/{tag}")
        except NotFound:
            return None
        digest, size = reply.headers.get("Docker-Content-Digest", ""), reply.headers.get("Content-Length", "")
        if DIGEST.fullmatch(digest) and size.isdigit():
            return Descriptor(reply.headers.get("Content-Type", MANIFEST).split(";")[0], digest, int(size))
        try:
            return self.read_manifest(tag)[0]  # a registry that does not say
        except NotFound:
            return None

    def tags(self) -> dict[str, Descriptor]:
        found = {name: self.find(name) for name in self.names()}
        return {name: known for name, known in found.items() if known}

    def read_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        by_digest = reference.startswith("sha256:")
        if by_digest:
            self._blob(reference)  # NotFound where it is no digest
        elif not TAG.fullmatch(reference):
            raise NotFound(self._no_tag(reference))
        try:
            reply = self.wire.ask("GET", f"{self.api}/manifests/{reference}", self._pull, headers={"Accept": ACCEPT})
        except NotFound as e:
            raise NotFound(f"{self.api}: no manifest {reference}" if by_digest else self._no_tag(reference)) from e
        want = reference if by_digest else reply.headers.get("Docker-Content-Digest", "")
        if want.startswith("sha256:") and digest_of(reply.body) != want:
            raise Corrupt(f"{reply.url}: {len(reply.body)} bytes with another digest than {want}: damaged; push it again")
        return describe(reply.body, reply.url)[0], reply.body

    def manifest(self, reference: str) -> tuple[Descriptor, dict[str, Any]]:
        known, data = self.read_manifest(reference)
        return known, parse_manifest(data, f"{self.api}: {reference}")

    # --- referrers ---

    def referrers(self, digest: str, artifact_type: str = "") -> list[Descriptor]:
        listed = [Descriptor.from_json(raw) for raw in self._referring(digest)]
        return [known for known in listed if artifact_type in ("", known.artifact_type)]

    def attach(self, subject: Descriptor, artifact_type: str, payload: bytes, annotations: Mapping[str, str]) -> Descriptor:
        config, layer = self.put_blob(b"{}", EMPTY), self.put_blob(payload, "application/json")
        return self.put_manifest(referring(subject, artifact_type, config, layer, annotations))

    def _referring(self, digest: str) -> list[dict[str, Any]]:
        self._blob(digest)
        if self._referrers_api:
            try:
                pages = self._pages(f"{self.api}/referrers/{digest}")
                return [raw for reply in pages for raw in parse_manifest(reply.body, reply.url).get("manifests") or []]
            except (NotFound, ConfigError) as e:
                if not isinstance(e, NotFound) and not any(f"status {s}" in str(e) for s in (400, 405, 501)):
                    raise
                self._referrers_api = False
        return self._fallback(digest)

    def _fallback(self, subject: str) -> list[dict[str, Any]]:
        try:
            listed: list[dict[str, Any]] = self.manifest(subject.replace(":", "-"))[1].get("manifests") or []
        except NotFound:
            return []
        return listed

    def _list_referrer(self, subject: str, known: Descriptor) -> None:
        """Into the fallback index.  Entries whose manifest is gone are left out: registries refuse an index that names them."""
        tag = subject.replace(":", "-")
        for _ in range(LISTING_ROUNDS):
            listed = self._fallback(subject)
            if any(raw["digest"] == known.digest for raw in listed):
                return
            kept = [raw for raw in listed if self._is_there(raw["digest"])]
            index = canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": [*kept, known.to_json()]})
            self._put_manifest(tag, Descriptor(INDEX, digest_of(index), len(index)), index)
        raise Retryable(f"{self.api}: others write the referrers of {subject} all the time; {known.digest} is not listed yet", after_s=2.0)

    def _is_there(self, digest: str) -> bool:
        try:
            self._head(f"{self.api}/manifests/{digest}")
        except NotFound:
            return False
        return True

    # --- its own ---

    def _head(self, url: str) -> Reply:
        """A redirect says that it is there; to where it leads, only a GET may be allowed."""
        return self.wire.ask("HEAD", url, self._pull, headers={"Accept": ACCEPT}, good=(200, *REDIRECTS))

    def _blob(self, digest: str) -> str:
        if not DIGEST.fullmatch(digest):
            raise NotFound(f"{digest!r}: not a sha256 digest")
        return f"{self.api}/blobs/{digest}"

    def _download(self, digest: str) -> Download:
        return Download(self.wire, self._blob(digest), self._pull, digest)

    def _put(self, digest: str, size: int, content: bytes | Path) -> None:
        upload = Upload(self.wire, self.api, self._push, self.spool, (digest, size), content)
        if not upload.present() and not any(self._mounted(digest, name) for name in self.config.mount_from):
            upload.run()

    def _mounted(self, digest: str, name: str) -> bool:
        """Taken over from another repository, if it has it.  Registries that cannot open an upload instead, which is left to its end."""
        scopes = self._push | {f"repository:{name}:pull"}
        url = f"{self.api}/blobs/uploads/?mount={quote(digest, safe='')}&from={quote(name, safe='')}"
        try:
            return self.wire.ask("POST", url, scopes, body=b"", good=(201, 202)).status == 201
        except (NotFound, ConfigError):
            return False  # not for us to read: then it is sent

    def _put_manifest(self, reference: str, known: Descriptor, data: bytes, extra: Mapping[str, str] | None = None) -> Reply:
        headers = {"Content-Type": known.media_type, **(extra or {})}
        url = f"{self.api}/manifests/{reference}"
        try:
            reply = self.wire.ask("PUT", url, self._push, body=data, headers=headers, good=(201, 200, 202))
        except NotFound:
            for digest in parts(parse_manifest(data, url)):
                if known.media_type == MANIFEST and not self.has_blob(digest):
                    raise NotFound(f"{self.api}: the manifest names blob {digest}, which is not there; push it first") from None
            raise
        told = reply.headers.get("Docker-Content-Digest", known.digest)
        if told.startswith("sha256:") and told != known.digest:
            raise Corrupt(f"{reply.url}: the registry has made {told} of the manifest {known.digest}")
        return reply

    def _move(self, tag: str, known: Descriptor, data: bytes, expect: str) -> None:
        check_tag(tag)
        held = self._expected(tag, expect)
        if held == known.digest:
            return
        guard = {} if expect == ANY else {"If-Match": f'"{held}"'} if held else {"If-None-Match": "*"}
        try:
            self._put_manifest(tag, known, data, guard)
        except Conflict as e:
            raise Conflict(f"{self.api}: tag {tag}: someone else moved it, or it may not be moved: {e}") from e
        found = self.find(tag)
        if expect != ANY and (found is None or found.digest != known.digest):
            raise Conflict(
                f"{self.api}: tag {tag} points to {found.digest if found else 'nothing'}: someone else moved it at the same time"
            )

    def _expected(self, tag: str, expect: str) -> str:
        found = self.find(tag)
        held = found.digest if found else ""
        if expect not in (ANY, held):
            raise Conflict(f"{self.api}: tag {tag} points to {held or 'nothing'}, not {expect or 'nothing'}: someone else moved it")
        return held

    def _no_tag(self, tag: str) -> str:
        return f"{self.api}: no tag {tag!r}; {known_tags(self.names())}"

    def _pages(self, url: str) -> list[Reply]:
        """All of a list.  An empty repository may be none at all: NotFound is no tags."""
        found: list[Reply] = []
        asked: set[str] = set()
        while url and url not in asked:  # one that leads round and round ends
            asked.add(url)
            try:
                reply = self.wire.ask("GET", url, self._pull)
            except NotFound:
                if "/tags/list" in url:
                    return found
                raise
            found.append(reply)
            following = NEXT.search(reply.headers.get("Link", ""))
            url = urljoin(url, following[1]) if following else ""
        return found
