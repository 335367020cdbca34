"""Where snapshots are published: the `[snapshots]` section of the configuration."""

import re
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from streamlearn.contract.section import Section

REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")  # distribution-spec
SCHEME = "oci://"


class SnapshotsConfig(Section):
    """The registry of snapshots: a folder of the home, or any OCI registry.  Its password comes from a file, from the environment variable
    STREAMLEARN_REGISTRY_PASSWORD or from docker's config.json, never from here."""

    registry: str = ""  # oci://host[:port]/repository; empty: `registry` in the home, an OCI image layout
    username: str = ""  # empty: docker's config.json is asked, and then no one
    password_file: str = ""  # its first line; empty: the environment variable
    docker_config: str = ""  # docker's config.json; empty: where docker itself looks
    plain_http: bool = False  # without TLS: for a registry on this machine
    ca_bundle: str = ""  # file of CA certificates (PEM) that sign the registry's; empty: the system's
    mount_from: tuple[str, ...] = ()  # repositories of the same registry that may have a blob already
    chunk_bytes: int = Field(default=16 * 2**20, ge=2**16)  # of an upload that can be resumed; smaller blobs go in one request
    attempts: int = Field(default=5, ge=1)  # tries of one request, with growing pauses, before the role backs off
    max_pause_s: float = Field(default=30.0, gt=0)  # between tries; a registry that asks for more is left to the role's own waiting
    connect_timeout_s: float = Field(default=10.0, gt=0)  # until the socket is open
    read_timeout_s: float = Field(default=60.0, gt=0)  # between two bytes of an answer

    @field_validator("registry")
    @classmethod
    def _address(cls, value: str) -> str:
        if value:
            split(value)
        return value

    @field_validator("mount_from")
    @classmethod
    def _repositories(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not REPOSITORY.fullmatch(name):
                raise ValueError(f"{name!r} is no repository's name; write it as in oci://host/NAME, without the host")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.password_file and not self.username:
            raise ValueError(f"password_file = {self.password_file!r} needs snapshots.username")
        return self


def split(url: str) -> tuple[str, str]:
    """(host[:port], repository) of oci://host[:port]/repository.  Raises ValueError saying what is wrong."""
    parts = urlsplit(url)
    if not url.startswith(SCHEME) or not parts.hostname or not parts.path.strip("/"):
        raise ValueError("write oci://host[:port]/repository, e.g. oci://registry.example.org/team/model")
    if "@" in parts.netloc:
        raise ValueError("no user or password in the address; see snapshots.username, snapshots.password_file and snapshots.docker_config")
    if parts.port == 0 or parts.query or parts.fragment:
        raise ValueError("write oci://host[:port]/repository, and nothing behind it")
    repository = parts.path.strip("/")
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no repository's name: small letters and digits, parted by '/', '.', '_' or '-'; no tag here")
    return parts.netloc, repository
