"""docs/sources.md is held to the code."""

import re
import tomllib

import pytest

from ingest.connectors.commoncrawl import CommonCrawlOptions
from ingest.connectors.feed import FeedOptions
from ingest.connectors.http import HttpOptions
from ingest.connectors.s3_list import S3Options
from ingest.connectors.webhook import WebhookOptions
from ingest.connectors.wikimedia import WikimediaOptions
from tests.conftest import REPO

KINDS = {"feed": FeedOptions, "wikimedia": WikimediaOptions, "commoncrawl": CommonCrawlOptions, "s3": S3Options, "webhook": WebhookOptions}
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", (REPO / "docs" / "sources.md").read_text(), flags=re.M | re.S))


def rows(section):
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", SECTIONS[section], flags=re.M))


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_documented_with_its_default_and_no_other(kind):
    options, shared = KINDS[kind], HttpOptions.model_fields if issubclass(KINDS[kind], HttpOptions) else {}
    assert set(rows(kind)) == set(options.model_fields) - set(shared)
    for name, shown in rows(kind).items():
        field, plain = options.model_fields[name], shown.strip("`").strip('"')
        if field.is_required() or name == "suffixes":
            continue
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert plain == (str(default).lower() if isinstance(default, bool) else str(default).replace("'", '"')), name


def test_what_sources_over_http_share_is_documented():
    assert set(rows("What all sources over HTTP share")) == set(HttpOptions.model_fields)


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_can_be_used(kind):
    (text,) = re.findall(r"```toml\n(.*?)```", SECTIONS[kind], flags=re.S)
    (example,) = tomllib.loads(text)["connectors"]
    assert example.pop("name") and example.pop("class") == kind
    KINDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in example.items()})
