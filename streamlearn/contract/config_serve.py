"""Who may pull the embedded registry, and where: the `[serve]` section of the configuration."""

import ipaddress
import re
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from streamlearn.contract.config_snapshots import REPOSITORY
from streamlearn.contract.section import Section

TAKEN = ("v2", "api", "snapshots")  # first parts of paths that mean something else
HOST = re.compile(r"[A-Za-z0-9.-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")


class ServeConfig(Section):
    """The role that lets others pull the embedded registry (docs/serve.md).  Its tokens stand in a file, never here."""

    enabled: bool = False  # `up` starts it too
    address: str = "127.0.0.1"  # to listen on; any but a loopback address needs tokens_file, or public
    port: int = Field(default=5640, ge=0, le=65535)  # 0: any free one
    repository: str = ""  # its name for clients, such as team/model; empty: train.name
    url: str = ""  # as others reach it, behind a proxy, such as https://models.example.org; empty: as the request names it
    tokens_file: str = ""  # a name and its token a line; empty: nobody is asked
    public: bool = False  # anybody who reaches it may pull

    @field_validator("repository")
    @classmethod
    def _name(cls, value: str) -> str:
        if value:
            check_repository(value)
        return value

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if value and (
            parts.scheme not in ("http", "https") or not HOST.fullmatch(parts.netloc) or parts.path or parts.query or parts.fragment
        ):
            raise ValueError(f"{value!r}: write https://host[:port], and nothing behind it: clients want the server at the root of a host")
        return value

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.public and self.tokens_file:
            raise ValueError("public = true lets everybody in, tokens_file only some: set one of them")
        if not self.public and not self.tokens_file:
            for key, host in (("address", self.address), ("url", urlsplit(self.url).hostname or "")):
                if host and not is_loopback(host):
                    raise ValueError(
                        f"{key} = {host!r} can be reached by others, and nobody is asked for a token: "
                        "set serve.tokens_file, or serve.public = true, or address = '127.0.0.1'"
                    )
        return self

    def beside(self, folder: Path) -> Self:
        """With the path of the tokens absolute: in a file, it is relative to the file's folder."""
        return self.model_copy(update={"tokens_file": str((folder / self.tokens_file).resolve())}) if self.tokens_file else self


def check_repository(name: str) -> None:
    """Raises ValueError: a name that OCI's clients or Hugging Face's would not take."""
    if not REPOSITORY.fullmatch(name) or name.count("/") > 1 or "--" in name or len(name) > 96 or name.partition("/")[0] in TAKEN:
        raise ValueError(
            f"{name!r} is no name for a repository here: small letters and digits, parted by '.', '_' or '-', at most one '/' and 96 "
            f"letters, not beginning with {', '.join(TAKEN)}"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
