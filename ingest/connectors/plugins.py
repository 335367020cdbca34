"""The classes of connectors: ours, and those that installed packages offer as entry points of the group `streamlearn.connectors`.

A class is imported when it is used, so a missing optional library is a complaint of the connector that needs it, and of no other.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
from dataclasses import dataclass
from importlib import metadata

from ingest.connectors.base import Connector
from streamlearn.contract.config import ConnectorConfig, Section
from streamlearn.contract.errors import ConfigError

GROUP = "streamlearn.connectors"
BUILT_IN = {  # class -> where it lives
    "folder": "ingest.connectors.folder:FolderConnector",
    "urls": "ingest.connectors.urls:UrlsConnector",
    "feed": "ingest.connectors.feed:FeedConnector",
    "wikimedia": "ingest.connectors.wikimedia:WikimediaConnector",
    "commoncrawl": "ingest.connectors.commoncrawl:CommonCrawlConnector",
    "s3": "ingest.connectors.s3_list:S3Connector",
    "webhook": "ingest.connectors.webhook:WebhookConnector",
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plugin:
    name: str  # what `class` says
    target: str  # module:attribute
    package: str  # the distribution that brings it
    version: str

    def load(self) -> type[Connector]:
        """The class itself.  Raises ConfigError when it cannot be imported, or is no connector."""
        module, _, attribute = self.target.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ImportError as e:
            raise ConfigError(f"class {self.name} ({self.target} of {self.package}) needs what is not installed: {e}") from e
        except Exception as e:  # somebody else's module may raise anything, and the other connectors go on
            raise ConfigError(f"class {self.name} ({self.target} of {self.package}) cannot be imported: {type(e).__name__}: {e}") from e
        if complaint := not_a_connector(found):
            raise ConfigError(f"class {self.name} ({self.target} of {self.package}) is no connector: {complaint}; see docs/connectors.md")
        return found  # type: ignore[no-any-return]  # just looked at


def not_a_connector(found: object) -> str:
    """Why a class breaks the contract of base.Connector; empty if it does not."""
    options = getattr(found, "Options", None)
    if not (inspect.isclass(options) and issubclass(options, Section)):
        return "it has no Options that is a streamlearn.contract.config.Section"
    if missing := [method for method in ("check", "discover", "close") if not callable(getattr(found, method, None))]:
        return f"it has no {', '.join(missing)}"
    taken = {field.alias or name for name, field in ConnectorConfig.model_fields.items()} | set(ConnectorConfig.model_fields)
    if clash := sorted(taken & set(options.model_fields)):
        return f"its option {clash[0]} is a key of every connector; name it otherwise"
    return ""


def plugins() -> dict[str, Plugin]:
    """Every class there is, by name.  A package cannot take a name of ours."""
    own = version()
    found = {}
    for name, target in BUILT_IN.items():
        if importlib.util.find_spec(target.partition(":")[0]) is not None:
            found[name] = Plugin(name, target, "streamlearn", own)
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        package = entry.dist.name if entry.dist else "?"
        if entry.name in found:
            _warn(entry.name, package, found[entry.name].package)
        else:
            found[entry.name] = Plugin(entry.name, entry.value, package, entry.dist.version if entry.dist else "?")
    return found


def load(name: str) -> type[Connector]:
    """The class of this name.  Raises ConfigError with a suggestion."""
    known = plugins()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}; is its package installed?"
        raise ConfigError(f"class = {name!r}: no such connector class; {hint}")
    return known[name].load()


@functools.cache
def _warn(name: str, package: str, other: str) -> None:
    """Once, not at every look."""
    logger.warning("package %s offers the connector class %s, which %s has already: it is left out", package, name, other)


def version() -> str:
    try:
        return metadata.version("streamlearn")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout
