"""Headers that say not to learn from an image."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.fetch.optout import refusal

REFUSED = [
    ("noai", "noai"),
    ("NoAI", "noai"),
    ("noimageai", "noimageai"),
    ("noml", "noml"),
    ("nofollow, noai", "noai"),
    ("nofollow,NOIMAGEAI", "noimageai"),
    ("  noai  ", "noai"),
    ("nofollow noai", "noai"),
    ('"noai"', "noai"),
    ("streamlearn: noai", "noai"),
    ("StreamLearn : nofollow, noai", "noai"),
    ("streamlearn/0.1: noai", "noai"),
    ("*: noai", "noai"),
    ("otherbot: nofollow, streamlearn: noai", "noai"),
    ("unavailable_after: 25 Jun 2010 15:00:00 PST, noai", "noai"),
    ("max-snippet: -1, noai", "noai"),
    ("noai, otherbot: all", "noai"),
]
SEARCH = [
    ("noindex", "noindex"),
    ("none", "none"),
    ("noimageindex", "noimageindex"),
    ("all, noindex", "noindex"),
    ("streamlearn: none", "none"),
]
LET_THROUGH = [
    "",
    "all",
    "nofollow",
    "noarchive, nosnippet",
    "otherbot: noai",
    "otherbot: nofollow, noai",  # the scope goes on to the next name
    "streamlearn2: noai",
    "stream: noai",
    "unavailable_after: noai",
    "noaix",
    "max-image-preview: none",
    ":",
    ",,;:,",
]


def said(value, respect_noindex=True, name="X-Robots-Tag"):
    return refusal([("Content-Type", "image/jpeg"), (name, value)], token="streamlearn", respect_noindex=respect_noindex)


@pytest.mark.parametrize("respect_noindex", [True, False])
@pytest.mark.parametrize(("value", "word"), REFUSED)
def test_what_is_said_about_learning_always_refuses(value, word, respect_noindex):
    assert said(value, respect_noindex) == f"X-Robots-Tag: {word}"


@pytest.mark.parametrize(("value", "word"), SEARCH)
def test_what_is_said_about_search_refuses_unless_that_is_switched_off(value, word):
    assert said(value) == f"X-Robots-Tag: {word}" and said(value, False) == ""


@pytest.mark.parametrize("value", LET_THROUGH)
def test_what_is_said_to_others_or_about_other_things_does_not_refuse(value):
    assert said(value) == ""


def test_each_of_several_headers_is_read_and_none_passes_its_name_on():
    headers = [("x-robots-tag", "otherbot: nofollow"), ("X-ROBOTS-TAG", "noai")]
    assert refusal(headers, token="streamlearn", respect_noindex=True) == "X-Robots-Tag: noai"


@pytest.mark.parametrize(
    ("value", "refused"), [("1", True), (" 1 ", True), ("1, 1", True), ("0", False), ("", False), ("11", False), ("true", False)]
)
def test_a_reserved_right_to_mine_refuses(value, refused):
    assert bool(said(value, respect_noindex=False, name="TDM-Reservation")) is refused


def test_without_a_product_token_general_rules_still_count():
    assert refusal([("X-Robots-Tag", "noai")], token="", respect_noindex=True) == "X-Robots-Tag: noai"


WORDS = st.sampled_from(["noai", "none", ":", ",", ";", " ", "streamlearn", "*", "/", '"', "otherbot", "\udcff", "\0"])


@given(
    headers=st.lists(st.tuples(st.sampled_from(["X-Robots-Tag", "tdm-reservation", "\udcff"]), st.text() | st.lists(WORDS).map("".join))),
    token=st.text(),
)
def test_no_header_text_raises_and_the_reason_can_be_written_down(headers, token):
    refusal(headers, token=token, respect_noindex=True).encode()
